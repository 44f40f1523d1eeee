"""MultiStep: every implementation against the scans' recurrences in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu
from pallas_kernels.multi_step import (
    Columns,
    Pending,
    api,
    conv_multi_step,
    selective_multi_step,
    shapes,
    ssd_multi_step,
)

SELECTIVE = list(api.SELECTIVE_IMPLEMENTATIONS)
SSD = list(api.SSD_IMPLEMENTATIONS)

# Compiling dominates these tests: their programs run for a millisecond.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


pytestmark = pytest.mark.usefixtures("interpreted")


def make_selective(shape, seed=0):
    """state, pending, and the new tokens' arguments by name."""
    rng = np.random.default_rng(seed)

    def normal(*size):
        return rng.standard_normal(size).astype(np.float32)

    slots, (b, t, e, n, B_groups, C_groups, *_) = shape
    pending = Pending(normal(b, slots, e), normal(b, slots, e), None)
    pending = pending._replace(B=normal(b, slots, B_groups, n))
    return {
        "state": normal(b, e, n),
        "pending": pending,
        "x": normal(b, t, e),
        "dt": normal(b, t, e),
        "A": -np.exp(normal(e, n)),
        "B": normal(b, t, B_groups, n),
        "C": normal(b, t, C_groups, n),
        "D": normal(e),
        "z": normal(b, t, e),
        "dt_bias": normal(e),
    }


def make_ssd(shape, seed=0):
    """state, pending, and the new tokens' arguments by name."""
    rng = np.random.default_rng(seed)

    def normal(*size):
        return rng.standard_normal(size).astype(np.float32)

    slots, (b, t, k, h, p, n, _) = shape
    pending = Pending(normal(b, slots, k, p), normal(b, slots, h), None)
    pending = pending._replace(B=normal(b, slots, k, n))
    return {
        "state": normal(b, h, n, p),
        "pending": pending,
        "x": normal(b, t, k, p),
        "dt": normal(b, t, h),
        "A": -np.exp(normal(h)),
        "B": normal(b, t, k, n),
        "C": normal(b, t, h, n),
        "D": normal(h),
        "dt_bias": normal(h),
    }


def expected_outputs(scan, inputs, num_pending):
    """Row by row: scan the accepted prefix, then the new tokens."""
    rows = []
    for b, count in enumerate(num_pending):
        row = {
            k: v[b : b + 1] if k in ("x", "dt", "B", "C", "z") else v
            for k, v in inputs.items()
            if k not in ("state", "pending") and v is not None
        }
        state = inputs["state"][b : b + 1].astype(np.float64)
        if count:
            x, dt, B = (v[b : b + 1, :count] for v in inputs["pending"])
            shared = {k: row[k] for k in ("A", "dt_bias") if k in row}
            C = np.zeros((1, count, *inputs["C"].shape[2:]))
            _, state = scan(x=x, dt=dt, B=B, C=C, **shared, initial_state=state)
        y, _ = scan(**row, initial_state=state)
        rows.append((y, state))
    return tuple(np.concatenate(parts) for parts in zip(*rows, strict=True))


def check_patterns(step, scan, make, shape, assert_tree_close):
    inputs = make(shape)
    slots, batch = shape.slots, shape.mixer.batch
    step = quick_jit(step)
    for counts in itertools.product(range(slots + 1), repeat=batch):
        outputs = step(num_pending=jnp.asarray(counts, jnp.int32), **inputs)
        expected = expected_outputs(scan, inputs, counts)
        assert_tree_close(outputs, expected, 2e-6)
    low, high = [[c] * batch for c in (-2, slots + 5)]
    for counts, clamped in ((low, [0] * batch), (high, [slots] * batch)):
        outputs = step(num_pending=jnp.asarray(counts, jnp.int32), **inputs)
        expected = expected_outputs(scan, inputs, clamped)
        assert_tree_close(outputs, expected, 2e-6)


@pytest.mark.parametrize("implementation", SELECTIVE)
@pytest.mark.parametrize("name", shapes.SMALL)
def test_selective_patterns(
    name, implementation, numpy_selective_scan, assert_tree_close
):
    step = functools.partial(selective_multi_step, implementation=implementation)
    shape = shapes.SMALL[name]
    check_patterns(step, numpy_selective_scan, make_selective, shape, assert_tree_close)


@pytest.mark.parametrize("implementation", SSD)
@pytest.mark.parametrize("name", shapes.SMALL_SSD)
def test_ssd_patterns(name, implementation, numpy_ssd, assert_tree_close):
    step = functools.partial(ssd_multi_step, implementation=implementation)
    shape = shapes.SMALL_SSD[name]
    check_patterns(step, numpy_ssd, make_ssd, shape, assert_tree_close)


