"""Which rows a call of MultiStep changes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def settle(
    y: Float[Array, "B ..."],
    after: Float[Array, "B ..."],
    before: Float[Array, "B ..."],
    is_active: Bool[Array, " B"] | None,
    commit: bool,
) -> tuple[Float[Array, "B ..."], Float[Array, "B ..."]]:
    """Returns y and the state as the api has them: see `is_active` and `commit`."""
    if is_active is not None:
        y = jax.tree.map(lambda y: row_where(is_active, y, jnp.zeros_like(y)), y)
        after = row_where(is_active, after, before)
    return y, after if commit else before


def row_where(
    chosen: Bool[Array, " B"], a: Float[Array, "B ..."], b: Float[Array, "B ..."]
) -> Float[Array, "B ..."]:
    """Returns `a` in the chosen rows and `b` in the others."""
    return jnp.where(chosen.reshape(-1, *[1] * (a.ndim - 1)), a, b)
