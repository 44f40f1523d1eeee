"""Selective scan: unit, parity and property tests over every implementation."""

import functools
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import jaxprs

from pallas_kernels import dispatch
from pallas_kernels.selective_scan import (
    api,
    pallas_triton,
    reference,
    selective_scan,
    shapes,
)

OTHERS = [name for name in api.IMPLEMENTATIONS if name != "reference"]
BF16_INPUTS = ("x", "dt", "B", "C", "z")

# Compiling dominates these tests: their programs run for a millisecond.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Off a GPU the kernel is interpreted, fewer steps unrolled: it compiles sooner."""
    if jax.default_backend() != "gpu":
        kernel = functools.partial(pallas_triton.selective_scan, interpret=True)
        monkeypatch.setitem(api.IMPLEMENTATIONS, "pallas_triton", kernel)
        monkeypatch.setattr(pallas_triton.kernels, "BLOCK", 8)
        monkeypatch.setattr(pallas_triton.kernels, "FORWARD_STEPS", 1)
        monkeypatch.setattr(pallas_triton.kernels, "BACKWARD_STEPS", 1)


def make_inputs(shape, *, options=True, seed=0):
    """Float inputs by name; decays and outputs of the size seen in models."""
    rng = np.random.default_rng(seed)
    b, length, e, n = shape[:4]

    def normal(*size, scale=1.0):
        return (scale * rng.standard_normal(size)).astype(np.float32)

    inputs = {
        "x": normal(b, length, e),
        "dt": normal(b, length, e),
        "A": -np.exp(normal(e, n)),
        "B": normal(b, length, shape.B_groups, n),
        "C": normal(b, length, shape.C_groups, n),
    }
    if options:
        inputs |= {
            "D": normal(e),
            "z": normal(b, length, e),
            "dt_bias": normal(e) - 1.0,
            "initial_state": normal(b, e, n),
        }
    cotangents = (normal(b, length, e), normal(b, e, n))
    return inputs, cotangents


@functools.partial(quick_jit, static_argnames=("implementation", "every"))
def pull_back(implementation, inputs, ids, cotangents, every=64):
    """Outputs and the gradient of every float input."""

    def scan(inputs):
        options = {"implementation": implementation, "checkpoint_every": every}
        return selective_scan(**inputs, segment_ids=ids, **options)

    outputs, vjp = jax.vjp(scan, inputs)
    return outputs, vjp(cotangents)[0]


@functools.partial(quick_jit, static_argnames="implementation")
def forward(implementation, inputs, ids=None):
    return selective_scan(**inputs, segment_ids=ids, implementation=implementation)


def case(name, make_segments):
    shape = shapes.SMALL[name]
    inputs, cotangents = make_inputs(shape, options=name != "batch_1")
    ids = make_segments(
        np.random.default_rng(1), shape.batch, shape.length, shape.segments
    )
    return inputs, ids, cotangents


def rounded(inputs, dy):
    """Inputs and cotangent with bfloat16 arrays, and the same values in float32."""
    low = {
        k: jnp.asarray(v, jnp.bfloat16) if k in BF16_INPUTS else v
        for k, v in inputs.items()
    }
    low = low, jnp.asarray(dy, jnp.bfloat16)
    return low, jax.tree.map(lambda v: np.asarray(v).astype(np.float32), low)


def tokens(inputs, start, stop):
    """The same inputs for tokens start:stop."""
    along = ("x", "dt", "B", "C", "z")
    return {k: v[:, start:stop] if k in along else v for k, v in inputs.items()}


@pytest.mark.parametrize("name", shapes.SMALL)
def test_reference_is_the_recurrence(
    name, make_segments, numpy_selective_scan, assert_tree_close
):
    inputs, ids, _ = case(name, make_segments)
    expected = numpy_selective_scan(**inputs, segment_ids=ids)
    assert_tree_close(forward("reference", inputs, ids), expected, 2e-6)


