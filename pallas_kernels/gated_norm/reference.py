"""The gated norm one token at a time, float32."""

import jax
import jax.numpy as jnp


def gated_norm(y, z, scale, *, groups, eps):
    """Returns the output; see `api.gated_norm` for the arguments."""
    f32 = jnp.float32
    width = scale.shape[0] // groups

    def token(y, z):
        gated = (y * z / (1.0 + jnp.exp(-z))).reshape(groups, width)
        root = jnp.sqrt(jnp.sum(gated * gated, axis=1) / width + eps)
        return (gated / root[:, None]).reshape(-1) * scale.astype(f32)

    _, out = jax.lax.scan(
        lambda carry, row: (carry, token(*row)),
        None,
        tuple(v.astype(f32).reshape(-1, scale.shape[0]) for v in (y, z)),
    )
    return out.reshape(y.shape).astype(y.dtype)
