"""Gated norm: validation and choice of implementation."""

from jaxtyping import Array, Float

from pallas_kernels import checks, dispatch
from pallas_kernels.gated_norm import pallas_triton, reference, xla

IMPLEMENTATIONS = {
    "pallas_triton": pallas_triton.gated_norm,
    "xla": xla.gated_norm,
    "reference": reference.gated_norm,
}


def gated_norm(
    y: Float[Array, "B L E"],
    z: Float[Array, "B L E"],
    scale: Float[Array, " E"],
    *,
    groups: int,
    eps: float = 1e-5,
    implementation: str | None = None,
) -> Float[Array, "B L E"]:
    """Returns the root-mean-square norm of a gated value, one statistic per group.

        g = y * silu(z)
        out[e] = scale[e] * g[e] / sqrt(mean over e's group of g^2 + eps)

    Source: Mamba-2 (2405.21060) Sec. 7.2 and Fig. 6, with the heads as groups. Everything
    in between is float32 whatever the input dtype.

    Args:
      y: Outputs of the recurrence, any float dtype.
      z: The gate, before silu.
      scale: Per channel.
      groups: G equal runs of consecutive channels.
      eps: Added to the mean square.
      implementation: None for the fastest that runs here; a name for that one or an
        error.

    Returns:
      The output in y.dtype.

    Raises:
      ValueError: A shape disagrees, or the implementation is unknown.
      NotImplementedError: The named implementation does not run here.
    """
    op = "gated_norm"
    sizes = checks.check_shapes(
        op, {"y": (y, "B L E"), "z": (z, "B L E"), "scale": (scale, "E")}
    )
    checks.check_groups(op, "y", groups, sizes["E"])
    return dispatch.run(
        op, IMPLEMENTATIONS, implementation, y, z, scale, groups=groups, eps=eps
    )