def test_reference_by_hand():
    ln3 = np.log(3.0)  # softplus of log(e^ln3 - 1) = ln 3
    x = np.full((1, 2, 1), 2.0, np.float32)
    dt = np.full((1, 2, 1), np.log(np.exp(ln3) - 1), np.float32)
    A = -np.ones((1, 1), np.float32)
    B, C = np.full((2, 1, 2, 1, 1), 0.5, np.float32)
    h0 = np.full((1, 1, 1), 3.0, np.float32)
    y, h = forward("reference", dict(x=x, dt=dt, A=A, B=B, C=C, initial_state=h0))
    h1 = 3.0 / 3 + ln3 * 0.5 * 2
    h2 = h1 / 3 + ln3 * 0.5 * 2
    np.testing.assert_allclose(y[0, :, 0], [h1 / 2, h2 / 2], rtol=1e-6)
    np.testing.assert_allclose(h[0, 0, 0], h2, rtol=1e-6)


def test_reference_gradients_are_the_differences(
    make_segments, numpy_selective_scan, directional_errors
):
    inputs, ids, cotangents = case("gqa_packed", make_segments)
    _, gradients = pull_back("reference", inputs, ids, cotangents)
    errors = directional_errors(
        lambda i: numpy_selective_scan(**i, segment_ids=ids),
        gradients,
        inputs,
        cotangents,
        np.random.default_rng(2),
    )
    assert set(errors) == set(inputs)
    assert max(errors.values()) < 1e-5, errors


def test_no_array_of_all_states():
    """[B, L, E, N] exists neither forward nor backward, but in the reference."""
    shape = shapes.Shape(2, 512, 32, 16, 1, 2)
    inputs, (dy, dh) = make_inputs(shape)
    (low, dy), _ = rounded(inputs, dy)
    largest = {}
    for name in api.IMPLEMENTATIONS:
        traced = pull_back.trace(name, low, None, (dy, dh))
        largest[name] = jaxprs.largest(traced.jaxpr.jaxpr)
    states = shape.batch * shape.length * shape.d_inner * shape.d_state
    assert largest.pop("reference") >= states
    assert max(largest.values()) <= states / 2, largest


@pytest.mark.parametrize("implementation", OTHERS)
class TestEveryImplementation:
    @pytest.mark.parametrize("name", shapes.SMALL)
    def test_float32(self, implementation, name, make_segments, assert_tree_close):
        arguments = case(name, make_segments)
        expected = pull_back("reference", *arguments)
        assert_tree_close(pull_back(implementation, *arguments), expected, 1e-5)

    def test_bfloat16(self, implementation, make_segments, assert_tree_close):
        inputs, ids, (dy, dh) = case("gqa_packed", make_segments)
        (low, dy), (up, up_dy) = rounded(inputs, dy)
        outputs, gradients = pull_back(implementation, low, ids, (dy, dh))
        expected = pull_back("reference", up, ids, (up_dy, dh))
        assert_tree_close((outputs, gradients), expected, 1e-2)
        assert outputs[0].dtype == jnp.bfloat16 and outputs[1].dtype == jnp.float32
        assert all(gradients[k].dtype == low[k].dtype for k in low)

    def test_steps_of_any_size(self, implementation, make_segments, assert_tree_close):
        inputs, ids, cotangents = case("gqa_packed", make_segments)
        rng = np.random.default_rng(3)
        sizes = np.array([-1e9, -50.0, 0.0, 5.0, 1e3], np.float32)
        inputs["dt"] = rng.choice(sizes, inputs["dt"].shape)
        inputs["dt"][0, :2] = -1e9
        expected = pull_back("reference", inputs, ids, cotangents)
        assert_tree_close(
            pull_back(implementation, inputs, ids, cotangents), expected, 1e-5
        )

    def test_a_step_of_zero_keeps_the_state(self, implementation, assert_close):
        inputs, cotangents = make_inputs(shapes.SMALL["one_group"])
        inputs["dt"] = np.full_like(inputs["dt"], -1e9)
        (y, h), gradients = pull_back(implementation, inputs, None, cotangents)
        np.testing.assert_array_equal(h, inputs["initial_state"])
        np.testing.assert_array_equal(gradients["dt"], 0.0)
        assert all(np.isfinite(g).all() for g in gradients.values())

    def test_two_parts_are_the_whole(self, implementation, assert_tree_close):
        inputs, _ = make_inputs(shapes.SMALL["one_group"])
        whole = forward(implementation, inputs)
        y1, middle = forward(implementation, tokens(inputs, 0, 26))
        rest = tokens(inputs, 26, 63) | {"initial_state": middle}
        y2, final = forward(implementation, rest)
        joined = (np.concatenate([y1, y2], axis=1), final)
        assert_tree_close(joined, whole, 2e-6)

    def test_segments_are_separate_calls(self, implementation, assert_tree_close):
        inputs, _ = make_inputs(shapes.SMALL["one_group"])
        cuts = (0, 26, 27, 63)
        ids = np.repeat(np.array([[5, 2, 9]], np.int32), np.diff(cuts), axis=1)
        packed = forward(implementation, inputs, ids)
        parts = []
        for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
            part = tokens(inputs, start, stop)
            if start:
                part["initial_state"] = np.zeros_like(part["initial_state"])
            parts.append(forward(implementation, part))
        separate = (np.concatenate([y for y, _ in parts], axis=1), parts[-1][1])
        assert_tree_close(packed, separate, 2e-6)

    def test_vmap_and_remat(self, implementation, make_segments, assert_tree_close):
        inputs, ids, cotangents = case("gqa_packed", make_segments)
        shared = {"A", "D", "dt_bias"}

        def row(inputs, ids):
            inputs = {k: v if k in shared else v[None] for k, v in inputs.items()}
            scan = functools.partial(selective_scan, implementation=implementation)
            y, h = jax.checkpoint(scan)(**inputs, segment_ids=ids[None])
            return y[0], h[0]

        axes = ({k: None if k in shared else 0 for k in inputs}, 0)

        @quick_jit
        def mapped(inputs):
            rows = jax.vmap(row, in_axes=axes)
            outputs, vjp = jax.vjp(lambda i: rows(i, ids), inputs)
            return outputs, vjp(cotangents)[0]

        expected = pull_back(implementation, inputs, ids, cotangents)
        assert_tree_close(mapped(inputs), expected, 2e-6)


