"""Segment ids of packed rows, as the operations use them."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def continues(segment_ids: Int[Array, "B L"]) -> Bool[Array, "B L"]:
    """Returns where a token belongs to the same segment as the one before it.

    The first token continues whatever state the caller brings, so it counts as True.
    """
    same = segment_ids[:, 1:] == segment_ids[:, :-1]
    return jnp.pad(same, ((0, 0), (1, 0)), constant_values=True)
