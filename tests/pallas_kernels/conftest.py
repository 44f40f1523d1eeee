"""Shared by the kernel tests: comparison, and float64 recurrences to compare with.

The recurrences are NumPy loops over single steps and channels' groups, written from the
equations and sharing no code with the package.
"""

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import gpu


@pytest.fixture(autouse=True)
def strict_jax():
    """No silent promotion of dtypes or ranks."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def interpreted(monkeypatch):
    """Triton kernels run without a GPU, as plain JAX."""
    monkeypatch.setattr(gpu, "INTERPRET", True)


def _assert_close(actual, expected, tolerance, name="value"):
    """Relative error in norm; finite first, then shape, dtype, and a real reference."""
    got = np.asarray(actual)
    want = np.asarray(expected)
    assert got.shape == want.shape, f"{name}: shape {got.shape} is not {want.shape}"
    assert got.dtype in (np.float32, ml_dtypes.bfloat16), f"{name}: {got.dtype}"
    got, want = got.astype(np.float64), want.astype(np.float64)
    assert np.isfinite(got).all(), f"{name}: not finite"
    assert np.isfinite(want).all(), f"{name}: the reference is not finite"
    norm = np.linalg.norm(want)
    assert norm > 1e-6 * np.sqrt(want.size), f"{name}: the reference is about zero"
    error = np.linalg.norm(got - want) / norm
    assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


@pytest.fixture
def assert_close():
    return _assert_close


def _assert_tree_close(actual, expected, tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    leaves = jax.tree_util.tree_leaves_with_path(actual)
    for (path, got), want in zip(leaves, jax.tree.leaves(expected), strict=True):
        _assert_close(got, want, tolerance, jax.tree_util.keystr(path))


@pytest.fixture
def assert_tree_close():
    return _assert_tree_close


def _softplus(v):
    return np.logaddexp(np.asarray(v, np.float64), 0.0)


def _selective_scan(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, initial_state=None, segment_ids=None
):
    x, dt, A, B, C = (np.asarray(v, np.float64) for v in (x, dt, A, B, C))
    batch, length, channels = x.shape
    per_B, per_C = channels // B.shape[2], channels // C.shape[2]
    y = np.zeros_like(x)
    final = np.zeros((batch, channels, A.shape[1]))
    for b in range(batch):
        for e in range(channels):
            h = np.zeros(A.shape[1])
            if initial_state is not None:
                h = np.asarray(initial_state, np.float64)[b, e]
            for t in range(length):
                if segment_ids is not None and t > 0:
                    if segment_ids[b, t] != segment_ids[b, t - 1]:
                        h = np.zeros_like(h)
                step = _softplus(dt[b, t, e] + (0 if dt_bias is None else dt_bias[e]))
                h = np.exp(step * A[e]) * h + step * B[b, t, e // per_B] * x[b, t, e]
                y[b, t, e] = C[b, t, e // per_C] @ h
                if D is not None:
                    y[b, t, e] += D[e] * x[b, t, e]
                if z is not None:
                    gate = float(z[b, t, e])
                    y[b, t, e] *= gate / (1 + np.exp(-gate))
            final[b, e] = h
    return y, final


@pytest.fixture
def numpy_selective_scan():
    return _selective_scan


def _ssd(x, dt, A, B, C, D=None, dt_bias=None, initial_state=None, segment_ids=None):
    x, dt, A, B, C = (np.asarray(v, np.float64) for v in (x, dt, A, B, C))
    batch, length, groups, width = x.shape
    heads, state = C.shape[2:]
    y = np.zeros((batch, length, heads, width))
    final = np.zeros((batch, heads, state, width))
    for b in range(batch):
        for h in range(heads):
            k = h // (heads // groups)
            S = np.zeros((state, width))
            if initial_state is not None:
                S = np.asarray(initial_state, np.float64)[b, h]
            for t in range(length):
                if segment_ids is not None and t > 0:
                    if segment_ids[b, t] != segment_ids[b, t - 1]:
                        S = np.zeros_like(S)
                step = _softplus(dt[b, t, h] + (0 if dt_bias is None else dt_bias[h]))
                S = np.exp(step * A[h]) * S + step * np.outer(B[b, t, k], x[b, t, k])
                y[b, t, h] = C[b, t, h] @ S
                if D is not None:
                    y[b, t, h] += D[h] * x[b, t, k]
            final[b, h] = S
    return y, final


@pytest.fixture
def numpy_ssd():
    return _ssd


def _causal_conv(
    x, kernel, bias=None, initial_window=None, segment_ids=None, activation=None
):
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    past = kernel.shape[0] - 1
    y = np.zeros_like(x)
    for b, t in np.ndindex(*x.shape[:2]):
        for back in range(past + 1):
            source = t - back
            first = segment_ids is None or segment_ids[b, t] == segment_ids[b, 0]
            if source >= 0:
                inside = (
                    segment_ids is None or segment_ids[b, source] == segment_ids[b, t]
                )
                value = x[b, source] if inside else 0.0
            elif initial_window is not None and first:
                value = np.asarray(initial_window, np.float64)[b, past + source]
            else:
                value = 0.0
            y[b, t] += kernel[past - back] * value
    if bias is not None:
        y = y + np.asarray(bias, np.float64)
    if activation == "silu":
        y = y / (1 + np.exp(-y))
    return y


@pytest.fixture
def numpy_causal_conv():
    return _causal_conv


def _gated_norm(y, z, scale, groups, eps):
    y, z, scale = (np.asarray(v, np.float64) for v in (y, z, scale))
    out = np.zeros_like(y)
    width = scale.size // groups
    for b, t, g in np.ndindex(*y.shape[:2], groups):
        here = (b, t, slice(g * width, (g + 1) * width))
        gated = y[here] * z[here] * np.exp(-np.logaddexp(0.0, -z[here]))
        root_mean_square = np.sqrt(np.mean(gated**2) + eps)
        out[here] = gated / root_mean_square * scale[here[2]]
    return out


@pytest.fixture
def numpy_gated_norm():
    return _gated_norm


def _residual_norm(x, delta, scale, eps):
    x, delta, scale = (np.asarray(v, np.float64) for v in (x, delta, scale))
    total, out = x + delta, np.zeros_like(x)
    for b, t in np.ndindex(*x.shape[:2]):
        row = total[b, t]
        out[b, t] = scale * row / np.sqrt(row @ row / row.size + eps)
    return total, out


@pytest.fixture
def numpy_residual_norm():
    return _residual_norm


def _segments(rng, batch, length, count):
    """Ids of `count` runs in each row, cut at random; None for one run."""
    if count == 1:
        return None
    ids = np.zeros((batch, length), np.int32)
    for b in range(batch):
        for cut in rng.choice(np.arange(1, length), count - 1, replace=False):
            ids[b, cut:] += 1
    return ids + 3


@pytest.fixture
def make_segments():
    return _segments


def _directional_errors(function, pulled_back, inputs, cotangents, rng):
    """|<gradient, v> - central difference along v| for each input, relative."""

    def objective(inputs):
        outputs = function(inputs)
        return sum(
            float(np.sum(np.asarray(o, np.float64) * np.asarray(c, np.float64)))
            for o, c in zip(outputs, cotangents, strict=True)
        )

    inputs = {k: np.asarray(v, np.float64) for k, v in inputs.items()}
    errors = {}
    for name, value in inputs.items():
        direction = rng.standard_normal(value.shape)
        gradient = np.asarray(pulled_back[name], np.float64)
        # Along the gradient as well, so that the two numbers are not about zero.
        direction += gradient / np.linalg.norm(gradient) * np.sqrt(value.size)
        eps = 1e-5
        up = objective({**inputs, name: value + eps * direction})
        down = objective({**inputs, name: value - eps * direction})
        measured = (up - down) / (2 * eps)
        errors[name] = abs(np.sum(gradient * direction) - measured) / abs(measured)
    return errors


@pytest.fixture
def directional_errors():
    return _directional_errors


GPUS = {"sm_80": "NVIDIA A100-SXM4-80GB", "sm_90": "NVIDIA H200"}


@pytest.fixture(params=GPUS)
def lower_for_cuda(request):
    """Lowers a function for a GPU that need not be there; returns the program's text.

    Interpret mode accepts much that the compiler of kernels does not.
    """
    device = AbstractDevice(
        device_kind=GPUS[request.param], num_cores=None, platform="cuda"
    )

    def lower(function, *args, **kwargs):
        mesh = AbstractMesh((1,), ("x",), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            traced = jax.jit(function).trace(*args, **kwargs)
            return traced.lower(lowering_platforms=("cuda",)).as_text()

    return lower
