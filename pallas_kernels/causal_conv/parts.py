"""How the convolution's channels are repeated, and cut into parts."""

import itertools

import jax.numpy as jnp
from jaxtyping import Array, Float


def repeat(
    x: Float[Array, "B L C"] | None, outputs: int, group: int | None
) -> Float[Array, "B L F"] | None:
    """Returns every `group` channels F / C times, consecutively; all of them if None.

    None, a window that is not there, stays None.
    """
    if x is None:
        return None
    channels = x.shape[-1]
    if outputs == channels:
        return x
    groups = x.reshape(*x.shape[:2], -1, 1, group or channels)
    shape = (*groups.shape[:3], outputs // channels, groups.shape[4])
    return jnp.broadcast_to(groups, shape).reshape(*x.shape[:2], outputs)


def split(
    y: Float[Array, "B L C"], splits: tuple[int, ...]
) -> tuple[Float[Array, "B L ..."], ...]:
    """Returns runs of `splits` channels."""
    return tuple(jnp.split(y, list(itertools.accumulate(splits[:-1])), axis=-1))
