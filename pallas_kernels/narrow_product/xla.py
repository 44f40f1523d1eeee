"""Norm, product and residual sum in plain XLA."""

import jax

from pallas_kernels.norms import rms_norm


def narrow_product(x, kernel, *, scale, residual, eps):
    """Returns the output; see `api.narrow_product` for the arguments."""
    if scale is not None:
        x = rms_norm(x, scale, eps)
    out = jax.lax.dot_general(x, kernel.astype(x.dtype), (((2,), (1,)), ((), ())))
    return out if residual is None else residual + out
