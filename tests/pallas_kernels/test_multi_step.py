"""MultiStep: every implementation against the scans' recurrences in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.multi_step import (
    Pending,
    api,
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


def make_selective(shape, seed=0):
    """state, pending, and the new tokens' arguments by name."""
    rng = np.random.default_rng(seed)

    def normal(*size):
        return rng.standard_normal(size).astype(np.float32)

    slots, (b, t, e, n, B_groups, C_groups, _) = shape
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


@pytest.mark.parametrize(
    ("step", "make", "shape"),
    [
        (selective_multi_step, make_selective, shapes.SMALL["verify"]),
        (ssd_multi_step, make_ssd, shapes.SMALL_SSD["verify"]),
    ],
)
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

    def test_extreme_steps_are_finite(self, step, make, shape):
        inputs = make(shape)
        pending = inputs["pending"]
        inputs["dt"] = np.where(inputs["dt"] > 0, 1e3, -1e9).astype(np.float32)
        dt = np.where(pending.dt > 0, 1e3, -1e9).astype(np.float32)
        inputs["pending"] = pending._replace(dt=dt)
        outputs = quick_jit(step)(num_pending=jnp.array([2, 3], jnp.int32), **inputs)
        assert all(np.isfinite(v).all() for v in outputs)

    def test_steps_of_zero_keep_the_state(self, step, make, shape):
        inputs = make(shape)
        dt = np.full_like(inputs["pending"].dt, -1e9)
        inputs["pending"] = inputs["pending"]._replace(dt=dt)
        _, state = quick_jit(step)(num_pending=jnp.array([2, 3], jnp.int32), **inputs)
        np.testing.assert_array_equal(state, inputs["state"])

    def test_errors(self, step, make, shape):
        inputs = make(shape)
        pending = inputs["pending"]
        good = jnp.array([1, 2], jnp.int32)
        with pytest.raises(ValueError, match=r"num_pending has shape \(3,\), expected"):
            step(num_pending=jnp.array([1, 2, 3]), **inputs)
        with pytest.raises(ValueError, match=r"pending.dt has shape \(2, 2, "):
            bad = inputs | {"pending": pending._replace(dt=pending.dt[:, :2])}
            step(num_pending=good, **bad)
        with pytest.raises(ValueError, match=r"state has shape \(1, "):
            step(num_pending=good, **(inputs | {"state": inputs["state"][:1]}))
        with pytest.raises(ValueError, match="'fast' is not one of"):
            step(num_pending=good, **inputs, implementation="fast")
