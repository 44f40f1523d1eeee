"""Attention to a cache in plain JAX, in memory that does not grow with the cache.

A few tokens see all slots at once. Many walk over blocks of the slots that they can see,
with the running maximum and sum of Flash Attention (2205.14135), Alg. 1, so that there are
never more than a block's scores.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.cached_attention import rotation

# Scores (all heads of a row) that are computed at once, and the blocks of more.
MAX_SCORES = 1 << 24
BLOCK_TOKENS = 512
BLOCK_SLOTS = 512
# Below every score, but finite: what is subtracted from a row that has seen none.
LOWEST = -1e30


def cached_attention(q, k, v, lengths, *, sliding_window):
    """Returns the outputs; see `api.cached_attention` for the arguments."""
    tokens, heads = q.shape[1:3]
    lengths = lengths.astype(jnp.int32)
    if heads * tokens * k.shape[1] <= MAX_SCORES:
        return _at_once(q, k, v, lengths, sliding_window)
    return _by_blocks(q, k, v, lengths, sliding_window)


def rotate_and_append(qkv, k, v, lengths, frequencies):
    """Returns (q, k, v); see `api.rotate_and_append` for the arguments."""
    lengths = lengths.astype(jnp.int32)
    positions = rotation.next_positions(lengths, qkv.shape[1])
    angles = rotation.cos_and_sin(positions, frequencies)
    q, new_k, new_v = rotation.split_heads(qkv, *k.shape[2:])
    q, new_k = (rotation.rotate(a, *angles) for a in (q, new_k))

    def write(row, new, at):
        return lax.dynamic_update_slice_in_dim(row, new, at, axis=0)

    k, v = (
        jax.vmap(write)(old, new.astype(old.dtype), lengths)
        for old, new in ((k, new_k), (v, new_v))
    )
    return q, k, v


def _visible(position, slot, window):
    """Which slots each token sees, [B, T, S], from positions [B, T] and slots [S]."""
    ahead = position[:, :, None] - slot[None, None, :]
    visible = ahead >= 0
    return visible if window is None else visible & (ahead < window)


def _scores(q, k, visible):
    """Scaled scores in float32, [B, K, G, T, S]; minus infinity where not visible."""
    batch, tokens, heads, width = q.shape
    grouped = q.reshape(batch, tokens, k.shape[2], heads // k.shape[2], width)
    scores = jnp.einsum(
        "btkgp,bskp->bkgts", grouped, k, preferred_element_type=jnp.float32
    )
    return jnp.where(visible[:, None, None], scores * width**-0.5, -jnp.inf)


def _at_once(q, k, v, lengths, window):
    position = rotation.next_positions(lengths, q.shape[1])
    slot = jnp.arange(k.shape[1], dtype=jnp.int32)
    scores = _scores(q, k, _visible(position, slot, window))
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskp->btkgp", weights, v).reshape(q.shape)


def _by_blocks(q, k, v, lengths, window):
    """Blocks of tokens one after another, each over the blocks of slots it sees."""
    tokens = q.shape[1]
    size = min(BLOCK_TOKENS, tokens)
    starts = jnp.arange(0, tokens, size, dtype=jnp.int32)
    padded = jnp.pad(q, ((0, 0), (0, -tokens % size), (0, 0), (0, 0)))

    def block(start):
        part = lax.dynamic_slice_in_dim(padded, start, size, axis=1)
        return _one_block(part, k, v, lengths + start, window)

    y = jnp.moveaxis(lax.map(block, starts), 0, 1)
    return y.reshape(padded.shape)[:, :tokens]


def _one_block(q, k, v, lengths, window):
    batch, tokens, heads, width = q.shape
    slots, groups = k.shape[1:3]
    size = min(BLOCK_SLOTS, slots)
    position = rotation.next_positions(lengths, tokens)
    # Rows differ in length: from the first slot that one sees to the last.
    first = jnp.int32(0)
    if window is not None:
        first = jnp.maximum(jnp.min(lengths) - window + 1, 0) // size
    last = jnp.minimum((jnp.max(position) + size) // size, -(-slots // size))

    def step(i, carry):
        high, total, y = carry
        # The last block starts early enough to be whole; what it repeats is left out.
        start = jnp.minimum(i * size, slots - size)
        keys, values = (
            lax.dynamic_slice_in_dim(a, start, size, axis=1) for a in (k, v)
        )
        slot = start + jnp.arange(size, dtype=jnp.int32)
        visible = _visible(position, slot, window) & (slot >= i * size)[None, None]
        scores = _scores(q, keys, visible)
        new = jnp.maximum(high, jnp.max(scores, axis=-1))
        weights = jnp.exp(scores - new[..., None])
        shrink = jnp.exp(high - new)
        total = total * shrink + jnp.sum(weights, axis=-1)
        added = jnp.einsum(
            "bkgts,bskp->bkgtp",
            weights.astype(v.dtype),
            values,
            preferred_element_type=jnp.float32,
        )
        return new, total, y * shrink[..., None] + added

    shape = (batch, groups, heads // groups, tokens)
    carry = (
        jnp.full(shape, LOWEST, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, width), jnp.float32),
    )
    _, total, y = lax.fori_loop(first, last, step, carry)
    # Tokens of padding may see nothing.
    y = y / jnp.maximum(total, 1e-30)[..., None]
    return jnp.moveaxis(y, 3, 1).reshape(q.shape).astype(q.dtype)
