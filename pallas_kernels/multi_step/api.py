"""MultiStep for both mixers: validation and choice of implementation."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int

from pallas_kernels import checks, dispatch
from pallas_kernels.multi_step import reference, xla

SELECTIVE_IMPLEMENTATIONS = {
    "xla": xla.selective_multi_step,
    "reference": reference.selective_multi_step,
}
SSD_IMPLEMENTATIONS = {
    "xla": xla.ssd_multi_step,
    "reference": reference.ssd_multi_step,
}


class Pending(NamedTuple):
    """What the layer keeps of S tokens that the state has not yet absorbed.

    For Mamba-1: x [B, S, E] after the convolution, raw dt [B, S, E], B [B, S, GB, N].
    For Mamba-2: x [B, S, K, P], raw dt [B, S, H], B [B, S, K, N].
    """

    x: Float[Array, "B S ..."]
    dt: Float[Array, "B S channels"]
    B: Float[Array, "B S groups N"]


def selective_multi_step(
    state: Float[Array, "B E N"],
    pending: Pending,
    num_pending: Int[Array, " B"],
    x: Float[Array, "B T E"],
    dt: Float[Array, "B T E"],
    A: Float[Array, "E N"],
    B: Float[Array, "B T GB N"],
    C: Float[Array, "B T GC N"],
    *,
    D: Float[Array, " E"] | None = None,
    z: Float[Array, "B T E"] | None = None,
    dt_bias: Float[Array, " E"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T E"], Float[Array, "B E N"]]:
    """Returns the new tokens' outputs and the state after the pending tokens only.

    Implements MultiStep(h_i, y_1:n, i, j, k) of The Mamba in the Llama (2408.15237)
    Sec. 4.2, Alg. 2, with the recurrence of `selective_scan`: h_i = `state` takes the
    first `num_pending` pending tokens and becomes h_j; from h_j the T new tokens run
    and give y. The state after them, h_k, is not returned: the next call replays what
    was accepted.

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
      implementation: None for the fastest that runs here; a name for that one or an
        error.

    Returns:
      y in x.dtype and h_j in float32.

    Raises:
      ValueError: A shape disagrees, or the implementation's name is unknown.
      NotImplementedError: The named implementation does not run here.
    """
    op = "selective_multi_step"
    checks.check_rank(op, "x", x, "B T E")
    checks.check_rank(op, "A", A, "E N")
    checks.check_rank(op, "B", B, "B T GB N")
    checks.check_rank(op, "C", C, "B T GC N")
    checks.check_rank(op, "pending.x", pending.x, "B S E")
    batch, tokens, channels = x.shape
    groups, n = B.shape[2], A.shape[1]
    slots = pending.x.shape[1]
    for name, value, letters, expected in (
        ("state", state, "B E N", (batch, channels, n)),
        ("pending.x", pending.x, "B S E", (batch, slots, channels)),
        ("pending.dt", pending.dt, "B S E", (batch, slots, channels)),
        ("pending.B", pending.B, "B S GB N", (batch, slots, groups, n)),
        ("num_pending", num_pending, "B", (batch,)),
        ("dt", dt, "B T E", (batch, tokens, channels)),
        ("A", A, "E N", (channels, n)),
        ("B", B, "B T GB N", (batch, tokens, groups, n)),
        ("C", C, "B T GC N", (batch, tokens, C.shape[2], n)),
        ("D", D, "E", (channels,)),
        ("z", z, "B T E", (batch, tokens, channels)),
        ("dt_bias", dt_bias, "E", (channels,)),
    ):
        checks.check_shape(op, name, value, letters, expected)
    checks.check_groups(op, "B", groups, channels)
    checks.check_groups(op, "C", C.shape[2], channels)
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
    )


def ssd_multi_step(
    state: Float[Array, "B H N P"],
    pending: Pending,
    num_pending: Int[Array, " B"],
    x: Float[Array, "B T K P"],
    dt: Float[Array, "B T H"],
    A: Float[Array, " H"],
    B: Float[Array, "B T K N"],
    C: Float[Array, "B T H N"],
    *,
    D: Float[Array, " H"] | None = None,
    dt_bias: Float[Array, " H"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H N P"]]:
    """Returns the new tokens' outputs and the state after the pending tokens only.

    `selective_multi_step` (2408.15237 Sec. 4.2, Alg. 2) with the recurrence of `ssd`.

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
      implementation: None for the fastest that runs here; a name for that one or an
        error.

    Returns:
      y in x.dtype and h_j in float32.

    Raises:
      ValueError: A shape disagrees, or the implementation's name is unknown.
      NotImplementedError: The named implementation does not run here.
    """
    op = "ssd_multi_step"
    checks.check_rank(op, "x", x, "B T K P")
    checks.check_rank(op, "dt", dt, "B T H")
    checks.check_rank(op, "B", B, "B T K N")
    checks.check_rank(op, "pending.x", pending.x, "B S K P")
    batch, tokens, groups, width = x.shape
    heads, n = dt.shape[2], B.shape[3]
    slots = pending.x.shape[1]
    checks.check_groups(op, "x", groups, heads)
    for name, value, letters, expected in (
        ("state", state, "B H N P", (batch, heads, n, width)),
        ("pending.x", pending.x, "B S K P", (batch, slots, groups, width)),
        ("pending.dt", pending.dt, "B S H", (batch, slots, heads)),
        ("pending.B", pending.B, "B S K N", (batch, slots, groups, n)),
        ("num_pending", num_pending, "B", (batch,)),
        ("dt", dt, "B T H", (batch, tokens, heads)),
        ("A", A, "H", (heads,)),
        ("B", B, "B T K N", (batch, tokens, groups, n)),
        ("C", C, "B T H N", (batch, tokens, heads, n)),
        ("D", D, "H", (heads,)),
        ("dt_bias", dt_bias, "H", (heads,)),
    ):
        checks.check_shape(op, name, value, letters, expected)
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
    )
