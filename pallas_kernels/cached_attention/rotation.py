"""Rotary position embedding (RoFormer, 2104.09864) in the half-split form of Llama."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def next_positions(lengths: Int[Array, " B"], tokens: int) -> Int[Array, "B T"]:
    """Returns the positions of the tokens that follow `lengths` others."""
    step = jnp.arange(tokens, dtype=jnp.int32)
    return lengths.astype(jnp.int32)[:, None] + step[None, :]


def cos_and_sin(
    positions: Int[Array, "B T"], frequencies: Float[Array, " P/2"]
) -> tuple[Float[Array, "B T P/2"], Float[Array, "B T P/2"]]:
    """Returns both of position times frequency, float32."""
    positions = positions.astype(jnp.float32)
    angles = positions[:, :, None] * jnp.asarray(frequencies, jnp.float32)[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T H P"],
    cos: Float[Array, "B T P/2"],
    sin: Float[Array, "B T P/2"],
) -> Float[Array, "B T H P"]:
    """Returns x with its pairs (i, i + P/2) turned, computed in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def split_heads(
    qkv: Float[Array, "B T F"], groups: int, width: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns queries, keys and values by head."""
    heads = qkv.reshape(*qkv.shape[:2], -1, width)
    count = heads.shape[2]
    return tuple(jnp.split(heads, (count - 2 * groups, count - groups), axis=2))
