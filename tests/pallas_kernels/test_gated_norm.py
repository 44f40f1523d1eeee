"""Gated norm: unit, parity and property tests over every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu
from pallas_kernels.gated_norm import api, gated_norm, pallas_triton, shapes

OTHERS = [name for name in api.IMPLEMENTATIONS if name != "reference"]
EPS = 1e-2

# Compiling dominates these tests: their programs run for a millisecond.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


pytestmark = pytest.mark.usefixtures("interpreted", "small_blocks")


@pytest.fixture
def small_blocks(monkeypatch):
    """Kernels in small pieces: quick to compile, with many borders between them."""
    blocks = pallas_triton.Blocks(values=16, warps=1, tokens=4, steps=2)
    monkeypatch.setattr(pallas_triton, "FORWARD", blocks)
    monkeypatch.setattr(pallas_triton, "BACKWARD", blocks)


def make_inputs(shape, seed=0):
    rng = np.random.default_rng(seed)
    size = (shape.batch, shape.length, shape.heads * shape.width)

    def normal(*size):
        return rng.standard_normal(size).astype(np.float32)

    inputs = {"y": normal(*size), "z": normal(*size), "scale": normal(size[-1])}
    return inputs, normal(*size)


@functools.partial(quick_jit, static_argnames=("implementation", "groups"))
def pull_back(implementation, groups, inputs, cotangent):
    """The output and the gradient of every input."""

    def norm(inputs):
        return gated_norm(
            **inputs, groups=groups, eps=EPS, implementation=implementation
        )

    out, vjp = jax.vjp(norm, inputs)
    return out, vjp(cotangent)[0]


def test_reference_by_hand():
    # silu(0) = 0 and silu(large) = large, so g is [0, 300] and then [400, 0].
    y = np.array([5.0, 3.0, 4.0, 7.0], np.float32).reshape(1, 1, 4)
    z = np.array([0.0, 100.0, 100.0, 0.0], np.float32).reshape(1, 1, 4)
    scale = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    out = gated_norm(y, z, scale, groups=2, eps=0.0, implementation="reference")
    root = np.sqrt(2.0)
    np.testing.assert_allclose(out[0, 0], [0.0, 2 * root, 3 * root, 0.0], rtol=1e-6)


@pytest.mark.parametrize("name", shapes.SMALL)
def test_reference_is_the_equation(name, numpy_gated_norm, assert_close):
    shape = shapes.SMALL[name]
    inputs, cotangent = make_inputs(shape)
    out, _ = pull_back("reference", shape.heads, inputs, cotangent)
    assert_close(out, numpy_gated_norm(**inputs, groups=shape.heads, eps=EPS), 1e-6)


def test_reference_gradients_are_the_differences(numpy_gated_norm, directional_errors):
    shape = shapes.SMALL["three_heads"]
    inputs, cotangent = make_inputs(shape)
    _, gradients = pull_back("reference", shape.heads, inputs, cotangent)
    errors = directional_errors(
        lambda i: (numpy_gated_norm(**i, groups=shape.heads, eps=EPS),),
        gradients,
        inputs,
        (cotangent,),
        np.random.default_rng(2),
    )
    assert set(errors) == set(inputs)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("implementation", OTHERS)
class TestEveryImplementation:
    @pytest.mark.parametrize("name", shapes.SMALL)
    def test_float32(self, implementation, name, assert_tree_close):
        arguments = (shapes.SMALL[name].heads, *make_inputs(shapes.SMALL[name]))
        expected = pull_back("reference", *arguments)
        assert_tree_close(pull_back(implementation, *arguments), expected, 1e-6)

    def test_bfloat16(self, implementation, assert_tree_close):
        shape = shapes.SMALL["long"]
        inputs, cotangent = make_inputs(shape)
        low = {k: jnp.asarray(v, jnp.bfloat16) for k, v in inputs.items()}
        low["scale"] = inputs["scale"]
        dout = jnp.asarray(cotangent, jnp.bfloat16)
        out, gradients = pull_back(implementation, shape.heads, low, dout)
        up = {k: np.asarray(v).astype(np.float32) for k, v in low.items()}
        exact = np.asarray(dout).astype(np.float32)
        expected = pull_back("reference", shape.heads, up, exact)
        # Only what is written is rounded: half a unit of 2^-8 in the last place.
        assert_tree_close((out, gradients), expected, 3e-3)
        assert out.dtype == gradients["y"].dtype == gradients["z"].dtype == jnp.bfloat16
        assert gradients["scale"].dtype == jnp.float32

    def test_groups_are_separate_calls(self, implementation, assert_close):
        inputs, _ = make_inputs(shapes.SMALL["three_heads"])
        norm = functools.partial(gated_norm, implementation=implementation)
        whole = norm(**inputs, groups=3)
        parts = [
            norm(**{k: v[..., i : i + 16] for k, v in inputs.items()}, groups=1)
            for i in (0, 16, 32)
        ]
        assert_close(whole, np.concatenate(parts, axis=-1), 1e-6)

    def test_large_gates(self, implementation, assert_close):
        y = np.ones((1, 2, 4), np.float32)
        z = np.full((1, 2, 4), [[-1e4], [1e4]], np.float32)[0][None]
        out = gated_norm(
            y, z, np.ones(4, np.float32), groups=2, implementation=implementation
        )
        np.testing.assert_array_equal(out[0, 0], 0.0)
        assert_close(out[0, 1], np.ones(4, np.float32), 1e-6)

    def test_vmap_and_remat(self, implementation, assert_close):
        shape = shapes.SMALL["three_heads"]
        inputs, cotangent = make_inputs(shape)
        norm = jax.checkpoint(
            functools.partial(
                gated_norm,
                groups=shape.heads,
                eps=EPS,
                implementation=implementation,
            )
        )

        def row(y, z):
            return norm(y[None], z[None], inputs["scale"])[0]

        out, vjp = jax.vjp(lambda y: jax.vmap(row)(y, inputs["z"]), inputs["y"])
        expected, gradients = pull_back(implementation, shape.heads, inputs, cotangent)
        assert_close(out, expected, 1e-6)
        assert_close(vjp(jnp.asarray(cotangent))[0], gradients["y"], 1e-6)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("y", (2, 6), "y has shape (2, 6), expected [B L E]"),
        ("z", (2, 7, 4), "z has shape (2, 7, 4), expected [B L E] = (2, 7, 6)"),
        ("scale", (4,), "scale has shape (4,), expected [E] = (6,)"),
    ],
)
def test_shape_errors(name, size, message):
    sizes = {"y": (2, 7, 6), "z": (2, 7, 6), "scale": (6,), name: size}
    with pytest.raises(ValueError) as error:
        gated_norm(**{k: jnp.zeros(v) for k, v in sizes.items()}, groups=3)
    assert f"gated_norm: {message}" in str(error.value)


def test_groups_divide_the_channels():
    y = jnp.zeros((1, 2, 6))
    with pytest.raises(ValueError, match="4 groups, which do not divide 6 channels"):
        gated_norm(y, y, jnp.ones(6), groups=4)


@pytest.mark.parametrize("shape", [(1, 5, 3, 128), (2, 35, 32, 64)])
def test_blocks_as_they_are(shape, monkeypatch, assert_tree_close):
    monkeypatch.undo()
    monkeypatch.setattr(gpu, "INTERPRET", True)
    shape = shapes.Shape(*shape)
    arguments = (shape.heads, *make_inputs(shape))
    expected = pull_back("reference", *arguments)
    assert_tree_close(pull_back("pallas_triton", *arguments), expected, 1e-5)


def test_kernels_pass_over_what_they_cannot_run(monkeypatch):
    y = jnp.ones((1, 2, 6))
    with pytest.raises(NotImplementedError, match="groups of 3 channels; it takes"):
        gated_norm(y, y, y[0, 0], groups=2, implementation="pallas_triton")
    monkeypatch.setattr(gpu, "INTERPRET", False)
    with pytest.raises(NotImplementedError, match="needs a CUDA GPU, this is a cpu"):
        gated_norm(y, y, y[0, 0], groups=3, implementation="pallas_triton")
    assert np.isfinite(gated_norm(y, y, y[0, 0], groups=2)).all()