@pytest.mark.parametrize("implementation", SELECTIVE)
def test_selective_without_options(
    implementation, numpy_selective_scan, assert_tree_close
):
    inputs = make_selective(shapes.SMALL["decode"])
    inputs |= {"D": None, "z": None, "dt_bias": None}
    step = functools.partial(selective_multi_step, implementation=implementation)
    outputs = quick_jit(step)(num_pending=jnp.array([1], jnp.int32), **inputs)
    expected = expected_outputs(numpy_selective_scan, inputs, [1])
    assert_tree_close(outputs, expected, 2e-6)


MIXERS = [
    pytest.param(
        functools.partial(step, implementation=name), make, shape, id=f"{kind}-{name}"
    )
    for kind, step, make, shape, names in (
        (
            "selective",
            selective_multi_step,
            make_selective,
            shapes.Shape(3, shapes.SelectiveShape(2, 2, 24, 4, 2, 6)),
            SELECTIVE,
        ),
        (
            "ssd",
            ssd_multi_step,
            make_ssd,
            shapes.Shape(3, shapes.SSDShape(2, 2, 2, 6, 5, 4)),
            SSD,
        ),
    )
    for name in names
    if name != "reference"
]


@pytest.mark.parametrize(("step", "make", "shape"), MIXERS)
class TestBothMixers:
    def test_bfloat16(self, step, make, shape, assert_tree_close):
        inputs = make(shape)
        kept = ("state", "A", "D", "dt_bias")
        low = {
            k: v
            if k in kept
            else jax.tree.map(lambda v: jnp.asarray(v, jnp.bfloat16), v)
            for k, v in inputs.items()
        }
        up = jax.tree.map(lambda v: np.asarray(v).astype(np.float32), low)
        counts = jnp.array([1, 3], jnp.int32)
        y, state = quick_jit(step)(num_pending=counts, **low)
        reference = functools.partial(step, implementation="reference")
        expected = quick_jit(reference)(num_pending=counts, **up)
        assert_tree_close((y, state), expected, 1e-2)
        assert y.dtype == jnp.bfloat16 and state.dtype == jnp.float32

    def test_extreme_steps(self, step, make, shape, assert_tree_close):
        inputs = make(shape)
        pending = inputs["pending"]
        inputs["dt"] = np.where(inputs["dt"] > 0, 1e3, -1e9).astype(np.float32)
        dt = np.where(pending.dt > 0, 1e3, -1e9).astype(np.float32)
        inputs["pending"] = pending._replace(dt=dt)
        counts = jnp.array([2, 3], jnp.int32)
        outputs = quick_jit(step)(num_pending=counts, **inputs)
        reference = functools.partial(step, implementation="reference")
        expected = quick_jit(reference)(num_pending=counts, **inputs)
        assert_tree_close(outputs, expected, 1e-5)

    def test_steps_of_zero_keep_the_state(self, step, make, shape):
        inputs = make(shape)
        dt = np.full_like(inputs["pending"].dt, -1e9)
        inputs["pending"] = inputs["pending"]._replace(dt=dt)
        _, state = quick_jit(step)(num_pending=jnp.array([2, 3], jnp.int32), **inputs)
        np.testing.assert_array_equal(state, inputs["state"])

    def test_rows_that_are_not_active_change_nothing(
        self, step, make, shape, assert_close
    ):
        inputs = make(shape)
        run = quick_jit(step)
        counts = jnp.array([3, 2], jnp.int32)
        y, state = run(num_pending=counts, is_active=jnp.array([False, True]), **inputs)
        np.testing.assert_array_equal(y[0], np.zeros_like(y[0]))
        np.testing.assert_array_equal(state[0], inputs["state"][0])
        expected, after = run(num_pending=counts, **inputs)
        assert_close(y[1], expected[1], 1e-6)
        assert_close(state[1], after[1], 1e-6)

    def test_without_commit_the_state_stays(self, step, make, shape, assert_close):
        inputs = make(shape)
        counts = jnp.array([3, 1], jnp.int32)
        kept = quick_jit(functools.partial(step, commit=False))
        y, state = kept(num_pending=counts, **inputs)
        np.testing.assert_array_equal(state, inputs["state"])
        assert_close(y, quick_jit(step)(num_pending=counts, **inputs)[0], 1e-6)

    def test_errors(self, step, make, shape):
        inputs = make(shape)
        pending = inputs["pending"]
        good = jnp.array([1, 2], jnp.int32)
        with pytest.raises(ValueError, match=r"num_pending has shape \(3,\), expected"):
            step(num_pending=jnp.array([1, 2, 3]), **inputs)
        with pytest.raises(ValueError, match=r"is_active has shape \(1,\), expected"):
            step(num_pending=good, is_active=jnp.array([True]), **inputs)
        with pytest.raises(ValueError, match=r"pending.dt has shape \(2, 2, "):
            bad = inputs | {"pending": pending._replace(dt=pending.dt[:, :2])}
            step(num_pending=good, **bad)
        with pytest.raises(ValueError, match=r"state has shape \(1, "):
            step(num_pending=good, **(inputs | {"state": inputs["state"][:1]}))
        with pytest.raises(ValueError, match="'fast' is not one of"):
            step(num_pending=good, **inputs, implementation="fast")