@pytest.mark.parametrize(
    ("groups", "tile"),
    [
        (3, pallas_triton.forward.ONE_WAVE),
        (3, pallas_triton.forward.WAVES),
        (6, pallas_triton.forward.NARROW),
    ],
    ids=["loads two groups ahead", "loads one group ahead", "groups of 8"],
)
def test_tiles_of_channels(monkeypatch, make_segments, assert_tree_close, groups, tile):
    """The kernels for tiles of 16 or 8 channels, 16 states and bfloat16, cut in time."""
    shape = shapes.Shape(1, 37, 48, 16, 1, groups, segments=3)
    monkeypatch.setattr(pallas_triton.forward, "ONE_WAVE", tile)
    monkeypatch.setattr(pallas_triton.kernels, "BLOCK", 8)
    monkeypatch.setattr(pallas_triton, "ENOUGH_WARPS", 8)
    planned = []
    plan_of = pallas_triton.forward.tile_plan

    def tile_plan(plan, dtypes):
        planned.append(plan_of(plan, dtypes))
        return planned[-1]

    monkeypatch.setattr(pallas_triton.forward, "tile_plan", tile_plan)
    inputs, _ = make_inputs(shape)
    ids = make_segments(
        np.random.default_rng(1), shape.batch, shape.length, shape.segments
    )
    low = {
        k: jnp.asarray(v, jnp.bfloat16) if k in BF16_INPUTS else v
        for k, v in inputs.items()
    }
    # Not `forward`: a program compiled before would not be planned again.
    found = quick_jit(
        functools.partial(selective_scan, implementation="pallas_triton")
    )(**low, segment_ids=ids)
    up = {k: np.asarray(v).astype(np.float32) for k, v in low.items()}
    assert_tree_close(found, forward("reference", up, ids), 1e-2)
    assert [(plan.chunks, plan.tile) for plan in planned] == [(3, tile)]


