"""Residual sum and norm: validation and choice of implementation."""

from jaxtyping import Array, Float

from pallas_kernels import checks, dispatch
from pallas_kernels.residual_norm import pallas_triton, reference, xla

IMPLEMENTATIONS = {
    "pallas_triton": pallas_triton.residual_norm,
    "xla": xla.residual_norm,
    "reference": reference.residual_norm,
}


def residual_norm(
    x: Float[Array, "B L D"],
    delta: Float[Array, "B L D"] | None,
    scale: Float[Array, " D"],
    *,
    eps: float,
    implementation: str | None = None,
) -> tuple[Float[Array, "B L D"], Float[Array, "B L D"]]:
    """Returns a residual stream after a layer, and its root-mean-square norm.

        sum = x + delta
        norm[d] = scale[d] * sum[d] / sqrt(mean over d of sum^2 + eps)

    Source: Llama (2302.13971), Sec. 2.2. Statistics are float32; as Llama does, the
    normalised value is rounded to the dtype of `x` before it is scaled.

    Args:
      x: The residual stream, any float dtype.
      delta: What a layer adds, in the dtype of `x`; None for nothing. The first result is
        then `x`: read it instead of `x`, and the gradients' sum is fused as well.
      scale: Per channel.
      eps: Added to the mean square.
      implementation: None for the fastest that runs here; a name for that one or an
        error.

    Returns:
      The sum and its norm, in x.dtype.

    Raises:
      ValueError: A shape or dtype disagrees, or the implementation is unknown.
      NotImplementedError: The named implementation does not run here.
    """
    op = "residual_norm"
    checks.check_rank(op, "x", x, "B L D")
    checks.check_shape(op, "delta", delta, "B L D", tuple(x.shape))
    checks.check_shape(op, "scale", scale, "D", (x.shape[2],))
    if delta is not None and delta.dtype != x.dtype:
        raise ValueError(f"{op}: delta is {delta.dtype}, x is {x.dtype}")
    return dispatch.run(op, IMPLEMENTATIONS, implementation, x, delta, scale, eps=eps)
