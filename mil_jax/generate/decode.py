"""Plain generation: one jitted program reads the prompts, another one decodes."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from mil_jax.config import ModelConfig
from mil_jax.errors import UserError
from mil_jax.generate.sampler import Sampling, fold_in_rows, row_keys, sample
from mil_jax.models.cache import HybridCache, init_cache
from mil_jax.models.decoder import Frozen, HybridLM, freeze, thaw

S = TypeVar("S")  # A state, plain or speculative.

# Prompts are padded to a multiple of this, so that few lengths are compiled.
PROMPT_BUCKET = 32
# Tokens of a batch that a prefill reads at a time, and the fewest and most of a row.
CHUNK_TOKENS, MIN_CHUNK, MAX_CHUNK = 16384, 256, 2048
# Steps that the device goes through before it asks the host whether all rows have ended,
# which costs a gap; what it ran in excess is dropped.
STEPS_PER_CHECK = 8


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
    model: HybridLM | Frozen,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    eos_ids: Sequence[int] | None = None,
    seed: int = 0,
    max_length: int | None = None,
    chunk: int | None = None,
) -> Completions:
    """Answers a batch of prompts of any lengths.

    Args:
        model: Best built with `layout="decode"`.
        prompts: Token ids, at least one each.
        max_new_tokens: Limit on each answer.
        sampling: Greedy by default.
        eos_ids: Tokens that end an answer; default the model's. () never ends early.
        seed: Of the sampling.
        max_length: Cache slots per row; default what this batch needs.
        chunk: Positions of a prompt that are read at a time; default by `prefill_chunk`.

    Raises:
        UserError: A prompt is empty or does not fit, or a token is not of the vocabulary.
    """
    model = freeze(model)
    state = start(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_ids=eos_ids,
        seed=seed,
        max_length=max_length,
        chunk=chunk,
    )
    return completions(advance(model, state, max_new_tokens))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Answers in the making; `advance` goes on from here.

    Attributes:
        tokens: Ids so far, [B, max_new_tokens], zeros behind them.
        lengths: Tokens of each row so far, EOS included.
        done: Rows that have ended: by EOS, at the limit, or by `finish`.
        last: The newest token of each row.
        step: Tokens of a row that has not ended.
        keys: One per row, for its draws.
        cache: Holds all but the newest token.
        sampling: How tokens are drawn.
        eos_ids: Tokens that end an answer.
    """

    tokens: Int[Array, "B M"]
    lengths: Int[Array, "B"]
    done: Bool[Array, "B"]
    last: Int[Array, "B"]
    step: Int[Array, ""]
    keys: jax.Array
    cache: HybridCache
    sampling: Sampling = dataclasses.field(metadata={"static": True})
    eos_ids: tuple[int, ...] = dataclasses.field(metadata={"static": True})


def start(
    model: HybridLM | Frozen,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    eos_ids: Sequence[int] | None = None,
    seed: int = 0,
    rows: Sequence[int] | None = None,
    max_length: int | None = None,
    width: int | None = None,
    chunk: int | None = None,
) -> State:
    """Reads a batch of prompts and returns their answers' first tokens, to go on from.

    Args:
        model: As in `generate`, like what is not named here.
        prompts: Token ids, at least one each.
        max_new_tokens: Limit on each answer.
        sampling: Greedy by default.
        eos_ids: Tokens that end an answer.
        seed: Of the sampling.
        rows: A number per row; what a row draws depends on it and on the seed, whatever
            else is in the batch. Default 0, 1, ...
        max_length: Cache slots per row.
        width: Length that prompts are padded to; default the next multiple of
            `PROMPT_BUCKET`.
        chunk: Positions that are read at a time.

    Raises:
        UserError: As `generate`.
    """
    batch = pad_prompts(prompts, model.config, width)
    chunk = prefill_chunk(batch, chunk)
    eos = model.config.eos_token_ids if eos_ids is None else eos_ids
    return _start(
        model,
        batch.tokens,
        batch.lengths,
        row_keys(seed, len(batch.lengths), rows),
        max_new_tokens=max_new_tokens,
        capacity=check_capacity(batch, max_new_tokens, max_length, chunk),
        chunk=chunk,
        sampling=sampling,
        eos_ids=tuple(eos),
    )


def finish(state: S, rows: Sequence[bool] | np.ndarray) -> S:
    """Returns the state with the marked rows ended where they are."""
    return dataclasses.replace(state, done=state.done | np.asarray(rows, bool))