@pytest.mark.parametrize(
    ("every", "layout"),
    [
        (64, pallas_triton.fragments.Layout(warps=16, apart=4)),
        (64, pallas_triton.fragments.Layout(warps=16, apart=2)),
        (4, pallas_triton.fragments.LAYOUT),
        (2, pallas_triton.fragments.LAYOUT),
    ],
    ids=["first walk", "first walk, every second", "every fourth", "every second"],
)
def test_gradients_of_tiles_of_channels(
    monkeypatch, make_segments, assert_tree_close, every, layout
):
    """The backward kernel in matrix fragments, over chunks of time and a ragged end."""
    shape = shapes.Shape(1, 37, 48, 16, 1, 3, segments=3)
    monkeypatch.setattr(pallas_triton, "ENOUGH_WARPS", 8)
    monkeypatch.setattr(pallas_triton.fragments, "LAYOUT", layout)
    inputs, (dy, dh) = make_inputs(shape)
    ids = make_segments(
        np.random.default_rng(1), shape.batch, shape.length, shape.segments
    )
    low = {
        k: jnp.asarray(v, jnp.bfloat16) if k in BF16_INPUTS else v
        for k, v in inputs.items()
    }
    dy = jnp.asarray(dy, jnp.bfloat16)
    # Not compiled by another case of this test: what it patches is not an argument.
    pull_back.clear_cache()
    found = pull_back("pallas_triton", low, ids, (dy, dh), every)
    up = {k: np.asarray(v).astype(np.float32) for k, v in low.items()}
    expected = pull_back("reference", up, ids, (np.asarray(dy).astype(np.float32), dh))
    assert_tree_close(found, expected, 1e-2)
    # The same programs with steps from none to huge, each exact in bfloat16.
    sizes = np.array([-(2.0**30), -50.0, 0.0, 5.0, 1e3], np.float32)
    dt = np.random.default_rng(3).choice(sizes, low["dt"].shape)
    low, up = low | {"dt": jnp.asarray(dt, jnp.bfloat16)}, up | {"dt": dt}
    found = pull_back("pallas_triton", low, ids, (dy, dh), every)
    expected = pull_back("reference", up, ids, (np.asarray(dy).astype(np.float32), dh))
    assert_tree_close(found, expected, 1e-2)


@pytest.mark.parametrize("name", api.IMPLEMENTATIONS)
def test_checkpoints_elsewhere_change_nothing(name, assert_tree_close):
    """4 states a channel fit no kernel that keeps more states."""
    inputs, ids, cotangents = case("one_token", lambda *_: None)
    expected = pull_back(name, inputs, ids, cotangents)
    found = pull_back(name, inputs, ids, cotangents, 2)
    assert_tree_close(found, expected, 0.0)


def test_refuses_other_checkpoints():
    inputs, _ = make_inputs(shapes.SMALL["batch_1"])
    message = "selective_scan: checkpoint_every is 8; it can be 64, 4, 2"
    with pytest.raises(ValueError, match=message):
        selective_scan(**inputs, checkpoint_every=8)


def test_softplus_and_gate_to_16_bits():
    """Relative to float64 for step sizes from 1e-13 to 80; the gate in absolute terms."""
    rough = pallas_triton.forward.rough
    v = np.linspace(-30.0, 80.0, 100_001, dtype=np.float32)
    plan = types.SimpleNamespace(interpret=True)
    steps, u = rough.softplus(jnp.asarray(v), plan)
    wide = v.astype(np.float64)
    np.testing.assert_allclose(steps, np.logaddexp(0.0, wide), rtol=2e-5)
    np.testing.assert_allclose(u, np.exp(-np.abs(wide)), rtol=2e-5, atol=1e-37)
    sigmoid = 1.0 / (1.0 + np.exp(-wide))
    np.testing.assert_allclose(rough.sigmoid(v, plan), sigmoid, atol=2.0**-12)
    error = np.abs(rough.silu(v, plan) - wide * sigmoid)
    assert np.all(error <= 2.0**-12 * np.abs(wide))


@pytest.mark.parametrize("length", [1, 63, 500])
def test_tiles_over_many_steps(monkeypatch, assert_tree_close, length):
    """Whole blocks of time, and a last one that is shorter."""
    monkeypatch.setattr(pallas_triton.kernels, "BLOCK", 64)
    inputs, (dy, _) = make_inputs(shapes.Shape(1, length, 16, 16, 1, 1))
    (low, _), (up, _) = rounded(inputs, dy)
    found = forward("pallas_triton", low)
    assert_tree_close(found, forward("reference", up), 1e-2)


