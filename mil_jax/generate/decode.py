"""Plain generation: prefill and decoding in one jitted program on the device."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from mil_jax.config import ModelConfig
from mil_jax.errors import UserError
from mil_jax.generate.sampler import Sampling, sample
from mil_jax.models.cache import HybridCache, init_cache
from mil_jax.models.decoder import HybridLM

# Prompts are padded to a multiple of this, so that few lengths are compiled.
PROMPT_BUCKET = 32


@dataclasses.dataclass(frozen=True)
class Completions:
    """Answers of a batch.

    Attributes:
        tokens: Generated ids, [B, max_new_tokens]; a row ends with its EOS if it has one,
            what follows is padding.
        lengths: Tokens of each row, EOS included.
    """

    tokens: np.ndarray
    lengths: np.ndarray

    def rows(self) -> list[np.ndarray]:
        """Returns each row's tokens without padding."""
        return [t[:n] for t, n in zip(self.tokens, self.lengths, strict=True)]


def generate(
    model: HybridLM,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    eos_ids: Sequence[int] | None = None,
    seed: int = 0,
    max_length: int | None = None,
) -> Completions:
    """Answers a batch of prompts of any lengths.

    Args:
        model: Best built with `scan_layers=False`.
        prompts: Token ids, at least one each.
        max_new_tokens: Limit on each answer.
        sampling: Greedy by default.
        eos_ids: Tokens that end an answer; default the model's. () never ends early.
        seed: Of the sampling.
        max_length: Cache slots per row; default what this batch needs.

    Raises:
        UserError: A prompt is empty or does not fit, or a token is not of the vocabulary.
    """
    batch = pad_prompts(prompts, model.config)
    capacity = check_capacity(batch, max_new_tokens, max_length)
    eos = model.config.eos_token_ids if eos_ids is None else eos_ids
    tokens, lengths = _generate(
        model,
        batch.tokens,
        batch.lengths,
        jax.random.key(seed),
        max_new_tokens=max_new_tokens,
        capacity=capacity,
        sampling=sampling,
        eos_ids=tuple(eos),
    )
    return Completions(np.asarray(tokens), np.asarray(lengths))


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Prompts padded on the right: tokens [B, L], lengths [B]."""

    tokens: np.ndarray
    lengths: np.ndarray


def pad_prompts(
    prompts: Sequence[Sequence[int] | np.ndarray], config: ModelConfig
) -> PromptBatch:
    """Returns the prompts as one right-padded batch.

    Raises:
        UserError: There is no prompt, one is empty, or a token is out of the vocabulary.
    """
    if not len(prompts):
        raise UserError("there is no prompt; give at least one")
    rows = [np.asarray(p, np.int32).reshape(-1) for p in prompts]
    for i, row in enumerate(rows):
        if not row.size:
            raise UserError(f"prompt {i} is empty; it needs at least one token")
        if row.min() < 0 or row.max() >= config.vocab_size:
            raise UserError(
                f"prompt {i} holds token {row.max() if row.min() >= 0 else row.min()}; "
                f"the model's vocabulary has {config.vocab_size}"
            )
    longest = max(row.size for row in rows)
    width = -(-longest // PROMPT_BUCKET) * PROMPT_BUCKET
    tokens = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : row.size] = row
    return PromptBatch(tokens, np.array([row.size for row in rows], np.int32))


def check_capacity(
    batch: PromptBatch, max_new_tokens: int, max_length: int | None
) -> int:
    """Returns the cache's length for a batch.

    Raises:
        UserError: `max_new_tokens` is below 1, or a prompt with its answer exceeds
            `max_length`.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    longest = int(batch.lengths.max())
    if max_length is not None and longest + max_new_tokens > max_length:
        row = int(batch.lengths.argmax())
        raise UserError(
            f"prompt {row} has {longest} tokens; with {max_new_tokens} new ones that "
            f"exceeds the cache's {max_length}: shorten it or raise max_length"
        )
    # By the padded width, so that batches of one bucket run the same program; the padded
    # prompt is written as a whole before its padding is overwritten.
    width = batch.tokens.shape[1]
    return max(width, max_length or width + max_new_tokens)


def is_eos(tokens: Int[Array, "*B"], eos_ids: tuple[int, ...]) -> Bool[Array, "*B"]:
    """Returns where a token ends an answer."""
    found = jnp.zeros(tokens.shape, bool)
    for eos in eos_ids:
        found |= tokens == eos
    return found


@functools.partial(
    jax.jit, static_argnames=("max_new_tokens", "capacity", "sampling", "eos_ids")
)
def _generate(
    model: HybridLM,
    prompts: Int[Array, "B L"],
    prompt_lengths: Int[Array, "B"],
    key: jax.Array,
    *,
    max_new_tokens: int,
    capacity: int,
    sampling: Sampling,
    eos_ids: tuple[int, ...],
) -> tuple[Int[Array, "B M"], Int[Array, "B"]]:
    """Prefills, then decodes until every row has ended."""
    batch = prompts.shape[0]
    cache = init_cache(model.config, model.compute, batch=batch, max_length=capacity)
    logits, cache = model.prefill(prompts, prompt_lengths, cache)
    first = sample(jax.random.fold_in(key, 0), logits, sampling)
    out = jnp.zeros((batch, max_new_tokens), jnp.int32).at[:, 0].set(first)
    lengths = jnp.ones((batch,), jnp.int32)
    Carry = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, HybridCache]

    def is_running(carry: Carry) -> jax.Array:
        step, done, *_ = carry
        return (step < max_new_tokens) & ~jnp.all(done)

    def advance(carry: Carry) -> Carry:
        step, done, last, out, lengths, cache = carry
        logits, cache = model.decode(last[:, None], cache)
        token = sample(jax.random.fold_in(key, step), logits[:, 0], sampling)
        out = out.at[:, step].set(jnp.where(done, 0, token))
        is_live = (~done).astype(jnp.int32)
        cache = cache.keep(is_live)
        done |= is_eos(token, eos_ids)
        return step + 1, done, token, out, lengths + is_live, cache

    start = (jnp.int32(1), is_eos(first, eos_ids), first, out, lengths, cache)
    *_, out, lengths, _ = jax.lax.while_loop(is_running, advance, start)
    return out, lengths
