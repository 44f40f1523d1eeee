"""From logits to tokens: greedy, temperature, top-k and top-p."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mil_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 is greedy.
        top_k: Keep the k likeliest tokens; 0 keeps all.
        top_p: Keep the likeliest tokens until their probabilities reach p; 1 keeps all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}; it must be >= 0")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it must be >= 0 (0 keeps all)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be in (0, 1]")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0


def log_probs(logits: Float[Array, "*B V"], sampling: Sampling) -> Float[Array, "*B V"]:
    """Returns the filtered, normalised log-distribution; excluded tokens have -inf.

    Filters apply in the order temperature, top-k, top-p. Of tokens that tie at the border all
    are kept. Only for `temperature > 0`.
    """
    logits = logits.astype(jnp.float32) / sampling.temperature
    vocab = logits.shape[-1]
    if 0 < sampling.top_k < vocab:
        kth = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = -jnp.sort(-logits, axis=-1)
        probs = jax.nn.softmax(ordered, axis=-1)
        # A token stays if the mass before it is below p; the first always stays.
        is_kept = jnp.cumsum(probs, axis=-1) - probs < sampling.top_p
        lowest = jnp.min(jnp.where(is_kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    return jax.nn.log_softmax(logits, axis=-1)


def sample(
    key: jax.Array, logits: Float[Array, "*B V"], sampling: Sampling
) -> Int[Array, "*B"]:
    """Returns one token per distribution; `key` is one for all, or one for each."""
    if sampling.is_greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    draw = jax.vmap(jax.random.categorical) if key.ndim else jax.random.categorical
    return draw(key, log_probs(logits, sampling)).astype(jnp.int32)


def row_keys(seed: int, batch: int, rows: Sequence[int] | None = None) -> jax.Array:
    """Returns a key per row, from the seed and the row's number (default its place)."""
    numbers = np.asarray(range(batch) if rows is None else rows, np.uint32)
    if numbers.shape != (batch,):
        raise UserError(f"{numbers.size} row numbers for {batch} rows; give one each")
    return fold_in_rows(jax.random.key(seed), numbers)


@jax.jit
def fold_in_rows(
    keys: jax.Array, data: int | Int[Array, ""] | Int[Array, "B"]
) -> jax.Array:
    """Returns `fold_in` of keys and numbers, of which either may be one for all."""
    return jnp.vectorize(jax.random.fold_in)(keys, data)
