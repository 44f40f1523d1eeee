"""Norm, product and residual sum one token at a time, float32."""

import jax
import jax.numpy as jnp


def narrow_product(x, kernel, *, scale, residual, eps):
    """Returns the output; see `api.narrow_product` for the arguments."""
    f32 = jnp.float32
    kernel = kernel.astype(f32)

    def token(row):
        if scale is not None:
            row = scale.astype(f32) * row / jnp.sqrt(jnp.mean(row * row) + eps)
        return jnp.sum(kernel * row[None, :], axis=1)

    rows = x.astype(f32).reshape(-1, x.shape[2])
    _, out = jax.lax.scan(lambda carry, row: (carry, token(row)), None, rows)
    out = out.reshape(*x.shape[:2], -1)
    if residual is not None:
        out = residual.astype(f32) + out
    return out.astype(x.dtype)
