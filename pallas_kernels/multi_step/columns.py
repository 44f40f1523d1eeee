"""Arguments that lie among others in the result of one fused product."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Columns:
    """Some columns of an array, in place of a copy of them.

    Where a sliced array is wanted, the compiler writes the slice first; a kernel reads the
    columns where they are.

    Attributes:
      values: The array, [B, T, F].
      start: The first column.
      sizes: Shape in which the columns read, after B and T.
    """

    values: Float[Array, "B T F"]
    start: int = dataclasses.field(metadata={"static": True})
    sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what they stand for."""
        return (*self.values.shape[:2], *self.sizes)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the array."""
        return self.values.dtype


def as_array(value: Any) -> Any:
    """Returns what `Columns` stand for; anything else as it is."""
    if not isinstance(value, Columns):
        return value
    stop = value.start + math.prod(value.sizes)
    return value.values[:, :, value.start : stop].reshape(value.shape)


def by_group(value: Array | Columns, size: int) -> Array | Columns:
    """Returns [B, T, F] as [B, T, F / size, size]."""
    sizes = (value.shape[2] // size, size)
    if isinstance(value, Columns):
        return dataclasses.replace(value, sizes=sizes)
    return value.reshape(*value.shape[:2], *sizes)


def copied(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function with arrays in place of `Columns` among its arguments."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = jax.tree.map(
            as_array, (args, kwargs), is_leaf=lambda v: isinstance(v, Columns)
        )
        return function(*args, **kwargs)

    return call
