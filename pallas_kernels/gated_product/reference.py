"""Norm, product and gate one token at a time, float32."""

import jax
import jax.numpy as jnp


def gated_product(h, scale, kernel, *, eps):
    """Returns the output; see `api.gated_product` for the arguments."""
    f32 = jnp.float32
    scale, kernel = scale.astype(f32), kernel.astype(f32)

    def token(h):
        u = scale * h / jnp.sqrt(jnp.mean(h * h) + eps)
        both = jnp.sum(u[:, None] * kernel, axis=0)
        gate, up = jnp.split(both, 2)
        return gate / (1.0 + jnp.exp(-gate)) * up

    rows = h.astype(f32).reshape(-1, h.shape[2])
    _, out = jax.lax.scan(lambda carry, row: (carry, token(row)), None, rows)
    return out.reshape(*h.shape[:2], -1).astype(h.dtype)
