"""MultiStep for both mixers: validation and choice of implementation."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import checks, dispatch
from pallas_kernels.multi_step import columns, pallas_triton, reference, xla
from pallas_kernels.multi_step.columns import Columns


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function for callers who may pass `Columns` and the logarithm of A."""

    @functools.wraps(function)
    def call(state, pending, num_pending, x, dt, A, *maps, A_is_log, **options):
        A = -jnp.exp(A.astype(jnp.float32)) if A_is_log else A
        return function(state, pending, num_pending, x, dt, A, *maps, **options)

    return columns.copied(call)


SELECTIVE_IMPLEMENTATIONS = {
    "pallas_triton": pallas_triton.selective_multi_step,
    "xla": _plain(xla.selective_multi_step),
    "reference": _plain(reference.selective_multi_step),
}
SSD_IMPLEMENTATIONS = {
    "pallas_triton": pallas_triton.ssd_multi_step,
    "xla": _plain(xla.ssd_multi_step),
    "reference": _plain(reference.ssd_multi_step),
}
CONV_IMPLEMENTATIONS = {
    "pallas_triton": pallas_triton.conv_multi_step,
    "xla": columns.copied(xla.conv_multi_step),
    "reference": columns.copied(reference.conv_multi_step),
}


class Pending(NamedTuple):
    """What the layer keeps of S tokens that the state has not yet absorbed.

    For Mamba-1: x [B, S, E] after the convolution, raw dt [B, S, E], B [B, S, GB, N].
    For Mamba-2: x [B, S, K, P], raw dt [B, S, H], B [B, S, K, N].
    """

    x: Float[Array, "B S ..."] | Columns
    dt: Float[Array, "B S channels"] | Columns
    B: Float[Array, "B S groups N"] | Columns