def test_tiles_a_token_at_a_time(assert_tree_close):
    """Calls of one step in a loop, under vmap and remat, are one call of all steps."""
    inputs, (dy, dh) = make_inputs(shapes.Shape(2, 7, 16, 16, 1, 1))
    (low, dy), (up, up_dy) = rounded(inputs, dy)
    shared = {"A", "D", "dt_bias"}

    def row(inputs):
        fixed = {k: inputs[k] for k in shared}
        along = {k: inputs[k][:, None, None] for k in BF16_INPUTS}

        @jax.checkpoint
        def token(h, now):
            scan = functools.partial(selective_scan, implementation="pallas_triton")
            y, h = scan(**fixed, **now, initial_state=h)
            return h, y

        h, y = jax.lax.scan(token, inputs["initial_state"][None], along)
        return y[:, 0, 0], h[0]

    @quick_jit
    def mapped(inputs):
        axes = ({k: None if k in shared else 0 for k in inputs},)
        outputs, vjp = jax.vjp(jax.vmap(row, in_axes=axes), inputs)
        return outputs, vjp((dy, dh))[0]

    expected = pull_back("reference", up, None, (up_dy, dh))
    assert_tree_close(mapped(low), expected, 1e-2)
    (_, h), gradients = mapped(low | {"dt": jnp.full_like(low["dt"], -1e9)})
    np.testing.assert_array_equal(h, inputs["initial_state"])
    np.testing.assert_array_equal(gradients["dt"].astype(np.float32), 0.0)
    assert all(np.isfinite(g.astype(np.float32)).all() for g in gradients.values())


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("x", (2, 7), "x has shape (2, 7), expected [B L E]"),
        ("dt", (2, 7, 5), "dt has shape (2, 7, 5), expected [B L E] = (2, 7, 6)"),
        ("A", (5, 4), "A has shape (5, 4), expected [E N] = (6, 4)"),
        ("B", (2, 7, 3, 5), "B has shape (2, 7, 3, 5), expected [B L GB N]"),
        ("B", (2, 7, 4, 4), "B has 4 groups, which do not divide 6 channels"),
        ("C", (2, 6, 3, 4), "C has shape (2, 6, 3, 4), expected [B L GC N]"),
        ("D", (1,), "D has shape (1,), expected [E] = (6,)"),
        ("z", (2, 7, 1), "z has shape (2, 7, 1), expected [B L E]"),
        ("dt_bias", (7,), "dt_bias has shape (7,), expected [E] = (6,)"),
        ("initial_state", (2, 4, 6), "initial_state has shape (2, 4, 6), expected"),
        ("segment_ids", (7,), "segment_ids has shape (7,), expected [B L] = (2, 7)"),
    ],
)
def test_shape_errors(name, size, message):
    sizes = {"x": (2, 7, 6), "dt": (2, 7, 6), "A": (6, 4)}
    sizes |= {"B": (2, 7, 3, 4), "C": (2, 7, 3, 4), name: size}
    with pytest.raises(ValueError) as error:
        selective_scan(**{k: jnp.zeros(v) for k, v in sizes.items()})
    assert f"selective_scan: {message}" in str(error.value)


def test_dispatch(monkeypatch, caplog):
    def refuses(*args, **kwargs):
        raise dispatch.UnsupportedError("no such device")

    table = {"refuses": refuses, "reference": reference.selective_scan}
    monkeypatch.setattr(api, "IMPLEMENTATIONS", table)
    inputs, _ = make_inputs(shapes.SMALL["one_token"], options=False)
    dispatch._log_once.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            selective_scan(**inputs)
    lines = [
        r.getMessage() for r in caplog.records if "selective_scan" in r.getMessage()
    ]
    assert lines == [
        "selective_scan: running reference; refuses was passed over (no such device)"
    ]
    with pytest.raises(NotImplementedError, match="no such device"):
        selective_scan(**inputs, implementation="refuses")
    with pytest.raises(ValueError, match="'fast' is not one of refuses, reference"):
        selective_scan(**inputs, implementation="fast")
