"""The selective scan of Mamba-1: validation and choice of implementation."""

from jaxtyping import Array, Float, Int

from pallas_kernels import checks, dispatch
from pallas_kernels.selective_scan import chunked, pallas_triton, reference

IMPLEMENTATIONS = {
    "pallas_triton": pallas_triton.selective_scan,
    "xla_chunked": chunked.selective_scan,
    "reference": reference.selective_scan,
}
# Steps between the states kept for the backward pass.
CHECKPOINTS = (64, 4, 2)


def selective_scan(
    x: Float[Array, "B L E"],
    dt: Float[Array, "B L E"],
    A: Float[Array, "E N"],
    B: Float[Array, "B L GB N"],
    C: Float[Array, "B L GC N"],
    *,
    D: Float[Array, " E"] | None = None,
    z: Float[Array, "B L E"] | None = None,
    dt_bias: Float[Array, " E"] | None = None,
    initial_state: Float[Array, "B E N"] | None = None,
    segment_ids: Int[Array, "B L"] | None = None,
    checkpoint_every: int = 64,
    implementation: str | None = None,
) -> tuple[Float[Array, "B L E"], Float[Array, "B E N"]]:
    """Returns the scan's outputs and the state after the last token.

    With d_t = softplus(dt_t + dt_bias) and g the group of channel e:

        h_t[e, n] = exp(d_t[e] A[e, n]) h_{t-1}[e, n] + d_t[e] B_t[g, n] x_t[e]
        y_t[e] = (sum_n C_t[g, n] h_t[e, n] + D[e] x_t[e]) * silu(z_t[e])

    Source: Mamba (2312.00752) Sec. 3.2, Eq. 2, with its simplified (Euler) rule for B;
    Alg. 1 of The Mamba in the Llama (2408.15237). The state, the decay and the sums are
    float32 whatever the input dtype; every term without its argument (D, z, ...) is
    left out.

    Args:
      x: Inputs, after the convolution, any float dtype.
      dt: Raw step sizes: before the bias and the softplus.
      A: Continuous-time decay rates, negative, float32.
      B: Input maps, not repeated: channel e reads group e // (E // GB).
      C: Output maps, not repeated: channel e reads group e // (E // GC).
      D: Skip weights.
      z: Gate, before its silu.
      dt_bias: Added to `dt` before the softplus.
      initial_state: State before the first token, float32; zeros if None.
      segment_ids: The state restarts from zero where the id differs from the token
        before. The first token always continues `initial_state`. An id does not recur
        in a row after another one.
      checkpoint_every: A memory hint, steps between the states kept for the backward
        pass: 64, or, for a faster one, 4 or 2, which takes N / 2 or N bytes a channel
        and step. Only `pallas_triton` on bfloat16 with N = 16 and groups of a multiple
        of 16 channels takes 4 and 2; all else keeps what it keeps for 64.
      implementation: None for the fastest that runs here; a name for that one or an
        error.

    Returns:
      y in x.dtype and the final state in float32.

    Raises:
      ValueError: A shape disagrees, `checkpoint_every` is no such number, or the
        implementation's name is unknown.
      NotImplementedError: The named implementation does not run here.
    """
    op = "selective_scan"
    checks.check_rank(op, "x", x, "B L E")
    checks.check_rank(op, "A", A, "E N")
    checks.check_rank(op, "B", B, "B L GB N")
    checks.check_rank(op, "C", C, "B L GC N")
    batch, length, channels = x.shape
    state = A.shape[1]
    for name, value, letters, expected in (
        ("dt", dt, "B L E", (batch, length, channels)),
        ("A", A, "E N", (channels, state)),
        ("B", B, "B L GB N", (batch, length, B.shape[2], state)),
        ("C", C, "B L GC N", (batch, length, C.shape[2], state)),
        ("D", D, "E", (channels,)),
        ("z", z, "B L E", (batch, length, channels)),
        ("dt_bias", dt_bias, "E", (channels,)),
        ("initial_state", initial_state, "B E N", (batch, channels, state)),
        ("segment_ids", segment_ids, "B L", (batch, length)),
    ):
        checks.check_shape(op, name, value, letters, expected)
    checks.check_groups(op, "B", B.shape[2], channels)
    checks.check_groups(op, "C", C.shape[2], channels)
    if checkpoint_every not in CHECKPOINTS:
        known = ", ".join(map(str, CHECKPOINTS))
        raise ValueError(
            f"{op}: checkpoint_every is {checkpoint_every!r}; it can be {known}"
        )
    return dispatch.run(
        op,
        IMPLEMENTATIONS,
        implementation,
        x,
        dt,
        A,
        B,
        C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        initial_state=initial_state,
        segment_ids=segment_ids,
        checkpoint_every=checkpoint_every,
    )
