"""Norm, product and gate in plain XLA."""

import jax
import jax.numpy as jnp


def gated_product(h, scale, kernel, *, eps):
    """Returns the output; see `api.gated_product` for the arguments."""
    wide = h.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normed = (wide * jax.lax.rsqrt(mean_square + eps)).astype(h.dtype)
    u = normed * jnp.broadcast_to(scale.astype(h.dtype), h.shape)
    gate, up = jnp.split(u @ kernel.astype(h.dtype), 2, axis=-1)
    return jax.nn.silu(gate) * up
