"""Positions of tokens and the frequencies of their rotary embedding."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from mil_jax.config import RopeScaling


def inverse_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None
) -> np.ndarray:
    """Returns the P/2 rotation frequencies in radians per position, float32.

    With `scaling` (Llama 3.1), wavelengths longer than
    `original_max_position_embeddings / low_freq_factor` are stretched by `factor`, those
    shorter than `... / high_freq_factor` are kept, and those between are blended.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    frequencies = (1.0 / theta**exponents).astype(np.float32)
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    original = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    blended = (1 - keep) * frequencies / scaling.factor + keep * frequencies
    return blended.astype(np.float32)


def segment_positions(segment_ids: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """Returns each token's position within its segment, from 0."""
    length = segment_ids.shape[1]
    index = jnp.arange(length, dtype=jnp.int32)[None]
    is_start = jnp.pad(
        segment_ids[:, 1:] != segment_ids[:, :-1],
        ((0, 0), (1, 0)),
        constant_values=True,
    )
    starts = jnp.maximum.accumulate(jnp.where(is_start, index, 0), axis=1)
    return index - starts
