"""The norm that operations in plain JAX and models share."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*B D"], scale: Float[Array, " D"], eps: float
) -> Float[Array, "*B D"]:
    """Returns `x / sqrt(mean(x^2) + eps) * scale` in the dtype of `x`.

    Source: RMSNorm (1910.07467). Statistics are float32; as Llama does, the normalised
    value is rounded to the dtype of `x` before it is scaled.
    """
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normed = (wide * jax.lax.rsqrt(mean_square + eps)).astype(x.dtype)
    return normed * jnp.broadcast_to(scale.astype(x.dtype), x.shape)