def as_columns(arrays):
    """The arrays side by side among other columns, each as `Columns` of the whole."""
    batch, tokens = next(iter(arrays.values())).shape[:2]
    flat = [np.asarray(v).reshape(batch, tokens, -1) for v in arrays.values()]
    noise = np.full((batch, tokens, 3), 7.0, np.float32)
    whole = jnp.asarray(np.concatenate([noise, *flat, noise], axis=-1))
    starts = np.cumsum([3, *[v.shape[2] for v in flat]])
    return {
        name: Columns(whole, int(start), v.shape[2:])
        for (name, v), start in zip(arrays.items(), starts[:-1], strict=True)
    }


@pytest.mark.parametrize(("step", "make", "shape"), MIXERS)
def test_columns_and_logarithms(step, make, shape, assert_tree_close):
    inputs = make(shape)
    counts = jnp.array([3, 1], jnp.int32)
    expected = quick_jit(step)(num_pending=counts, **inputs)
    wide = as_columns({k: inputs[k] for k in ("x", "dt", "B", "C", "z") if k in inputs})
    wide["pending"] = Pending(**as_columns(inputs["pending"]._asdict()))
    wide["A"] = np.log(-inputs["A"])
    of_logarithm = functools.partial(step, A_is_log=True)
    found = quick_jit(of_logarithm)(num_pending=counts, **(inputs | wide))
    assert_tree_close(found, expected, 1e-6)


@pytest.mark.parametrize(
    ("step", "make", "shape"),
    [
        # Channels, states, heads' columns and tokens that fill no block.
        (
            selective_multi_step,
            make_selective,
            shapes.Shape(4, shapes.SelectiveShape(5, 3, 42, 16, 3, 1)),
        ),
        (
            ssd_multi_step,
            make_ssd,
            shapes.Shape(4, shapes.SSDShape(5, 2, 2, 4, 40, 20)),
        ),
    ],
)
@pytest.mark.parametrize("implementation", ["pallas_triton", "xla"])
def test_blocks_that_are_not_full(step, make, shape, implementation, assert_tree_close):
    inputs = make(shape)
    counts = jnp.array([4, 0, 2, 3, 1], jnp.int32)
    found = quick_jit(functools.partial(step, implementation=implementation))
    expected = quick_jit(functools.partial(step, implementation="reference"))
    assert_tree_close(
        found(num_pending=counts, **inputs),
        expected(num_pending=counts, **inputs),
        1e-5,
    )


def test_kernels_pass_over_what_they_cannot_run(monkeypatch):
    inputs = make_selective(shapes.SMALL["decode"])
    counts = jnp.array([1], jnp.int32)
    name = {"implementation": "pallas_triton"}
    long = jax.tree.map(lambda v: np.repeat(v, 50, axis=1), inputs["pending"])
    with pytest.raises(NotImplementedError, match="51 tokens are more than 40"):
        selective_multi_step(num_pending=counts, **(inputs | {"pending": long}), **name)
    monkeypatch.setattr(gpu, "INTERPRET", False)
    with pytest.raises(NotImplementedError, match="needs a CUDA GPU, this is a cpu"):
        selective_multi_step(num_pending=counts, **inputs, **name)
    y, _ = selective_multi_step(num_pending=counts, **inputs)
    assert np.isfinite(y).all()


CONV = {
    # batch, slots, tokens, channels, repeats, group, taps
    "decode": (2, 1, 1, 5, 1, 5, 4),
    "no_slots": (1, 0, 3, 6, 1, 6, 3),
    "repeated": (2, 3, 2, 36, 3, 4, 4),
}


def make_conv(batch, slots, tokens, channels, repeats, group, taps, dtype=np.float32):
    rng = np.random.default_rng(0)

    def normal(*size):
        return rng.standard_normal(size).astype(dtype)

    return {
        "window": normal(batch, taps - 1, channels),
        "pending": normal(batch, slots, channels),
        "x": normal(batch, tokens, channels),
        "kernel": normal(taps, channels * repeats),
        "bias": normal(channels * repeats),
    }


