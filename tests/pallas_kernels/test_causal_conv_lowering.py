"""The convolution's kernels lower for CUDA without a GPU; on one they run."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import bench, bench_cases
from pallas_kernels.causal_conv import causal_conv, shapes


def window_and_segments(shape):
    window = jax.ShapeDtypeStruct((shape.batch, 3, shape.channels), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((shape.batch, shape.length), jnp.int32)
    return {"initial_window": window, "segment_ids": ids}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("pass_", "kernels"), [("forward", 1), ("forward_backward", 2)]
)
def test_lowers_to_one_kernel_a_pass(pass_, kernels, packed, lower_for_cuda):
    case = bench_cases.causal_conv_case("paper_8b_mamba2")
    inputs = jax.eval_shape(case.make, jax.random.key(0))
    if packed:
        inputs |= window_and_segments(shapes.LARGE["paper_8b_mamba2"])
    dy = jax.ShapeDtypeStruct(inputs["x"].shape, inputs["x"].dtype)
    function = bench.pass_function(case, pass_, "pallas_triton")
    text = lower_for_cuda(function, inputs, dy)
    assert text.count("__gpu$xla.gpu.triton") == kernels


def test_lowers_with_parts(lower_for_cuda):
    case = bench_cases.causal_conv_case("paper_8b_mamba2")
    inputs = jax.eval_shape(case.make, jax.random.key(0))
    splits = (1024, 1024, 4096)
    x = inputs["x"]
    dys = tuple(jax.ShapeDtypeStruct((*x.shape[:2], s), x.dtype) for s in splits)

    def both(inputs, dys):
        conv = functools.partial(causal_conv, splits=splits, activation="silu")
        parts, pull = jax.vjp(lambda inputs: conv(**inputs), inputs)
        return parts, pull(dys)

    text = lower_for_cuda(both, inputs, dys)
    assert text.count("__gpu$xla.gpu.triton") == 2
    assert "concatenate" not in text


def test_lowers_with_repeats(lower_for_cuda):
    x = jax.ShapeDtypeStruct((8, 2048, 1024), jnp.bfloat16)
    y = jax.ShapeDtypeStruct((8, 2048, 4096), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((4, 4096), jnp.float32)

    def both(x, kernel, dy):
        conv = functools.partial(causal_conv, group=16, activation="silu")
        y, pull = jax.vjp(conv, x, kernel)
        return y, pull(dy)

    text = lower_for_cuda(both, x, kernel, y)
    assert text.count("__gpu$xla.gpu.triton") == 2
    # Neither x nor its gradient exists in the wide form.
    assert "stablehlo.broadcast_in_dim" not in text
    assert text.count("stablehlo.reduce") == 1


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("size", [(2, 500, 1000), (3, 1, 24), (1, 259, 4096)])
def test_compiled_kernels_match_the_reference(
    size, activation, dtype, assert_tree_close
):
    keys = iter(jax.random.split(jax.random.key(0), 5))
    batch, length, channels = size
    sizes = {
        "x": size,
        "kernel": (4, channels),
        "bias": (channels,),
        "initial_window": (batch, 3, channels),
    }
    low = {k: jax.random.normal(next(keys), v).astype(dtype) for k, v in sizes.items()}
    dy = jax.random.normal(next(keys), size).astype(dtype)
    ids = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32) // 30, size[:2])

    def pull_back(inputs, dy, implementation):
        def conv(inputs):
            return causal_conv(
                **inputs,
                segment_ids=ids,
                activation=activation,
                implementation=implementation,
            )

        y, pull = jax.vjp(conv, inputs)
        return y, pull(dy)[0]

    exact = {k: v.astype(jnp.float32) for k, v in low.items()}
    expected = jax.jit(pull_back, static_argnums=2)(
        exact, dy.astype(jnp.float32), "reference"
    )
    found = jax.jit(pull_back, static_argnums=2)(low, dy, "pallas_triton")
    assert_tree_close(found, expected, 1e-2 if dtype == "bfloat16" else 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA GPU")
def test_compiled_kernels_write_parts(assert_tree_close):
    splits, keys = (512, 1024, 512), jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 259, 2048)).astype(jnp.bfloat16)
    kernel = jax.random.normal(keys[1], (4, 2048))
    dy = jax.random.normal(keys[2], x.shape).astype(jnp.bfloat16)

    @functools.partial(jax.jit, static_argnums=0)
    def pull_back(splits):
        def conv(x, kernel):
            parts = causal_conv(x, kernel, activation="silu", splits=splits)
            return parts if splits is None else jnp.concatenate(parts, axis=-1)

        y, pull = jax.vjp(conv, x, kernel)
        return y, pull(dy)

    assert_tree_close(pull_back(splits), pull_back(None), 1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA GPU")
def test_compiled_kernels_repeat_groups(assert_tree_close):
    keys = jax.random.split(jax.random.key(0), 4)
    low = {
        "x": jax.random.normal(keys[0], (2, 259, 1024)).astype(jnp.bfloat16),
        "kernel": jax.random.normal(keys[1], (4, 4096)),
        "initial_window": jax.random.normal(keys[2], (2, 3, 1024)).astype(jnp.bfloat16),
    }
    dy = jax.random.normal(keys[3], (2, 259, 4096)).astype(jnp.bfloat16)

    def pull_back(inputs, dy, implementation):
        conv = functools.partial(causal_conv, group=16, implementation=implementation)
        y, pull = jax.vjp(lambda i: conv(**i, activation="silu"), inputs)
        return y, pull(dy)[0]

    exact = jax.tree.map(lambda v: v.astype(jnp.float32), (low, dy))
    expected = jax.jit(pull_back, static_argnums=2)(*exact, "reference")
    found = jax.jit(pull_back, static_argnums=2)(low, dy, "pallas_triton")
    assert_tree_close(found, expected, 1e-2)
