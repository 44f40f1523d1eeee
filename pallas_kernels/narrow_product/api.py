"""Product of a few tokens: validation and choice of implementation."""

from jaxtyping import Array, Float

from pallas_kernels import checks, dispatch
from pallas_kernels.narrow_product import pallas_triton, reference, xla

IMPLEMENTATIONS = {
    "pallas_triton": pallas_triton.narrow_product,
    "xla": xla.narrow_product,
    "reference": reference.narrow_product,
}


def is_kept_by_output(outputs: int, width: int) -> bool:
    """Whether a kernel of this size is best kept as [out, in], as it is needed here."""
    return not pallas_triton.is_large(outputs, width)


def narrow_product(
    x: Float[Array, "B L I"],
    kernel: Float[Array, "O I"],
    *,
    scale: Float[Array, " I"] | None = None,
    residual: Float[Array, "B L O"] | None = None,
    eps: float = 1e-5,
    implementation: str | None = None,
) -> Float[Array, "B L O"]:
    """Returns a linear map of tokens, of their norm if wanted, added to a residual stream.

        u[i] = scale[i] * x[i] / sqrt(mean(x^2) + eps)      (x itself without `scale`)
        out[o] = residual[o] + sum_i kernel[o, i] * u[i]

    Source: a pre-norm residual layer's first and last maps, with RMSNorm (1910.07467).
    Sums are float32; the map's result is rounded to the dtype of `x` before it is added.

    Args:
      x: Inputs, any float dtype; a few tokens, since each reads all the weights' tiles.
      kernel: Weights by output, so that what one output needs is contiguous.
      scale: Of the norm, per channel; None for no norm.
      residual: Added to the result, in the dtype of `x`.
      eps: Added to the mean square.
      implementation: None for the fastest that runs here; a name for that one or an
        error.

    Returns:
      The output in x.dtype.

    Raises:
      ValueError: A shape or dtype disagrees, or the implementation is unknown.
      NotImplementedError: The named implementation does not run here.
    """
    op = "narrow_product"
    checks.check_shapes(
        op,
        {
            "x": (x, "B L I"),
            "kernel": (kernel, "O I"),
            "scale": (scale, "I"),
            "residual": (residual, "B L O"),
        },
    )
    if residual is not None and residual.dtype != x.dtype:
        raise ValueError(f"{op}: residual is {residual.dtype}, x is {x.dtype}")
    return dispatch.run(
        op,
        IMPLEMENTATIONS,
        implementation,
        x,
        kernel,
        scale=scale,
        residual=residual,
        eps=eps,
    )
