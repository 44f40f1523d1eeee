"""The gated norm's kernels lower for CUDA without a GPU; on one they run."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import bench, bench_cases
from pallas_kernels.gated_norm import gated_norm


@pytest.mark.parametrize(
    ("pass_", "kernels"), [("forward", 1), ("forward_backward", 2)]
)
def test_lowers_to_one_kernel_a_pass(pass_, kernels, lower_for_cuda):
    case = bench_cases.gated_norm_case("paper_8b")
    inputs = jax.eval_shape(case.make, jax.random.key(0))
    dout = jax.ShapeDtypeStruct(inputs["y"].shape, inputs["y"].dtype)
    function = bench.pass_function(case, pass_, "pallas_triton")
    text = lower_for_cuda(function, inputs, dout)
    assert text.count("__gpu$xla.gpu.triton") == kernels


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("size", [(2, 501, 32, 128), (3, 1, 3, 64), (1, 259, 40, 16)])
def test_compiled_kernels_match_the_reference(size, dtype, assert_tree_close):
    keys = jax.random.split(jax.random.key(0), 4)
    batch, length, groups, width = size
    wide = (batch, length, groups * width)
    sizes = {"y": wide, "z": wide, "scale": wide[2:]}
    low = {
        name: jax.random.normal(key, shape).astype(dtype)
        for key, (name, shape) in zip(keys[:3], sizes.items(), strict=True)
    }
    dout = jax.random.normal(keys[3], wide).astype(dtype)

    def pull_back(inputs, dout, implementation):
        def norm(inputs):
            return gated_norm(**inputs, groups=groups, implementation=implementation)

        out, pull = jax.vjp(norm, inputs)
        return out, pull(dout)[0]

    exact = {k: v.astype(jnp.float32) for k, v in low.items()}
    expected = jax.jit(pull_back, static_argnums=2)(
        exact, dout.astype(jnp.float32), "reference"
    )
    found = jax.jit(pull_back, static_argnums=2)(low, dout, "pallas_triton")
    assert_tree_close(found, expected, 1e-2 if dtype == "bfloat16" else 1e-5)
