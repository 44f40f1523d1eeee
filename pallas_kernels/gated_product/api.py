"""Norm, product and gate: validation and choice of implementation."""

from jaxtyping import Array, Float

from pallas_kernels import checks, dispatch
from pallas_kernels.gated_product import pallas_triton, reference, xla

IMPLEMENTATIONS = {
    "pallas_triton": pallas_triton.gated_product,
    "xla": xla.gated_product,
    "reference": reference.gated_product,
}


def gated_product(
    h: Float[Array, "B L D"],
    scale: Float[Array, " D"],
    kernel: Float[Array, "D F2"],
    *,
    eps: float = 1e-5,
    implementation: str | None = None,
) -> Float[Array, "B L F"]:
    """Returns the hidden values of Llama's feed-forward layer.

        u[d] = scale[d] * h[d] / sqrt(mean(h^2) + eps)
        out = silu(u @ kernel[:, :F]) * (u @ kernel[:, F:])

    Source: SwiGLU (2002.05202) behind RMSNorm (1910.07467).

    Args:
      h: The residual stream, any float dtype.
      scale: Of the norm, per channel.
      kernel: The gate's and the other projection side by side.
      eps: Added to the mean square.
      implementation: None for the fastest that runs here; a name for that one or an
        error.

    Returns:
      The output in h.dtype.

    Raises:
      ValueError: A shape disagrees, or the implementation is unknown.
      NotImplementedError: The named implementation does not run here.
    """
    op = "gated_product"
    sizes = checks.check_shapes(
        op, {"h": (h, "B L D"), "scale": (scale, "D"), "kernel": (kernel, "D F2")}
    )
    if sizes["F2"] % 2:
        raise ValueError(f"{op}: kernel has {sizes['F2']} columns; 2 F are expected")
    return dispatch.run(op, IMPLEMENTATIONS, implementation, h, scale, kernel, eps=eps)
