"""Norm, product and gate: every implementation against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu
from pallas_kernels.gated_product import gated_product

SIZES = [(1, 1, 64, 128), (3, 5, 192, 256), (1, 16, 64, 256)]


def inputs(size, dtype):
    batch, length, width, outputs = size
    keys = jax.random.split(jax.random.key(0), 3)
    h = 3 * jax.random.normal(keys[0], (batch, length, width))
    scale = 1 + 0.3 * jax.random.normal(keys[1], (width,))
    kernel = jax.random.normal(keys[2], (width, 2 * outputs)) / width**0.5
    return tuple(v.astype(dtype) for v in (h, scale, kernel))


def assert_near(found, args, dtype):
    expected = gated_product(*args, implementation="reference")
    assert found.dtype == dtype
    found, expected = (np.asarray(v, np.float64) for v in (found, expected))
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < (1e-2 if dtype == "bfloat16" else 1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("pallas_triton", "bfloat16"), ("xla", "bfloat16"), ("xla", "float32")],
)
def test_matches_the_reference(name, dtype, size, monkeypatch):
    monkeypatch.setattr(gpu, "INTERPRET", True)
    args = inputs(size, dtype)
    assert_near(gated_product(*args, implementation=name), args, dtype)


@pytest.mark.parametrize(
    ("size", "dtype", "message"),
    [
        ((1, 17, 64, 128), "bfloat16", "17 tokens"),
        ((1, 1, 32, 128), "bfloat16", "blocks"),
        ((1, 1, 64, 64), "bfloat16", "blocks"),
        ((1, 1, 64, 128), "float32", "float32"),
    ],
)
def test_what_the_kernel_does_not_take(size, dtype, message, monkeypatch):
    monkeypatch.setattr(gpu, "INTERPRET", True)
    args = inputs(size, dtype)
    with pytest.raises(NotImplementedError, match=message):
        gated_product(*args, implementation="pallas_triton")
    assert_near(gated_product(*args), args, dtype)


def test_wrong_shapes_are_refused():
    h, scale, kernel = inputs((1, 1, 64, 128), "float32")
    with pytest.raises(ValueError, match="scale"):
        gated_product(h, scale[1:], kernel)
    with pytest.raises(ValueError, match="kernel"):
        gated_product(h, scale, kernel[1:])
    with pytest.raises(ValueError, match="255 columns"):
        gated_product(h, scale, kernel[:, 1:])


@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_lowers_to_one_kernel(tokens, lower_for_cuda):
    def struct(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    text = lower_for_cuda(
        lambda *args: gated_product(*args, implementation="pallas_triton"),
        struct(1, tokens, 4096),
        struct(4096),
        struct(4096, 28672),
    )
    assert text.count("__gpu$xla.gpu.triton") == 1


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("size", [*SIZES, (1, 1, 4096, 14336), (1, 5, 4096, 14336)])
def test_compiled_kernel_matches_the_reference(size):
    args = inputs(size, "bfloat16")
    call = jax.jit(lambda *args: gated_product(*args, implementation="pallas_triton"))
    assert_near(call(*args), args, "bfloat16")
