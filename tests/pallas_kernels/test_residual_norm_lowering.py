"""The residual norm's kernels lower for CUDA without a GPU; on one they run."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.residual_norm import residual_norm, shapes


@pytest.mark.parametrize("is_trained", [True, False])
@pytest.mark.parametrize("with_delta", [True, False])
@pytest.mark.parametrize("channels", [2560, 4096])
def test_lowers_to_one_kernel_a_pass(channels, with_delta, is_trained, lower_for_cuda):
    shape = shapes.LARGE["paper_8b"]._replace(channels=channels)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    scale = jax.ShapeDtypeStruct((channels,), jnp.float32)

    def both(x, delta, scale, cotangents):
        delta = delta if with_delta else None
        norm = functools.partial(residual_norm, eps=1e-5)
        if is_trained:
            outputs, pull = jax.vjp(lambda x, s: norm(x, delta, s), x, scale)
        else:
            outputs, pull = jax.vjp(lambda x: norm(x, delta, scale), x)
        return outputs, pull(cotangents)

    text = lower_for_cuda(both, x, x, scale, (x, x))
    assert text.count("__gpu$xla.gpu.triton") == 2
    # The compiler only adds up what programs have found for the scale.
    assert text.count("stablehlo.reduce") == int(is_trained)
    assert "stablehlo.rsqrt" not in text


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("with_delta", [True, False])
@pytest.mark.parametrize("size", [(2, 501, 4096), (3, 1, 2560), (1, 259, 40)])
def test_compiled_kernels_match_the_reference(
    size, with_delta, dtype, assert_tree_close
):
    keys = iter(jax.random.split(jax.random.key(0), 5))
    names = ("x", "delta") if with_delta else ("x",)
    low = {n: jax.random.normal(next(keys), size).astype(dtype) for n in names}
    low["scale"] = jax.random.normal(next(keys), size[2:])
    cotangents = tuple(
        jax.random.normal(next(keys), size).astype(dtype) for _ in range(2)
    )

    def pull_back(inputs, cotangents, implementation):
        def norm(inputs):
            inputs = {"delta": None} | inputs
            return residual_norm(**inputs, eps=1e-5, implementation=implementation)

        outputs, pull = jax.vjp(norm, inputs)
        return outputs, pull(cotangents)[0]

    exact = jax.tree.map(lambda v: v.astype(jnp.float32), (low, cotangents))
    expected = jax.jit(pull_back, static_argnums=2)(*exact, "reference")
    found = jax.jit(pull_back, static_argnums=2)(low, cotangents, "pallas_triton")
    assert_tree_close(found, expected, 1e-2 if dtype == "bfloat16" else 1e-5)
