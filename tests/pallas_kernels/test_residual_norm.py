"""Residual sum and norm: unit, parity and property tests over every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu
from pallas_kernels.residual_norm import (
    api,
    pallas_triton,
    residual_norm,
    shapes,
)

OTHERS = [name for name in api.IMPLEMENTATIONS if name != "reference"]
EPS = 1e-2

# Compiling dominates these tests: their programs run for a millisecond.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


pytestmark = pytest.mark.usefixtures("interpreted", "small_blocks")


@pytest.fixture(params=[1, 4])
def small_blocks(request, monkeypatch):
    """One token a program, and several; three programs sum the gradient of the scale."""
    blocks = pallas_triton.Blocks(rows=request.param, warps=1)
    monkeypatch.setattr(pallas_triton, "FORWARD", blocks)
    monkeypatch.setattr(pallas_triton, "BACKWARD", blocks)
    monkeypatch.setattr(pallas_triton, "BACKWARD_SCALE", blocks)
    monkeypatch.setattr(pallas_triton, "PROGRAMS", 3)


def make_inputs(shape, *, with_delta=True, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*size):
        return rng.standard_normal(size).astype(np.float32)

    inputs = {"x": normal(*shape), "delta": normal(*shape)}
    if not with_delta:
        del inputs["delta"]
    inputs["scale"] = normal(shape.channels)
    return inputs, (normal(*shape), normal(*shape))


@functools.partial(quick_jit, static_argnames=("implementation", "with_delta"))
def pull_back(implementation, inputs, cotangents, with_delta=True):
    """The outputs and the gradient of every input."""

    def norm(inputs):
        inputs = inputs if with_delta else inputs | {"delta": None}
        return residual_norm(**inputs, eps=EPS, implementation=implementation)

    outputs, vjp = jax.vjp(norm, inputs)
    return outputs, vjp(cotangents)[0]


def test_reference_by_hand():
    x = np.array([1.0, 5.0], np.float32).reshape(1, 1, 2)
    delta = np.array([2.0, -1.0], np.float32).reshape(1, 1, 2)
    scale = np.array([1.0, 10.0], np.float32)
    total, out = residual_norm(x, delta, scale, eps=0.5, implementation="reference")
    np.testing.assert_array_equal(total[0, 0], [3.0, 4.0])
    root = np.sqrt(25.0 / 2 + 0.5)
    np.testing.assert_allclose(out[0, 0], [3.0 / root, 40.0 / root], rtol=1e-6)


@pytest.mark.parametrize("name", shapes.SMALL)
def test_reference_is_the_equation(name, numpy_residual_norm, assert_tree_close):
    inputs, cotangents = make_inputs(shapes.SMALL[name])
    found, _ = pull_back("reference", inputs, cotangents)
    assert_tree_close(found, numpy_residual_norm(**inputs, eps=EPS), 1e-6)


def test_reference_gradients_are_the_differences(
    numpy_residual_norm, directional_errors
):
    inputs, cotangents = make_inputs(shapes.SMALL["odd"])
    _, gradients = pull_back("reference", inputs, cotangents)
    errors = directional_errors(
        lambda i: numpy_residual_norm(**i, eps=EPS),
        gradients,
        inputs,
        cotangents,
        np.random.default_rng(2),
    )
    assert set(errors) == set(inputs)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("implementation", OTHERS)
class TestEveryImplementation:
    @pytest.mark.parametrize("with_delta", [True, False])
    @pytest.mark.parametrize("name", shapes.SMALL)
    def test_float32(self, implementation, name, with_delta, assert_tree_close):
        arguments = make_inputs(shapes.SMALL[name], with_delta=with_delta)
        expected = pull_back("reference", *arguments, with_delta=with_delta)
        found = pull_back(implementation, *arguments, with_delta=with_delta)
        assert_tree_close(found, expected, 1e-6)

    def test_bfloat16(self, implementation, assert_tree_close):
        inputs, cotangents = make_inputs(shapes.SMALL["long"])
        low = {k: jnp.asarray(v, jnp.bfloat16) for k, v in inputs.items()}
        low["scale"] = inputs["scale"]
        low_cotangents = tuple(jnp.asarray(c, jnp.bfloat16) for c in cotangents)
        outputs, gradients = pull_back(implementation, low, low_cotangents)
        up = {k: np.asarray(v).astype(np.float32) for k, v in low.items()}
        exact = tuple(np.asarray(c).astype(np.float32) for c in low_cotangents)
        expected = pull_back("reference", up, exact)
        # The sum, the normalised value and the result are rounded one after another.
        assert_tree_close((outputs, gradients), expected, 1e-2)
        assert all(v.dtype == jnp.bfloat16 for v in outputs)
        assert gradients["x"].dtype == gradients["delta"].dtype == jnp.bfloat16
        assert gradients["scale"].dtype == jnp.float32

    def test_rounds_before_it_scales(self, implementation):
        """As Llama does: the normalised 1.0039 becomes 1 before it is scaled."""
        x = jnp.array([[[1.0, 1.0078125]]], jnp.bfloat16)
        scale = jnp.array([3.0, 3.0], jnp.float32)
        out = residual_norm(x, None, scale, eps=0.0, implementation=implementation)[1]
        np.testing.assert_array_equal(np.asarray(out, np.float32)[0, 0], [2.984375, 3])

    def test_tokens_are_separate_calls(self, implementation, assert_close):
        inputs, _ = make_inputs(shapes.SMALL["odd"])
        norm = functools.partial(residual_norm, eps=EPS, implementation=implementation)
        whole = norm(**inputs)[1]
        x, delta = inputs["x"], inputs["delta"]
        parts = [
            norm(x[:, t : t + 1], delta[:, t : t + 1], inputs["scale"])[1]
            for t in range(x.shape[1])
        ]
        assert_close(whole, np.concatenate(parts, axis=1), 1e-6)

    def test_vmap_and_remat(self, implementation, assert_close):
        inputs, cotangents = make_inputs(shapes.SMALL["odd"])
        norm = jax.checkpoint(
            functools.partial(residual_norm, eps=EPS, implementation=implementation)
        )

        def row(x, delta):
            return [v[0] for v in norm(x[None], delta[None], inputs["scale"])]

        outputs, vjp = jax.vjp(lambda x: jax.vmap(row)(x, inputs["delta"]), inputs["x"])
        expected, gradients = pull_back(implementation, inputs, cotangents)
        assert_close(outputs[1], expected[1], 1e-6)
        assert_close(vjp([jnp.asarray(c) for c in cotangents])[0], gradients["x"], 1e-6)


@pytest.mark.parametrize("unused", [0, 1])
def test_gradients_of_one_result_alone(unused, assert_tree_close):
    """A result that nobody reads has no gradient, not even an array of zeros."""
    inputs, cotangents = make_inputs(shapes.SMALL["odd"])

    def pull(implementation, inputs):
        norm = functools.partial(residual_norm, implementation=implementation)
        _, vjp = jax.vjp(lambda i: norm(**i, eps=EPS)[1 - unused], inputs)
        return vjp(cotangents[1 - unused])[0]

    found = quick_jit(functools.partial(pull, "pallas_triton"))(inputs)
    expected = pull("xla", inputs)
    if unused == 1:
        assert not found.pop("scale").any()
        del expected["scale"]
    assert_tree_close(found, expected, 1e-6)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("x", (2, 6), "x has shape (2, 6), expected [B L D]"),
        ("delta", (2, 7, 4), "delta has shape (2, 7, 4), expected [B L D]"),
        ("scale", (4,), "scale has shape (4,), expected [D] = (6,)"),
    ],
)
def test_shape_errors(name, size, message):
    sizes = {"x": (2, 7, 6), "delta": (2, 7, 6), "scale": (6,), name: size}
    with pytest.raises(ValueError) as error:
        residual_norm(**{k: jnp.zeros(v) for k, v in sizes.items()}, eps=EPS)
    assert f"residual_norm: {message}" in str(error.value)


def test_one_dtype():
    x = jnp.zeros((1, 2, 6))
    with pytest.raises(ValueError, match="delta is bfloat16, x is float32"):
        residual_norm(x, x.astype(jnp.bfloat16), jnp.ones(6), eps=EPS)


@pytest.mark.parametrize("channels", [128, 160])
def test_blocks_as_they_are(channels, monkeypatch, assert_tree_close):
    monkeypatch.undo()
    monkeypatch.setattr(gpu, "INTERPRET", True)
    arguments = make_inputs(shapes.Shape(2, 5, channels))
    expected = pull_back("reference", *arguments)
    assert_tree_close(pull_back("pallas_triton", *arguments), expected, 1e-5)


def test_kernels_pass_over_what_they_cannot_run(monkeypatch):
    x = jnp.ones((1, 2, 16385))
    norm = functools.partial(residual_norm, eps=EPS)
    with pytest.raises(NotImplementedError, match="16385 channels are more than"):
        norm(x, None, x[0, 0], implementation="pallas_triton")
    monkeypatch.setattr(gpu, "INTERPRET", False)
    with pytest.raises(NotImplementedError, match="needs a CUDA GPU, this is a cpu"):
        norm(x, None, x[0, 0], implementation="pallas_triton")
    assert np.isfinite(norm(x, None, x[0, 0])[1]).all()
