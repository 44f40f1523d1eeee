"""Attention to a cache with all scores at once, float32; the definition of truth."""

import jax
import jax.numpy as jnp

from pallas_kernels.cached_attention import rotation


def cached_attention(q, k, v, lengths, *, sliding_window):
    """Returns the outputs; see `api.cached_attention` for the arguments."""
    f32 = jnp.float32
    batch, tokens, heads, width = q.shape
    groups = k.shape[2]
    position = rotation.next_positions(lengths, tokens)
    slot = jnp.arange(k.shape[1], dtype=jnp.int32)[None, None, :]
    visible = slot <= position[:, :, None]
    if sliding_window is not None:
        visible &= slot > position[:, :, None] - sliding_window
    grouped = q.astype(f32).reshape(batch, tokens, groups, heads // groups, width)
    scores = jnp.einsum("btkgp,bskp->bkgts", grouped, k.astype(f32)) * width**-0.5
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    y = jnp.einsum("bkgts,bskp->btkgp", weights, v.astype(f32)).reshape(q.shape)
    return y.astype(q.dtype)


def rotate_and_append(qkv, k, v, lengths, frequencies):
    """Returns (q, k, v), one token at a time; see `api.rotate_and_append`."""
    positions = rotation.next_positions(lengths, qkv.shape[1])
    angles = rotation.cos_and_sin(positions, frequencies)
    q, new_k, new_v = rotation.split_heads(qkv, *k.shape[2:])
    q, new_k = (rotation.rotate(a, *angles) for a in (q, new_k))
    row = jnp.arange(qkv.shape[0], dtype=jnp.int32)
    for t in range(qkv.shape[1]):
        at = positions[:, t]
        k = k.at[row, at].set(new_k[:, t].astype(k.dtype))
        v = v.at[row, at].set(new_v[:, t].astype(v.dtype))
    return q, k, v
