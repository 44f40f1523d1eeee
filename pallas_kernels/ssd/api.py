"""The SSD scan of Mamba-2: validation and choice of implementation."""

from jaxtyping import Array, Float, Int

from pallas_kernels import checks, dispatch
from pallas_kernels.ssd import chunked, pallas_triton, reference

IMPLEMENTATIONS = {
    "pallas_triton": pallas_triton.ssd,
    "xla_chunked": chunked.ssd,
    "reference": reference.ssd,
}


def ssd(
    x: Float[Array, "B L K P"],
    dt: Float[Array, "B L H"],
    A: Float[Array, " H"],
    B: Float[Array, "B L K N"],
    C: Float[Array, "B L H N"],
    *,
    D: Float[Array, " H"] | None = None,
    dt_bias: Float[Array, " H"] | None = None,
    initial_state: Float[Array, "B H N P"] | None = None,
    segment_ids: Int[Array, "B L"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B L H P"], Float[Array, "B H N P"]]:
    """Returns the outputs of Mamba-2's recurrence and the state after the last token.

    With d_t = softplus(dt_t + dt_bias) and k = h // (H // K) the kv group of head h:

        S_t[h] = exp(d_t[h] A[h]) S_{t-1}[h] + d_t[h] B_t[k] (outer) x_t[k]      [N, P]
        y_t[h] = C_t[h]^T S_t[h] + D[h] x_t[k]                                   [P]

    Source: Mamba-2 (2405.21060) Sec. 2.2 and Sec. 6 (the block decomposition), with
    grouped x and B as in The Mamba in the Llama (2408.15237). The state, the decays and
    the sums are float32 whatever the input dtype; a term without its argument (D, ...)
    is left out.

    Args:
      x: Inputs of the kv groups, not repeated, any float dtype.
      dt: Raw step sizes: before the bias and the softplus.
      A: Continuous-time decay rates, negative, float32.
      B: Input maps of the kv groups, not repeated.
      C: Output maps of the heads.
      D: Skip weights.
      dt_bias: Added to `dt` before the softplus.
      initial_state: State before the first token, float32; zeros if None.
      segment_ids: The state restarts from zero where the id differs from the token
        before. The first token always continues `initial_state`. An id does not recur
        in a row after another one.
      implementation: None for the fastest that runs here; a name for that one or an
        error.

    Returns:
      y in x.dtype and the final state in float32.

    Raises:
      ValueError: A shape disagrees, or the implementation's name is unknown.
      NotImplementedError: The named implementation does not run here.
    """
    op = "ssd"
    sizes = checks.check_shapes(op, {"x": (x, "B L K P"), "dt": (dt, "B L H")})
    checks.check_groups(op, "x", sizes["K"], sizes["H"])
    checks.check_shapes(
        op,
        {
            "B": (B, "B L K N"),
            "A": (A, "H"),
            "C": (C, "B L H N"),
            "D": (D, "H"),
            "dt_bias": (dt_bias, "H"),
            "initial_state": (initial_state, "B H N P"),
            "segment_ids": (segment_ids, "B L"),
        },
        sizes,
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
        dt_bias=dt_bias,
        initial_state=initial_state,
        segment_ids=segment_ids,
    )