@pytest.mark.parametrize("implementation", api.CONV_IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CONV)
def test_conv_patterns(
    name, implementation, numpy_causal_conv, assert_close, assert_tree_close
):
    batch, slots, _, channels, repeats, group, taps = CONV[name]
    inputs = make_conv(*CONV[name])
    step = quick_jit(
        functools.partial(conv_multi_step, group=group, implementation=implementation)
    )
    seen = np.concatenate([inputs["window"], inputs["pending"]], axis=1)
    for counts in itertools.product(range(-1, slots + 2), repeat=batch):
        y, window = step(num_pending=jnp.asarray(counts, jnp.int32), **inputs)
        kept = np.clip(counts, 0, slots)
        moved = np.stack(
            [row[k : k + taps - 1] for row, k in zip(seen, kept, strict=True)]
        )
        assert_close(window, moved, 0)

        def repeat(value):
            groups = np.split(value, channels // group, axis=-1)
            return np.concatenate([g for g in groups for _ in range(repeats)], axis=-1)

        expected = numpy_causal_conv(
            repeat(inputs["x"]),
            inputs["kernel"],
            inputs["bias"],
            initial_window=repeat(moved),
            activation="silu",
        )
        assert_close(y, expected, 2e-6)


@pytest.mark.parametrize("implementation", ["pallas_triton", "xla"])
class TestConv:
    def test_bfloat16(self, implementation, assert_tree_close):
        low = make_conv(*CONV["repeated"], dtype=jnp.bfloat16)
        up = {k: v.astype(np.float32) for k, v in low.items()}
        counts = jnp.array([1, 3], jnp.int32)
        step, exact = (
            quick_jit(
                functools.partial(
                    conv_multi_step, num_pending=counts, group=4, implementation=name
                )
            )
            for name in (implementation, "reference")
        )
        y, window = step(**low)
        assert_tree_close((y, window), exact(**up), 1e-2)
        assert y.dtype == window.dtype == jnp.bfloat16

    def test_rows_that_are_not_active_and_commit(self, implementation):
        inputs = make_conv(*CONV["repeated"])
        counts = jnp.array([1, 3], jnp.int32)
        step = jax.jit(
            functools.partial(
                conv_multi_step,
                num_pending=counts,
                group=4,
                implementation=implementation,
            ),
            static_argnames="commit",
        )
        y, window = step(**inputs, is_active=jnp.array([True, False]))
        expected, moved = step(**inputs)
        np.testing.assert_array_equal(y[0], expected[0])
        np.testing.assert_array_equal(window[0], moved[0])
        np.testing.assert_array_equal(y[1], np.zeros_like(y[1]))
        np.testing.assert_array_equal(window[1], inputs["window"][1])
        y, window = step(**inputs, commit=False)
        np.testing.assert_array_equal(y, expected)
        np.testing.assert_array_equal(window, inputs["window"])


@pytest.mark.parametrize("implementation", api.CONV_IMPLEMENTATIONS)
def test_conv_in_parts(implementation, assert_close):
    inputs = make_conv(2, 1, 3, 80, 1, 80, 4)
    step = functools.partial(
        conv_multi_step,
        num_pending=jnp.array([0, 1], jnp.int32),
        is_active=jnp.array([False, True]),
        implementation=implementation,
    )
    whole, window = quick_jit(step)(**inputs)
    inputs |= as_columns({"x": inputs["x"]}) | as_columns(
        {"pending": inputs["pending"]}
    )
    in_parts = functools.partial(step, splits=(10, 40, 30))
    parts, same = quick_jit(in_parts)(**inputs)
    assert [part.shape[-1] for part in parts] == [10, 40, 30]
    assert_close(np.concatenate(parts, axis=-1), whole, 1e-6)
    np.testing.assert_array_equal(window, same)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"splits": (100, 9)}, "splits (100, 9) do not add up to 108"),
        ({"window": jnp.ones((2, 2, 36))}, "window has shape (2, 2, 36), expected"),
        (
            {"kernel": jnp.ones((4, 100))},
            "bias has shape (108,), expected [F] = (100,)",
        ),
        ({"group": 5}, "group is 5, which does not divide the 36 channels of x"),
        (
            {"kernel": jnp.ones((4, 40)), "bias": jnp.ones(40)},
            "kernel has 40 channels, no multiple of the 36 of x",
        ),
    ],
)
def test_conv_errors(changes, message):
    inputs = make_conv(*CONV["repeated"]) | {"group": 4} | changes
    with pytest.raises(ValueError) as error:
        conv_multi_step(num_pending=jnp.array([1, 2], jnp.int32), **inputs)
    assert f"conv_multi_step: {message}" in str(error.value)
