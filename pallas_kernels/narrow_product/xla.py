"""Norm, product and residual sum in plain XLA."""

import jax
import jax.numpy as jnp


def narrow_product(x, kernel, *, scale, residual, eps):
    """Returns the output; see `api.narrow_product` for the arguments."""
    if scale is not None:
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = (wide * jax.lax.rsqrt(mean_square + eps)).astype(x.dtype)
        x = normed * jnp.broadcast_to(scale.astype(x.dtype), x.shape)
    out = jax.lax.dot_general(x, kernel.astype(x.dtype), (((2,), (1,)), ((), ())))
    return out if residual is None else residual + out
