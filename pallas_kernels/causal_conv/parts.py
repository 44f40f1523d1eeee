"""The parts in which a caller may want the convolution's channels."""

import itertools

import jax.numpy as jnp
from jaxtyping import Array, Float


def split(
    y: Float[Array, "B L C"], splits: tuple[int, ...]
) -> tuple[Float[Array, "B L ..."], ...]:
    """Returns runs of `splits` channels."""
    return tuple(jnp.split(y, list(itertools.accumulate(splits[:-1])), axis=-1))
