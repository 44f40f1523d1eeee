"""The residual sum and its norm as plain JAX."""

import jax
import jax.numpy as jnp


def residual_norm(x, delta, scale, *, eps):
    """Returns (sum, norm); see `api.residual_norm` for the arguments."""
    total = x if delta is None else x + delta
    wide = total.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normed = (wide * jax.lax.rsqrt(mean_square + eps)).astype(x.dtype)
    return total, normed * scale.astype(x.dtype)[None, None, :]
