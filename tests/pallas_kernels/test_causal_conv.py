"""Causal convolution: unit, parity and property tests over every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu
from pallas_kernels.causal_conv import api, causal_conv, pallas_triton, shapes

OTHERS = [name for name in api.IMPLEMENTATIONS if name != "reference"]

# Compiling dominates these tests: their programs run for a millisecond.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


pytestmark = pytest.mark.usefixtures("interpreted", "small_blocks")


@pytest.fixture
def small_blocks(monkeypatch):
    """Kernels in small pieces: quick to compile, with many borders between them."""
    blocks = pallas_triton.Blocks(values=1, warps=1, steps=2, chunk=8)
    monkeypatch.setattr(pallas_triton, "FORWARD", blocks)
    monkeypatch.setattr(pallas_triton, "BACKWARD", blocks)


def make_inputs(shape, *, options=True, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*size):
        return rng.standard_normal(size).astype(np.float32)

    inputs = {
        "x": normal(shape.batch, shape.length, shape.channels),
        "kernel": normal(shape.width, shape.channels),
    }
    if options:
        inputs["bias"] = normal(shape.channels)
        if shape.width > 1:
            size = (shape.batch, shape.width - 1, shape.channels)
            inputs["initial_window"] = normal(*size)
    return inputs, normal(*inputs["x"].shape)


@functools.partial(quick_jit, static_argnames=("implementation", "activation", "group"))
def pull_back(implementation, inputs, ids, cotangent, activation="silu", group=None):
    """The output and the gradient of every float input."""

    def conv(inputs):
        return causal_conv(
            **inputs,
            segment_ids=ids,
            activation=activation,
            group=group,
            implementation=implementation,
        )

    y, vjp = jax.vjp(conv, inputs)
    return y, vjp(cotangent)[0]


def case(name, make_segments):
    shape = shapes.SMALL[name]
    inputs, cotangent = make_inputs(shape, options=name != "batch_1")
    ids = make_segments(
        np.random.default_rng(1), shape.batch, shape.length, shape.segments
    )
    return inputs, ids, cotangent


def test_reference_by_hand():
    x = np.array([1.0, 10.0, 100.0], np.float32).reshape(1, 3, 1)
    kernel = np.array([[2.0], [3.0]], np.float32)
    y = causal_conv(x, kernel, implementation="reference")
    np.testing.assert_array_equal(y[0, :, 0], [3.0, 32.0, 320.0])


@pytest.mark.parametrize("name", shapes.SMALL)
def test_reference_is_the_sum(name, make_segments, numpy_causal_conv, assert_close):
    inputs, ids, cotangent = case(name, make_segments)
    y, _ = pull_back("reference", inputs, ids, cotangent)
    expected = numpy_causal_conv(**inputs, segment_ids=ids, activation="silu")
    assert_close(y, expected, 1e-6)


def test_reference_gradients_are_the_differences(
    make_segments, numpy_causal_conv, directional_errors
):
    inputs, ids, cotangent = case("packed", make_segments)
    _, gradients = pull_back("reference", inputs, ids, cotangent)
    errors = directional_errors(
        lambda i: (numpy_causal_conv(**i, segment_ids=ids, activation="silu"),),
        gradients,
        inputs,
        (cotangent,),
        np.random.default_rng(2),
    )
    assert set(errors) == set(inputs)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("implementation", OTHERS)
class TestEveryImplementation:
    @pytest.mark.parametrize("activation", ["silu", None])
    @pytest.mark.parametrize("name", shapes.SMALL)
    def test_float32(
        self, implementation, name, activation, make_segments, assert_tree_close
    ):
        arguments = (*case(name, make_segments), activation)
        expected = pull_back("reference", *arguments)
        assert_tree_close(pull_back(implementation, *arguments), expected, 1e-5)

    def test_bfloat16(self, implementation, make_segments, assert_tree_close):
        inputs, ids, cotangent = case("packed", make_segments)
        low = {k: jnp.asarray(v, jnp.bfloat16) for k, v in inputs.items()}
        dy = jnp.asarray(cotangent, jnp.bfloat16)
        y, gradients = pull_back(implementation, low, ids, dy)
        up = {k: np.asarray(v).astype(np.float32) for k, v in low.items()}
        expected = pull_back("reference", up, ids, np.asarray(dy).astype(np.float32))
        assert_tree_close((y, gradients), expected, 1e-2)
        assert y.dtype == jnp.bfloat16
        assert all(g.dtype == jnp.bfloat16 for g in gradients.values())

    def test_two_parts_are_the_whole(self, implementation, assert_close):
        inputs, _ = make_inputs(shapes.SMALL["packed"])
        conv = functools.partial(causal_conv, implementation=implementation)
        x = inputs.pop("x")
        whole = conv(x, **inputs)
        first = conv(x[:, :26], **inputs)
        second = conv(x[:, 26:], **(inputs | {"initial_window": x[:, 23:26]}))
        assert_close(np.concatenate([first, second], axis=1), whole, 1e-6)

    @pytest.mark.parametrize(
        ("channels", "group", "repeats"), [(24, 4, 2), (6, 3, 2), (16, None, 4)]
    )
    def test_groups_are_repeated(
        self, implementation, channels, group, repeats, make_segments, assert_tree_close
    ):
        shape = shapes.Shape(2, 21, channels * repeats, 4)
        inputs, cotangent = make_inputs(shape)
        ids = make_segments(np.random.default_rng(1), 2, 21, 2)
        step = group or channels
        first = [f for f in range(channels * repeats) if f // step % repeats == 0]

        def repeat(value):
            parts = np.split(value, channels // step, axis=-1)
            return np.concatenate([p for p in parts for _ in range(repeats)], axis=-1)

        few = {k: inputs[k][..., first] for k in ("x", "initial_window")}
        y, gradients = pull_back(
            "reference",
            inputs | {k: repeat(v) for k, v in few.items()},
            ids,
            cotangent,
        )
        for k, value in few.items():
            split = gradients[k].reshape(*value.shape[:2], -1, repeats, step)
            gradients[k] = np.asarray(split).sum(axis=3).reshape(value.shape)
        conv = functools.partial(pull_back, implementation, group=group)
        found = conv(inputs | few, ids, cotangent)
        assert_tree_close(found, (y, gradients), 1e-5)

    @pytest.mark.parametrize("splits", [(32, 64, 32), (10, 118), (128,)])
    def test_splits_are_parts_of_the_whole(
        self, implementation, splits, assert_tree_close
    ):
        inputs, cotangent = make_inputs(shapes.Shape(2, 13, 128, 4))
        ends = np.cumsum(splits[:-1])

        def pull(splits):
            return jax.vjp(
                lambda inputs: causal_conv(
                    **inputs, splits=splits, implementation=implementation
                ),
                inputs,
            )

        y, vjp = pull(None)
        parts, vjp_of_parts = pull(splits)
        assert isinstance(parts, tuple)
        assert_tree_close(parts, tuple(np.split(y, ends, axis=-1)), 1e-6)
        found = vjp_of_parts(tuple(jnp.split(cotangent, ends, axis=-1)))
        assert_tree_close(found, vjp(jnp.asarray(cotangent)), 1e-6)

    def test_segments_are_separate_calls(self, implementation, assert_close):
        inputs, _ = make_inputs(shapes.SMALL["packed"])
        conv = functools.partial(causal_conv, implementation=implementation)
        x, window = inputs.pop("x"), inputs.pop("initial_window")
        cuts = (0, 2, 3, 63)
        ids = np.repeat(np.array([[5, 2, 9]] * 2, np.int32), np.diff(cuts), axis=1)
        packed = conv(x, **inputs, initial_window=window, segment_ids=ids)
        parts = [
            conv(x[:, a:b], **inputs, initial_window=None if a else window)
            for a, b in zip(cuts[:-1], cuts[1:], strict=True)
        ]
        assert_close(packed, np.concatenate(parts, axis=1), 1e-6)

    def test_vmap_and_remat(self, implementation, make_segments, assert_close):
        inputs, ids, cotangent = case("packed", make_segments)
        conv = jax.checkpoint(
            functools.partial(
                causal_conv, activation="silu", implementation=implementation
            )
        )

        def row(x, window, ids):
            return conv(
                x[None],
                inputs["kernel"],
                inputs["bias"],
                initial_window=window[None],
                segment_ids=ids[None],
            )[0]

        y, vjp = jax.vjp(
            lambda x: jax.vmap(row)(x, inputs["initial_window"], ids), inputs["x"]
        )
        expected, gradients = pull_back(implementation, inputs, ids, cotangent)
        assert_close(y, expected, 1e-6)
        assert_close(vjp(jnp.asarray(cotangent))[0], gradients["x"], 1e-6)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("x", (2, 7), "x has shape (2, 7), expected [B L C]"),
        ("kernel", (4, 5), "kernel has 5 channels, no multiple of the 6 of x"),
        ("bias", (4,), "bias has shape (4,), expected [F] = (6,)"),
        ("initial_window", (2, 4, 6), "initial_window has shape (2, 4, 6), expected"),
        ("segment_ids", (2, 6), "segment_ids has shape (2, 6), expected [B L]"),
    ],
)
def test_shape_errors(name, size, message):
    sizes = {"x": (2, 7, 6), "kernel": (4, 6), name: size}
    with pytest.raises(ValueError) as error:
        causal_conv(**{k: jnp.zeros(v) for k, v in sizes.items()})
    assert f"causal_conv: {message}" in str(error.value)


@pytest.mark.parametrize("group", [0, 4, 8])
def test_groups_cover_the_channels(group):
    with pytest.raises(ValueError, match=f"group is {group}, which does not divide"):
        causal_conv(jnp.zeros((1, 2, 6)), jnp.zeros((4, 12)), group=group)


def test_unknown_activation():
    with pytest.raises(ValueError, match="activation is 'gelu', expected 'silu'"):
        causal_conv(jnp.zeros((1, 2, 3)), jnp.zeros((4, 3)), activation="gelu")


@pytest.mark.parametrize("splits", [(2, 3), (6, 0), ()])
def test_splits_add_up(splits):
    x, kernel = jnp.zeros((2, 7, 6)), jnp.zeros((4, 6))
    with pytest.raises(ValueError, match="do not add up to 6 channels"):
        causal_conv(x, kernel, splits=splits)


@pytest.mark.parametrize("length", [5, 137])
def test_blocks_as_they_are(length, monkeypatch, assert_tree_close):
    monkeypatch.undo()
    monkeypatch.setattr(gpu, "INTERPRET", True)
    inputs, cotangent = make_inputs(shapes.Shape(1, length, 130, 4))
    expected = pull_back("reference", inputs, None, cotangent)
    found = pull_back("pallas_triton", inputs, None, cotangent)
    assert_tree_close(found, expected, 1e-5)


def test_kernels_pass_over_what_they_cannot_run(monkeypatch):
    x, kernel = jnp.ones((1, 2, 3)), jnp.ones((9, 3))
    with pytest.raises(NotImplementedError, match="9 taps are more than 8"):
        causal_conv(x, kernel, implementation="pallas_triton")
    monkeypatch.setattr(gpu, "INTERPRET", False)
    with pytest.raises(NotImplementedError, match="needs a CUDA GPU, this is a cpu"):
        causal_conv(x, kernel[:4], implementation="pallas_triton")
    assert np.isfinite(causal_conv(x, kernel)).all()