def completions(state: State) -> Completions:
    """Returns the answers so far."""
    return Completions(np.asarray(state.tokens), np.asarray(state.lengths))


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Prompts padded on the right: tokens [B, L], lengths [B]."""

    tokens: np.ndarray
    lengths: np.ndarray


def pad_prompts(
    prompts: Sequence[Sequence[int] | np.ndarray],
    config: ModelConfig,
    width: int | None = None,
) -> PromptBatch:
    """Returns the prompts as one right-padded batch, `width` wide or as wide as it needs.

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
    width = max(width or 0, -(-longest // PROMPT_BUCKET) * PROMPT_BUCKET)
    tokens = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : row.size] = row
    return PromptBatch(tokens, np.array([row.size for row in rows], np.int32))


def prefill_chunk(batch: PromptBatch, chunk: int | None = None) -> int:
    """Returns how many positions of a batch's prompts are read at a time.

    Raises:
        UserError: `chunk` is below 1.
    """
    if chunk is None:
        return max(MIN_CHUNK, min(MAX_CHUNK, CHUNK_TOKENS // len(batch.lengths)))
    if chunk < 1:
        raise UserError(f"chunk is {chunk}; it must be at least 1")
    return chunk


def check_capacity(
    batch: PromptBatch, max_new_tokens: int, max_length: int | None, chunk: int
) -> int:
    """Returns the cache's length for a batch that is read `chunk` positions at a time.

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
    read = width if width <= chunk else -(-width // chunk) * chunk
    return max(read, max_length or width + max_new_tokens)


def is_eos(tokens: Int[Array, "*B"], eos_ids: tuple[int, ...]) -> Bool[Array, "*B"]:
    """Returns where a token ends an answer."""
    found = jnp.zeros(tokens.shape, bool)
    for eos in eos_ids:
        found |= tokens == eos
    return found


@functools.partial(
    jax.jit,
    static_argnames=("max_new_tokens", "capacity", "chunk", "sampling", "eos_ids"),
)
def _start(
    model: HybridLM | Frozen,
    prompts: Int[Array, "B L"],
    prompt_lengths: Int[Array, "B"],
    keys: jax.Array,
    *,
    max_new_tokens: int,
    capacity: int,
    chunk: int,
    sampling: Sampling,
    eos_ids: tuple[int, ...],
) -> State:
    batch, model = prompts.shape[0], thaw(model)
    model.check_whole_head()
    cache = init_cache(model.config, model.compute, batch=batch, max_length=capacity)
    logits, cache = model.prefill(prompts, prompt_lengths, cache, chunk=chunk)
    first = sample(fold_in_rows(keys, 0), logits, sampling)
    return State(
        tokens=jnp.zeros((batch, max_new_tokens), jnp.int32).at[:, 0].set(first),
        lengths=jnp.ones((batch,), jnp.int32),
        done=is_eos(first, eos_ids) | (max_new_tokens <= 1),
        last=first,
        step=jnp.int32(1),
        keys=keys,
        cache=cache,
        sampling=sampling,
        eos_ids=eos_ids,
    )


@functools.partial(jax.jit, donate_argnames="state")
def advance(model: HybridLM | Frozen, state: State, num_steps: int) -> State:
    """Decodes up to `num_steps` more tokens per row; rows that have ended stay.

    One program serves every `num_steps`, and one call is one round trip to the device.

    Args:
        model: The model that `state` was started with.
        state: Consumed: its buffers are used again, so take the returned one.
        num_steps: Less are done where all rows end before.
    """
    end = state.step + num_steps
    step = functools.partial(_step, thaw(model), end)
    return jax.lax.while_loop(
        lambda state: (state.step < end) & ~jnp.all(state.done),
        lambda state: jax.lax.fori_loop(
            0, STEPS_PER_CHECK, lambda _, state: step(state), state
        ),
        state,
    )


def _step(model: HybridLM, end: Int[Array, ""], state: State) -> State:
    """Returns the state after one more token, or as it is from step `end` on."""
    logits, cache = model.decode(state.last[:, None], state.cache)
    keys = fold_in_rows(state.keys, state.step)
    token = sample(keys, logits[:, 0], state.sampling)
    is_live = ~state.done & (state.step < end)
    tokens = state.tokens.at[:, state.step].set(jnp.where(is_live, token, 0))
    gained = is_live.astype(jnp.int32)
    lengths = state.lengths + gained
    has_ended = is_eos(token, state.eos_ids) | (lengths >= tokens.shape[1])
    return dataclasses.replace(
        state,
        tokens=tokens,
        lengths=lengths,
        done=state.done | (is_live & has_ended),
        last=jnp.where(is_live, token, state.last),
        step=jnp.minimum(state.step + 1, end),
        cache=cache.keep(gained),
    )
