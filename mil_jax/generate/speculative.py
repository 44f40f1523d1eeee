"""Speculative decoding with a multi-step state-space verifier (paper Sec. 4, Alg. 2)."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mil_jax.config import ModelConfig
from mil_jax.errors import UserError
from mil_jax.generate.adaptive import Chooser
from mil_jax.generate.decode import (
    Completions,
    check_capacity,
    is_eos,
    pad_prompts,
    prefill_chunk,
)
from mil_jax.generate.sampler import (
    Sampling,
    fold_in_rows,
    log_probs,
    row_keys,
    sample,
)
from mil_jax.models.cache import HybridCache, init_cache, take_rows, write_rows
from mil_jax.models.decoder import Frozen, HybridLM, freeze, thaw
from pallas_kernels.multi_step.pallas_triton import MAX_TOKENS

# Pending and new tokens of a step go through the multi-step kernel together.
MAX_K = MAX_TOKENS // 2 - 1
# Tokens that a draft which was left behind reads at a time.
CATCH_UP = 64


@dataclasses.dataclass(frozen=True)
class SpeculationStats:
    """What speculation gained.

    Attributes:
        steps: Target passes per row (the prompt's own not counted), [B].
        accepted_at: Of all passes, how many accepted the draft's token at position i, [K].
        tried_at: How many had a draft's token at position i, [K].
        num_steps: Passes over all rows.
        tokens_per_step: Tokens of the answers by pass, mean over all rows and passes, at most
            K+1. Tokens past an EOS or the limit do not count.
    """

    steps: np.ndarray
    accepted_at: np.ndarray
    tried_at: np.ndarray
    num_steps: int
    tokens_per_step: float


def generate(
    target: HybridLM | Frozen,
    draft: HybridLM | Frozen,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    k: int | Chooser,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    eos_ids: Sequence[int] | None = None,
    seed: int = 0,
    max_length: int | None = None,
    chunk: int | None = None,
) -> tuple[Completions, SpeculationStats]:
    """Answers prompts as `target` would, with `draft` proposing k tokens a step.

    Greedy answers are the target's own, token by token; sampled ones follow the target's
    distribution exactly (2211.17192, Alg. 1), both models under the same filter.

    Args:
        target: The model whose answers are wanted.
        draft: A smaller model of any layer types with the same vocabulary.
        prompts: Token ids, at least one each.
        k: Draft tokens per step, K >= 1; or what chooses it between blocks of steps, which
            decodes plainly where the draft is worth nothing.
        max_new_tokens: Limit on each answer.
        sampling: Greedy by default.
        eos_ids: Tokens that end an answer; default the target's.
        seed: Of the sampling.
        max_length: Cache slots per row; default what this batch needs.
        chunk: Positions of a prompt that are read at a time.

    Raises:
        UserError: The vocabularies differ, k is out of range, or a prompt is empty or does
            not fit.
    """
    target, draft = freeze(target), freeze(draft)
    chooser = k if isinstance(k, Chooser) else None
    state = start(
        target,
        draft,
        prompts,
        k=chooser.k_max if chooser else k,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_ids=eos_ids,
        seed=seed,
        max_length=max_length,
        chunk=chunk,
    )
    if chooser is None:
        state = advance(target, draft, state, max_new_tokens)
    while not np.all(state.done):
        state = chooser.run(functools.partial(advance, target, draft), state)
    return completions(state), stats(state)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Answers in the making; `advance` goes on from here.

    The target has read all but the last token of a row, the draft all but the last two, or
    less where steps without it lie behind.

    Attributes:
        tokens: Ids so far, then zeros: [B, M], max_new_tokens and room for a whole step.
        lengths: Tokens of each row so far, EOS included.
        done: Rows that have ended: by EOS, at the limit, or by `decode.finish`.
        last_prompt: The last token of each prompt.
        last_two: The newest two tokens of each row, the prompt's included.
        step: Passes so far of a row that has not ended, the prompt's included.
        keys: One per row, for its draws.
        target_cache: The target's.
        draft_cache: The draft's.
        steps: As in `SpeculationStats`, like the next.
        accepted_at: [K].
        tried_at: [K].
        gained: Tokens of the answers that each row's passes made.
        max_new_tokens: Limit on each answer.
        sampling: How tokens are drawn.
        eos_ids: Tokens that end an answer.
        is_behind: Whether the last step was plain: the draft has to catch up, and the
            target's cache has no room for drafts.
    """

    tokens: Int[Array, "B M"]
    lengths: Int[Array, "B"]
    done: Bool[Array, "B"]
    last_prompt: Int[Array, "B"]
    last_two: Int[Array, "B 2"]
    step: Int[Array, ""]
    keys: jax.Array
    target_cache: HybridCache
    draft_cache: HybridCache
    steps: Int[Array, "B"]
    accepted_at: Int[Array, "K"]
    tried_at: Int[Array, "K"]
    gained: Int[Array, "B"]
    max_new_tokens: int = dataclasses.field(metadata={"static": True})
    sampling: Sampling = dataclasses.field(metadata={"static": True})
    eos_ids: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    is_behind: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def k_max(self) -> int:
        """Most draft tokens of a step."""
        return self.accepted_at.shape[0]


def start(
    target: HybridLM | Frozen,
    draft: HybridLM | Frozen,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    k: int,
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
        target: As in `generate`, like what is not named here.
        draft: The smaller model.
        prompts: Token ids, at least one each.
        k: Most draft tokens of a step.
        max_new_tokens: Limit on each answer.
        sampling: Greedy by default.
        eos_ids: Tokens that end an answer.
        seed: Of the sampling.
        rows: As in `decode.start`, like `width` and `chunk`.
        max_length: Cache slots per row.
        width: Length that prompts are padded to.
        chunk: Positions that are read at a time.

    Raises:
        UserError: As `generate`.
    """
    check_models(target.config, draft.config, k)
    batch = pad_prompts(prompts, target.config, width)
    chunk = prefill_chunk(batch, chunk)
    eos = target.config.eos_token_ids if eos_ids is None else eos_ids
    return _start(
        target,
        draft,
        batch.tokens,
        batch.lengths,
        row_keys(seed, len(batch.lengths), rows),
        k=k,
        max_new_tokens=max_new_tokens,
        capacity=check_capacity(batch, max_new_tokens, max_length, chunk),
        chunk=chunk,
        sampling=sampling,
        eos_ids=tuple(eos),
    )


def check_models(target: ModelConfig, draft: ModelConfig, k: int) -> None:
    """Checks that a draft fits a target, and k both.

    Raises:
        UserError: It does not.
    """
    if target.vocab_size != draft.vocab_size:
        raise UserError(
            f"the draft has {draft.vocab_size} tokens and the target "
            f"{target.vocab_size}; both must use the same vocabulary"
        )
    if k < 1:
        raise UserError(
            f"k is {k}; speculation needs at least one draft token, and plain decoding "
            "no draft"
        )
    # State-space layers take no more, and longer steps gain nothing with attention either.
    if k > MAX_K:
        raise UserError(f"k is {k}; at most {MAX_K} tokens are drafted a step")


def completions(state: State) -> Completions:
    """Returns the answers so far."""
    tokens = np.asarray(state.tokens)[:, : state.max_new_tokens]
    return Completions(tokens, np.asarray(state.lengths))


def stats(state: State) -> SpeculationStats:
    """Returns what speculation gained so far."""
    steps = np.asarray(state.steps)
    total = int(steps.sum())
    return SpeculationStats(
        steps=steps,
        accepted_at=np.asarray(state.accepted_at),
        tried_at=np.asarray(state.tried_at),
        num_steps=total,
        tokens_per_step=float(np.sum(state.gained)) / max(total, 1),
    )


class Verdict(NamedTuple):
    """Outcome of one verification.

    Attributes:
        num_accepted: Draft tokens accepted per row, in [0, K].
        tokens: Accepted drafts, then the target's own token, then padding: [B, K+1].
    """

    num_accepted: Int[Array, "B"]
    tokens: Int[Array, "B S"]


def verify(
    key: jax.Array,
    target_logits: Float[Array, "B S V"],
    draft_logits: Float[Array, "B K V"] | None,
    drafts: Int[Array, "B K"],
    sampling: Sampling,
) -> Verdict:
    """Accepts a prefix of the drafts and adds one token of the target's.

    Greedy: the longest prefix that the target would have chosen itself. Sampled: draft i is
    accepted with probability min(1, p/q); at the first rejection the token is drawn from
    max(p - q, 0) normalised, after full acceptance from p (2211.17192, Alg. 1 and App. A).

    Args:
        key: For the sampled rule: one, or one per row.
        target_logits: After the last accepted token and after each draft; S = K + 1.
        draft_logits: From which each draft was taken; greedy needs none.
        drafts: Proposed tokens.
        sampling: The filter of both models.
    """
    k = drafts.shape[1]
    if sampling.is_greedy:
        choice = jnp.argmax(target_logits, axis=-1).astype(jnp.int32)
        return accept(choice[:, :k] == drafts, choice, drafts)
    # A key per row, so that rows do not depend on each other.
    keys = key if key.ndim else jax.random.split(key, drafts.shape[0])
    log_p = log_probs(target_logits, sampling)
    log_q = log_probs(draft_logits, sampling)
    ratio = _pick(log_p[:, :k], drafts) - _pick(log_q, drafts)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (k,)))(fold_in_rows(keys, 0))
    is_accepted = uniform < jnp.exp(ratio)
    at = _prefix_length(is_accepted)[:, None, None]
    # Behind the last draft there is no q: the residual is p itself.
    q = jnp.pad(jnp.exp(log_q), ((0, 0), (0, 1), (0, 0)))
    p, q = (jnp.take_along_axis(a, at, axis=1)[:, 0] for a in (jnp.exp(log_p), q))
    residual = jnp.maximum(p - q, 0.0)
    # Rounding can reject where p = q and leave nothing.
    is_empty = jnp.sum(residual, axis=-1, keepdims=True) == 0
    weights = jnp.where(is_empty, p, residual)
    draw = jax.vmap(jax.random.categorical)
    extra = draw(fold_in_rows(keys, 1), jnp.log(weights)).astype(jnp.int32)
    return accept(is_accepted, jnp.repeat(extra[:, None], k + 1, axis=1), drafts)


def accept(
    agrees: Bool[Array, "B K"], extra: Int[Array, "B S"], drafts: Int[Array, "B K"]
) -> Verdict:
    """Returns the drafts up to the first that does not agree, and one token more.

    Args:
        agrees: Which drafts would do.
        extra: The target's own token after so many accepted drafts.
        drafts: Proposed tokens.
    """
    k = drafts.shape[1]
    num_accepted = _prefix_length(agrees)
    position = jnp.arange(k + 1)[None]
    padded = jnp.pad(drafts, ((0, 0), (0, 1)))
    tokens = jnp.where(position < num_accepted[:, None], padded, 0)
    tokens = jnp.where(position == num_accepted[:, None], extra, tokens)
    return Verdict(num_accepted, tokens.astype(jnp.int32))


def _prefix_length(agrees: Bool[Array, "B K"]) -> Int[Array, "B"]:
    return jnp.sum(jnp.cumprod(agrees.astype(jnp.int32), axis=1), axis=1)


def _pick(values: Float[Array, "B K V"], index: Int[Array, "B K"]) -> jax.Array:
    return jnp.take_along_axis(values, index[..., None], axis=-1)[..., 0]


class Verify(Protocol):
    """What judges drafts, as `verify` does."""

    def __call__(
        self,
        key: jax.Array,
        target_logits: Float[Array, "B S V"],
        draft_logits: Float[Array, "B K V"] | None,
        drafts: Int[Array, "B K"],
        sampling: Sampling,
    ) -> Verdict:
        """Returns how many drafts are accepted and the tokens that follow."""


def propose(
    draft: HybridLM,
    key: jax.Array,
    last_two: Int[Array, "B 2"],
    cache: HybridCache,
    k: int,
    sampling: Sampling,
) -> tuple[Int[Array, "B K"], Float[Array, "B K V"] | None, HybridCache]:
    """Draws k tokens from the draft, one after the other.

    Each is of the draft's own vocabulary, which may be a part of the target's.

    The draft always lags two tokens behind, so that one call catches up after full
    acceptance and after a rejection alike. Its cache commits once; the k + 1 tokens it reads
    stay pending until it is known how many survive.

    Returns:
        The drafts, the logits they were taken from (None if greedy, which compares tokens
        only), and the cache.
    """
    logits, cache = draft.decode(last_two, cache, last_only=True)
    logits = logits[:, -1]
    tokens, all_logits = [], []
    for i in range(k):
        token = draft.token_ids(sample(fold_in_rows(key, i), logits, sampling))
        tokens.append(token)
        if not sampling.is_greedy:
            all_logits.append(draft.all_logits(logits))
        if i + 1 < k:
            cache = cache.keep(jnp.full_like(cache.lengths, i + 2))
            step, cache = draft.decode(token[:, None], cache, commit=False)
            logits = step[:, 0]
    logits = jnp.stack(all_logits, axis=1) if all_logits else None
    return jnp.stack(tokens, axis=1), logits, cache


@functools.partial(
    jax.jit,
    static_argnames=("k", "max_new_tokens", "capacity", "chunk", "sampling", "eos_ids"),
)
def _start(
    target: HybridLM | Frozen,
    draft: HybridLM | Frozen,
    prompts: Int[Array, "B L"],
    prompt_lengths: Int[Array, "B"],
    keys: jax.Array,
    *,
    k: int,
    max_new_tokens: int,
    capacity: int,
    chunk: int,
    sampling: Sampling,
    eos_ids: tuple[int, ...],
) -> State:
    batch = prompts.shape[0]
    target, draft = thaw(target), thaw(draft)
    target.check_whole_head()
    sizes = {"batch": batch, "max_length": capacity, "max_step": k + 1}
    target_cache = init_cache(target.config, target.compute, **sizes)
    sizes["max_length"] += CATCH_UP
    draft_cache = init_cache(draft.config, draft.compute, **sizes)
    logits, target_cache = target.prefill(
        prompts, prompt_lengths, target_cache, chunk=chunk
    )
    _, draft_cache = draft.prefill(
        prompts, prompt_lengths - 1, draft_cache, chunk=chunk
    )
    first = sample(fold_in_rows(keys, 0), logits, sampling)
    last_prompt = jnp.take_along_axis(prompts, prompt_lengths[:, None] - 1, axis=1)
    # Room for a whole step past the limit; cut off at the end.
    tokens = jnp.zeros((batch, max_new_tokens + k + 1), jnp.int32)
    zeros = jnp.zeros((batch,), jnp.int32)
    return State(
        tokens=tokens.at[:, 0].set(first),
        lengths=zeros + 1,
        done=is_eos(first, eos_ids) | (max_new_tokens <= 1),
        last_prompt=last_prompt[:, 0],
        last_two=jnp.concatenate([last_prompt, first[:, None]], axis=1),
        step=jnp.int32(1),
        keys=keys,
        target_cache=target_cache,
        draft_cache=draft_cache,
        steps=zeros,
        accepted_at=jnp.zeros((k,), jnp.int32),
        tried_at=jnp.zeros((k,), jnp.int32),
        gained=zeros,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_ids=eos_ids,
    )


def advance(
    target: HybridLM | Frozen,
    draft: HybridLM | Frozen,
    state: State,
    num_steps: int,
    *,
    k: int | None = None,
    verify: Verify = verify,
) -> State:
    """Drafts and verifies up to `num_steps` times, 1 to k + 1 tokens per row each.

    One program serves every `num_steps`, and one call is one round trip to the device.

    Args:
        target: The models that `state` was started with.
        draft: The smaller one.
        state: Consumed: its buffers are used again, so take the returned one.
        num_steps: Less are done where all rows end before.
        k: Draft tokens of these steps, at most those the state was started with, which is
            the default. 0 decodes plainly; the draft is left behind, and catches up when it
            is next asked.
        verify: The judge of the drafts.

    Raises:
        UserError: k is out of range.
    """
    k = state.k_max if k is None else k
    if not 0 <= k <= state.k_max:
        raise UserError(f"k is {k}; this state was started for at most {state.k_max}")
    if k and state.is_behind:
        state = _catch_up(draft, state)
        cache = state.target_cache.with_max_step(state.k_max + 1)
        state = dataclasses.replace(state, target_cache=cache, is_behind=False)
    if k == 0 and not state.is_behind:
        if num_steps < 1 or np.all(state.done):
            return state
        # Commits what is pending, so that the steps after it need no room for drafts and
        # cost what those of plain decoding do.
        state = _commit(target, state)
        cache = state.target_cache.with_max_step(1)
        state = dataclasses.replace(state, target_cache=cache, is_behind=True)
        num_steps -= 1
    return _advance(target, draft, state, num_steps, k=k, verify=verify)


@functools.partial(jax.jit, donate_argnames="state", static_argnames=("k", "verify"))
def _advance(
    target: HybridLM | Frozen,
    draft: HybridLM | Frozen,
    state: State,
    num_steps: int,
    *,
    k: int,
    verify: Verify,
) -> State:
    end = state.step + num_steps
    if k:
        step = functools.partial(_step, thaw(target), thaw(draft), k, verify)
    else:
        step = functools.partial(_plain_step, thaw(target))
    return jax.lax.while_loop(
        lambda state: (state.step < end) & ~jnp.all(state.done), step, state
    )


@functools.partial(jax.jit, donate_argnames="state")
def _commit(target: HybridLM | Frozen, state: State) -> State:
    """Returns the state one plain step later."""
    return _plain_step(thaw(target), state)


@functools.partial(jax.jit, donate_argnames="state")
def _catch_up(draft: HybridLM | Frozen, state: State) -> State:
    """Returns the state with a draft that has read all but the last two tokens."""
    draft = thaw(draft)
    # Commits what is pending; the token itself is not kept.
    _, cache = draft.decode(state.last_prompt[:, None], state.draft_cache)
    cache = cache.keep(jnp.zeros_like(state.lengths))
    history = jnp.concatenate([state.last_prompt[:, None], state.tokens], axis=1)
    history = jnp.pad(history, ((0, 0), (0, CATCH_UP)))
    wanted = jnp.where(state.done, cache.lengths, state.target_cache.lengths - 1)
    # Of the history's first token, the prompt's last.
    origin = state.target_cache.lengths - state.lengths

    def read(cache: HybridCache) -> HybridCache:
        tokens = take_rows(history, cache.lengths - origin, CATCH_UP)
        count = jnp.clip(wanted - cache.lengths, 0, CATCH_UP)
        return draft.prefill(tokens, count, cache)[1]

    cache = jax.lax.while_loop(
        lambda cache: jnp.any(cache.lengths < wanted), read, cache
    )
    return dataclasses.replace(state, draft_cache=cache)


def _step(target: HybridLM, draft: HybridLM, k: int, verify: Verify, c: State) -> State:
    """Returns the state after one round of drafting and verification."""
    keys = fold_in_rows(c.keys, c.step)
    drafts, draft_logits, draft_cache = propose(
        draft, fold_in_rows(keys, 0), c.last_two, c.draft_cache, k, c.sampling
    )
    inputs = jnp.concatenate([c.last_two[:, 1:], drafts], axis=1)
    target_logits, target_cache = target.decode(inputs, c.target_cache)
    verdict = verify(
        fold_in_rows(keys, 1), target_logits, draft_logits, drafts, c.sampling
    )
    c = dataclasses.replace(c, target_cache=target_cache, draft_cache=draft_cache)
    return _settle(c, verdict, k)


def _plain_step(target: HybridLM, c: State) -> State:
    """Returns the state after one more token, without the draft."""
    logits, target_cache = target.decode(c.last_two[:, 1:], c.target_cache)
    keys = fold_in_rows(fold_in_rows(c.keys, c.step), 1)
    token = sample(keys, logits[:, 0], c.sampling)
    verdict = Verdict(jnp.zeros_like(token), token[:, None])
    return _settle(dataclasses.replace(c, target_cache=target_cache), verdict, 0)


def _settle(c: State, verdict: Verdict, k: int) -> State:
    """Returns the state with what was accepted, of caches that have run k drafts."""
    is_live = ~c.done
    gained = verdict.num_accepted + 1
    emitted, has_eos = _until_eos(verdict.tokens, gained, c.eos_ids)
    emitted = jnp.minimum(emitted, c.max_new_tokens - c.lengths)
    emitted = jnp.where(is_live, emitted, 0)
    is_new = jnp.arange(k + 1)[None] < emitted[:, None]
    new = jnp.where(is_new, verdict.tokens, 0)
    lengths = c.lengths + emitted
    kept = jnp.where(is_live, gained, 0)
    tail = jnp.concatenate([c.last_two[:, 1:], verdict.tokens], axis=1)
    at = verdict.num_accepted[:, None] + jnp.arange(2)[None]
    last_two = jnp.take_along_axis(tail, at, axis=1)
    is_accepted = jnp.arange(k)[None] < verdict.num_accepted[:, None]
    accepted = jnp.sum(is_accepted & is_live[:, None], axis=0, dtype=jnp.int32)
    live = jnp.sum(is_live, dtype=jnp.int32)
    return dataclasses.replace(
        c,
        tokens=write_rows(c.tokens, new, c.lengths),
        lengths=lengths,
        done=c.done | has_eos | (lengths >= c.max_new_tokens),
        last_two=jnp.where(is_live[:, None], last_two, c.last_two),
        step=c.step + 1,
        target_cache=c.target_cache.keep(kept),
        draft_cache=c.draft_cache.keep(kept) if k else c.draft_cache,
        steps=c.steps + is_live.astype(jnp.int32),
        accepted_at=c.accepted_at.at[:k].add(accepted),
        tried_at=c.tried_at.at[:k].add(live),
        gained=c.gained + emitted,
    )


def _until_eos(
    tokens: Int[Array, "B S"], count: Int[Array, "B"], eos_ids: tuple[int, ...]
) -> tuple[Int[Array, "B"], Bool[Array, "B"]]:
    """Returns how many of the first `count` tokens count, EOS included, and if one ended."""
    size = tokens.shape[1]
    ends = is_eos(tokens, eos_ids) & (jnp.arange(size)[None] < count[:, None])
    has_eos = jnp.any(ends, axis=1)
    first = jnp.argmax(ends, axis=1).astype(jnp.int32)
    return jnp.where(has_eos, first + 1, count), has_eos
