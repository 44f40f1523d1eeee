"""Product of a few tokens: every implementation against a loop in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu
from pallas_kernels.narrow_product import (
    is_kept_by_output,
    narrow_product,
    pallas_triton,
    shapes,
)
from pallas_kernels.narrow_product.pallas_triton import Blocks

EPS = 0.3


def inputs(shape, dtype):
    keys = jax.random.split(jax.random.key(0), 4)
    tokens = (shape.batch, shape.length)
    x = 3 * jax.random.normal(keys[0], (*tokens, shape.width))
    kernel = jax.random.normal(keys[1], (shape.outputs, shape.width))
    scale = 1 + 0.3 * jax.random.normal(keys[2], (shape.width,))
    residual = jax.random.normal(keys[3], (*tokens, shape.outputs))
    values = (x, kernel / shape.width**0.5, scale, residual)
    return tuple(v.astype(dtype) for v in values)


def options(args, normed, added):
    x, kernel, scale, residual = args
    chosen = {"scale": scale} if normed else {}
    return (x, kernel), chosen | ({"residual": residual} if added else {})


def expected(x, kernel, scale=None, residual=None):
    x, kernel = (np.asarray(v, np.float64) for v in (x, kernel))
    out = np.zeros((*x.shape[:2], len(kernel)))
    for b, t in np.ndindex(*x.shape[:2]):
        row = x[b, t]
        if scale is not None:
            row = np.asarray(scale, np.float64) * row
            row = row / np.sqrt(x[b, t] @ x[b, t] / x.shape[2] + EPS)
        out[b, t] = kernel @ row
    return out if residual is None else out + np.asarray(residual, np.float64)


def tolerance(dtype):
    return 1e-2 if dtype == "bfloat16" else 2e-6


def check(found, args, kwargs, dtype, assert_close):
    assert found.dtype == dtype
    want = expected(*args, **kwargs).astype(np.float32)
    assert_close(np.asarray(found, np.float32), want, tolerance(dtype))


@pytest.mark.parametrize(("normed", "added"), [(False, False), (True, True)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["pallas_triton", "xla", "reference"])
@pytest.mark.parametrize("size", shapes.SMALL)
def test_is_the_product(size, name, dtype, normed, added, interpreted, assert_close):
    args, kwargs = options(inputs(shapes.SMALL[size], dtype), normed, added)
    found = narrow_product(*args, **kwargs, eps=EPS, implementation=name)
    check(found, args, kwargs, dtype, assert_close)


@pytest.mark.parametrize(
    "blocks", [Blocks(1, 1, 1, 1), Blocks(4, 4, 2, 2), Blocks(32, 2, 1, 1)]
)
def test_blocks_change_nothing(blocks, interpreted, assert_close):
    """One block leaves outputs over, one has more sums than a warp has lanes."""
    args, kwargs = options(inputs(shapes.SMALL["rows"], "float32"), True, True)
    kwargs = {"scale": None, "residual": None} | kwargs
    found = pallas_triton.narrow_product(*args, **kwargs, eps=EPS, blocks=blocks)
    check(found, args, kwargs, "float32", assert_close)


def test_the_product_is_rounded_before_it_is_added(interpreted):
    # 1 + 2^-8 is 1 in bfloat16; added first, 256 + 1 + 2^-8 would round up to 258.
    x = jnp.ones((1, 1, 32), jnp.bfloat16)
    kernel = jnp.array([[1.0, 2**-8] + [0.0] * 30], jnp.bfloat16)
    residual = jnp.full((1, 1, 1), 256.0, jnp.bfloat16)
    for name in ("pallas_triton", "xla"):
        found = narrow_product(x, kernel, residual=residual, implementation=name)
        assert found.item() == 256.0, name


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 3, 32, 4), "float32", "3 tokens"),
        ((1, 1, 48, 4), "float32", "width of 48"),
        ((1, 1, 32, 4), "int32", "int32"),
    ],
)
def test_what_the_kernel_does_not_take(shape, dtype, message, interpreted):
    x, kernel, _, _ = inputs(shapes.Shape(*shape), dtype)
    with pytest.raises(NotImplementedError, match=message):
        narrow_product(x, kernel, implementation="pallas_triton")


def test_large_products_are_left_to_the_compiler(interpreted, monkeypatch):
    monkeypatch.setattr(pallas_triton, "LARGE_SIDE", 4)
    assert not is_kept_by_output(4, 32) and is_kept_by_output(3, 32)
    x, kernel, _, _ = inputs(shapes.Shape(1, 1, 32, 4), "float32")
    with pytest.raises(NotImplementedError, match="both sides are 4 or more"):
        narrow_product(x, kernel, implementation="pallas_triton")


def test_wrong_arguments_are_refused():
    x, kernel, scale, residual = inputs(shapes.SMALL["odd"], "float32")
    with pytest.raises(ValueError, match="kernel"):
        narrow_product(x, kernel[:, 1:])
    with pytest.raises(ValueError, match="scale"):
        narrow_product(x, kernel, scale=scale[1:])
    with pytest.raises(ValueError, match="residual has shape"):
        narrow_product(x, kernel, residual=residual[..., 1:])
    with pytest.raises(ValueError, match="residual is bfloat16"):
        narrow_product(x, kernel, residual=residual.astype(jnp.bfloat16))


@pytest.mark.parametrize("size", ["mamba_2_8b_in_2", "mamba_130m_x_1"])
def test_lowers_to_one_kernel(size, lower_for_cuda):
    s = shapes.LARGE[size]

    def struct(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    def run(x, kernel, scale, residual):
        kwargs = {"scale": scale, "residual": residual}
        return narrow_product(x, kernel, **kwargs, implementation="pallas_triton")

    text = lower_for_cuda(
        run,
        struct(s.batch, s.length, s.width),
        struct(s.outputs, s.width),
        struct(s.width),
        struct(s.batch, s.length, s.outputs),
    )
    assert text.count("__gpu$xla.gpu.triton") == 1


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("size", [*shapes.SMALL, *shapes.LARGE])
def test_compiled_kernel_is_the_product(size, dtype, assert_close):
    assert not gpu.INTERPRET
    shape = (shapes.SMALL | shapes.LARGE)[size]
    args, kwargs = options(inputs(shape, dtype), True, True)

    @jax.jit
    def run(args, kwargs):
        return narrow_product(*args, **kwargs, eps=EPS, implementation="pallas_triton")

    check(run(args, kwargs), args, kwargs, dtype, assert_close)