def selective_multi_step(
    state: Float[Array, "B E N"],
    pending: Pending,
    num_pending: Int[Array, " B"],
    x: Float[Array, "B T E"] | Columns,
    dt: Float[Array, "B T E"] | Columns,
    A: Float[Array, "E N"],
    B: Float[Array, "B T GB N"] | Columns,
    C: Float[Array, "B T GC N"] | Columns,
    *,
    D: Float[Array, " E"] | None = None,
    z: Float[Array, "B T E"] | Columns | None = None,
    dt_bias: Float[Array, " E"] | None = None,
    A_is_log: bool = False,
    is_active: Bool[Array, " B"] | None = None,
    commit: bool = True,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T E"], Float[Array, "B E N"]]:
    """Returns the new tokens' outputs and the state after the pending tokens only.

    Implements MultiStep(h_i, y_1:n, i, j, k) of The Mamba in the Llama (2408.15237)
    Sec. 4.2, Alg. 2, with the recurrence of `selective_scan`: h_i = `state` takes the
    first `num_pending` pending tokens and becomes h_j; from h_j the T new tokens run
    and give y. The state after them, h_k, is not returned: the next call replays what
    was accepted.

    Arguments of tokens may be `Columns` of wider arrays.

    Args:
      state: State before the pending tokens, float32.
      pending: S tokens to replay, S >= 0.
      num_pending: How many of them each row replays, in [0, S]. Out of range is
        clamped: this is traced, so it cannot raise.
      x: New inputs, after the convolution, any float dtype.
      dt: Raw step sizes: before the bias and the softplus.
      A: Continuous-time decay rates, negative, float32.
      B: Input maps, not repeated: channel e reads group e // (E // GB).
      C: Output maps, not repeated: channel e reads group e // (E // GC).
      D: Skip weights.
      z: Gate, before its silu.
      dt_bias: Added to both `dt` before the softplus.
      A_is_log: Whether A holds log(-A), as models store it.
      is_active: Rows that take part, all if None. The others' y is zero and their state
        stays as it is; a kernel reads nothing else of them.
      commit: False to keep h_i: the second result is then `state` and nothing writes
        h_j.
      implementation: None for the fastest that runs here; a name for that one or an
        error.

    Returns:
      y in x.dtype and h_j, in float32.

    Raises:
      ValueError: A shape disagrees, or the implementation's name is unknown.
      NotImplementedError: The named implementation does not run here.
    """
    op = "selective_multi_step"
    sizes = checks.check_shapes(
        op,
        {
            "x": (x, "B T E"),
            "A": (A, "E N"),
            "B": (B, "B T GB N"),
            "C": (C, "B T GC N"),
            "pending.x": (pending.x, "B S E"),
            "pending.dt": (pending.dt, "B S E"),
            "pending.B": (pending.B, "B S GB N"),
            "state": (state, "B E N"),
            "num_pending": (num_pending, "B"),
            "is_active": (is_active, "B"),
            "dt": (dt, "B T E"),
            "D": (D, "E"),
            "z": (z, "B T E"),
            "dt_bias": (dt_bias, "E"),
        },
    )
    checks.check_groups(op, "B", sizes["GB"], sizes["E"])
    checks.check_groups(op, "C", sizes["GC"], sizes["E"])
    return dispatch.run(
        op,
        SELECTIVE_IMPLEMENTATIONS,
        implementation,
        state,
        pending,
        num_pending,
        x,
        dt,
        A,
        B,
        C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        A_is_log=A_is_log,
        is_active=is_active,
        commit=commit,
    )


def ssd_multi_step(
    state: Float[Array, "B H N P"],
    pending: Pending,
    num_pending: Int[Array, " B"],
    x: Float[Array, "B T K P"] | Columns,
    dt: Float[Array, "B T H"] | Columns,
    A: Float[Array, " H"],
    B: Float[Array, "B T K N"] | Columns,
    C: Float[Array, "B T H N"] | Columns,
    *,
    D: Float[Array, " H"] | None = None,
    dt_bias: Float[Array, " H"] | None = None,
    A_is_log: bool = False,
    is_active: Bool[Array, " B"] | None = None,
    commit: bool = True,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H N P"]]:
    """Returns the new tokens' outputs and the state after the pending tokens only.

    `selective_multi_step` (2408.15237 Sec. 4.2, Alg. 2) with the recurrence of `ssd`.

    Arguments of tokens may be `Columns` of wider arrays.

    Args:
      state: State before the pending tokens, float32.
      pending: S tokens to replay, S >= 0.
      num_pending: How many of them each row replays, in [0, S]. Out of range is
        clamped: this is traced, so it cannot raise.
      x: New inputs of the kv groups, not repeated, any float dtype.
      dt: Raw step sizes: before the bias and the softplus.
      A: Continuous-time decay rates, negative, float32.
      B: Input maps of the kv groups, not repeated.
      C: Output maps of the heads.
      D: Skip weights.
      dt_bias: Added to both `dt` before the softplus.
      A_is_log: Whether A holds log(-A), as models store it.
      is_active: Rows that take part, all if None. The others' y is zero and their state
        stays as it is; a kernel reads nothing else of them.
      commit: False to keep h_i: the second result is then `state` and nothing writes
        h_j.
      implementation: None for the fastest that runs here; a name for that one or an
        error.

    Returns:
      y in x.dtype and h_j, in float32.

    Raises:
      ValueError: A shape disagrees, or the implementation's name is unknown.
      NotImplementedError: The named implementation does not run here.
    """
    op = "ssd_multi_step"
    sizes = checks.check_shapes(op, {"x": (x, "B T K P"), "dt": (dt, "B T H")})
    checks.check_groups(op, "x", sizes["K"], sizes["H"])
    checks.check_shapes(
        op,
        {
            "B": (B, "B T K N"),
            "pending.x": (pending.x, "B S K P"),
            "pending.dt": (pending.dt, "B S H"),
            "pending.B": (pending.B, "B S K N"),
            "state": (state, "B H N P"),
            "num_pending": (num_pending, "B"),
            "is_active": (is_active, "B"),
            "A": (A, "H"),
            "C": (C, "B T H N"),
            "D": (D, "H"),
            "dt_bias": (dt_bias, "H"),
        },
        sizes,
    )
    return dispatch.run(
        op,
        SSD_IMPLEMENTATIONS,
        implementation,
        state,
        pending,
        num_pending,
        x,
        dt,
        A,
        B,
        C,
        D=D,
        dt_bias=dt_bias,
        A_is_log=A_is_log,
        is_active=is_active,
        commit=commit,
    )


def conv_multi_step(
    window: Float[Array, "B W-1 C"],
    pending: Float[Array, "B S C"] | Columns,
    num_pending: Int[Array, " B"],
    x: Float[Array, "B T C"] | Columns,
    kernel: Float[Array, "W F"],
    bias: Float[Array, " F"],
    *,
    group: int | None = None,
    splits: tuple[int, ...] | None = None,
    is_active: Bool[Array, " B"] | None = None,
    commit: bool = True,
    implementation: str | None = None,
) -> tuple[
    Float[Array, "B T F"] | tuple[Float[Array, "B T _"], ...], Float[Array, "B W-1 C"]
]:
    """Returns the new tokens after the short convolution and its window before them.

    The convolution's part of MultiStep (2408.15237 Sec. 4.2, Alg. 2): the window moves
    on over the first `num_pending` pending tokens; from there the T new ones run through
    `causal_conv` with its silu.

    `pending` and `x` may be `Columns` of wider arrays.

    Args:
      window: The W - 1 inputs before the pending tokens, the latest one last.
      pending: Inputs of S tokens since, S >= 0.
      num_pending: How many of them each row keeps, in [0, S]. Out of range is clamped:
        this is traced, so it cannot raise.
      x: Inputs of the new tokens.
      kernel: Taps; `kernel[W - 1]` multiplies the current token.
      bias: Added before the silu.
      group: Grouped-query expansion: each `group` channels of the inputs are repeated
        F / C times, consecutively. All of them if None.
      splits: Widths of parts that make up the F outputs; y is then a tuple of them.
      is_active: Rows that take part, all if None. The others' y is zero and their
        window stays as it is; a kernel reads nothing else of them.
      commit: False to keep the window: the second result is then `window`.
      implementation: None for the fastest that runs here; a name for that one or an
        error.

    Returns:
      y in x.dtype and the moved window in its own dtype.

    Raises:
      ValueError: A shape disagrees, or the implementation's name is unknown.
      NotImplementedError: The named implementation does not run here.
    """
    op = "conv_multi_step"
    sizes = checks.check_shapes(
        op, {"x": (x, "B T C"), "kernel": (kernel, "W F"), "bias": (bias, "F")}
    )
    sizes["W-1"] = sizes["W"] - 1
    rest = {
        "pending": (pending, "B S C"),
        "window": (window, "B W-1 C"),
        "num_pending": (num_pending, "B"),
        "is_active": (is_active, "B"),
    }
    checks.check_shapes(op, rest, sizes)
    channels, outputs = sizes["C"], sizes["F"]
    group = channels if group is None else group
    checks.check_group(op, group, channels)
    if outputs % channels:
        raise ValueError(
            f"{op}: kernel has {outputs} channels, no multiple of the {channels} of x"
        )
    if splits is not None and sum(splits) != outputs:
        raise ValueError(f"{op}: splits {splits} do not add up to {outputs}")
    return dispatch.run(
        op,
        CONV_IMPLEMENTATIONS,
        implementation,
        window,
        pending,
        num_pending,
        x,
        kernel,
        bias,
        group=group,
        splits=splits,
        is_active=is_active,
        commit=commit,
    )
