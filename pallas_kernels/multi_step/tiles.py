"""What the decoding kernels of both mixers share: tiles of arrays and their masks."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

from pallas_kernels import gpu


class Part(NamedTuple):
    """Positions along one axis and which of them the array has (None: all)."""

    at: jax.Array
    inside: jax.Array | None

    @classmethod
    def create(cls, start, count: int, size: int) -> "Part":
        """Returns `count` positions from `start` on of an axis of `size`."""
        at = start + jnp.arange(count, dtype=jnp.int32)
        return cls(at, None if size % count == 0 else at < size)


def spread(rows: Part, columns: Part):
    """Row and column numbers of a tile and its mask."""
    shape = (rows.at.shape[0], columns.at.shape[0])
    i = jnp.broadcast_to(rows.at[:, None], shape)
    j = jnp.broadcast_to(columns.at[None, :], shape)
    masks = [
        jnp.broadcast_to(m, shape)
        for m in (
            None if rows.inside is None else rows.inside[:, None],
            None if columns.inside is None else columns.inside[None, :],
        )
        if m is not None
    ]
    return i, j, functools.reduce(jnp.logical_and, masks) if masks else None


def read(ref, index, mask, other=0.0):
    """Loads a tile; `other` where masked."""
    return plt.load(ref.at[index], mask=mask, other=None if mask is None else other)


def load(ref, index, mask, other=0.0):
    """Loads a tile in float32."""
    return read(ref, index, mask, other).astype(jnp.float32)


def unstack(tile, count: int):
    """The first `count` rows of a tile, each as a vector, in registers."""
    if tile.shape[0] == 1:
        return [tile.reshape(tile.shape[1])]
    rows = lax.split(tile, (1,) * tile.shape[0], 0)
    return [row.reshape(tile.shape[1]) for row in rows[:count]]


def stack(rows):
    """Inverse of `unstack`; rows of zeros fill up to a power of two."""
    rows = [
        *rows,
        *[jnp.zeros_like(rows[0])] * (gpu.power_of_two(len(rows)) - len(rows)),
    ]
    while len(rows) > 1:
        half = len(rows) // 2
        pairs = zip(rows[:half], rows[half:], strict=True)
        rows = [jnp.stack(pair, axis=-1) for pair in pairs]
    return rows[0].reshape(rows[0].shape[0], -1).T


def rates(A, is_log):
    """Decay rates to the base of 2."""
    return (-gpu.exp2(A * gpu.LOG2_E) if is_log else A) * gpu.LOG2_E
