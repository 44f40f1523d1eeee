r"""Times decoding at true shapes with random weights: plain, speculative, and by part.

python -m mil_jax.bench_decode --shape llama3_8b --mixer mamba --attention 0.5 \
    --prompt 1024 --k 4 --draft-layers 2 --draft-vocab 32768 --tokens-per-step 3.0 \
    --out benchmarks/results/decode_h200.json

Random weights never agree, so drafts are accepted by lot: drafting and verification run in
full, but each draft passes with the probability that gives --tokens-per-step. Everything
else of the loop is the one that `mil_jax.generate` runs. Times do not depend on what a cache
holds, so the prompt is not read unless --read or --prefill-only ask for it.
"""

import argparse
import dataclasses
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mil_jax import benchmarking, shapes
from mil_jax.config import ComputeConfig, ModelConfig
from mil_jax.generate import decode, speculative
from mil_jax.generate.adaptive import Chooser
from mil_jax.generate.sampler import Sampling
from mil_jax.models.cache import init_cache
from mil_jax.models.decoder import (
    FLOAT32_NAMES,
    Blueprint,
    Frozen,
    HybridLM,
    freeze,
    thaw,
)

REPETITIONS = 3
# Fields that name a row of the results.
KEY = (
    "model",
    "mode",
    "batch",
    "prompt",
    "k",
    "draft",
    "tokens_per_step",
    "dtype",
    "chunk",
)
_STARTED = time.perf_counter()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    args = _parse(argv)
    for row in Bench(args).run():
        say(row)
        # At once: what follows may be killed.
        if args.out:
            benchmarking.record(Path(args.out), row, KEY)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", default="llama3_8b", choices=sorted(shapes.SHAPES))
    add("--mixer", default="mamba", choices=("mamba", "mamba2"))
    add("--attention", type=float, default=0.5, help="share of attention layers")
    add("--prompt", type=int, default=1024, help="tokens of a prompt")
    add("--batch", type=int, default=1)
    add("--tokens", type=int, default=64, help="tokens of the shorter timed run")
    add("--chunk", type=int, help="positions of a prompt that are read at a time")
    add("--read", action="store_true", help="read the prompt; else random values")
    add(
        "--k", type=int, default=4, help="drafts of a step; 0 times plain decoding only"
    )
    add("--draft-layers", type=int, default=2, help="attention layers of the draft")
    add("--draft-shape", choices=sorted(shapes.SHAPES), help="another model as draft")
    add("--draft-vocab", type=int, default=0, help="tokens of the draft's head; 0: all")
    add("--tokens-per-step", type=float, default=3.0)
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    add(
        "--adaptive",
        action="store_true",
        help="times the choice between 0 and k drafts too, with a draft that is never right",
    )
    add("--prefill-only", action="store_true", help="time the prompt alone")
    add("--out", help="JSON file that gets the rows")
    args = parser.parse_args(argv)
    depth = shapes.SHAPES[args.shape].n_layers
    if args.k and not args.draft_shape and not 1 <= args.draft_layers <= depth:
        parser.error(f"--draft-layers is {args.draft_layers}; {args.shape} has {depth}")
    if args.k and not 1 <= args.tokens_per_step <= args.k + 1:
        parser.error(f"--tokens-per-step is {args.tokens_per_step}; k gives 1 to k + 1")
    return args


def random_model(config: ModelConfig, compute: ComputeConfig, seed: int) -> HybridLM:
    """Returns a model with random weights that were made where they are used."""
    blueprint = Blueprint.create(config, compute)
    weights = {}
    for i, (name, leaf) in enumerate(blueprint.abstract().items()):
        key = jax.random.fold_in(jax.random.key(seed), i)
        kind = "recurrence" if name.endswith(FLOAT32_NAMES) else "weight"
        kind = "scale" if name.endswith("scale") else kind
        weights[name] = _random(key, leaf.shape, leaf.dtype, kind)
    return blueprint.model(weights)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _random(
    key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, kind: str
) -> jax.Array:
    if kind == "scale":
        return jnp.ones(shape, dtype)
    if kind == "recurrence":
        return jax.random.uniform(key, shape, dtype, -1.0, 1.0)
    return jax.random.normal(key, shape, dtype) * jnp.asarray(0.02, dtype)


class Bench:
    """Models of one command and what is measured on them."""

    def __init__(self, args: argparse.Namespace):
        compute = ComputeConfig(
            dtype=args.dtype, param_dtype=args.dtype, layout="decode"
        )
        base = shapes.SHAPES[args.shape]
        self.args = args
        self.config = base
        self.name = args.shape
        if base.n_heads:
            self.config = shapes.hybrid(base, args.mixer, args.attention)
            share = round(100 * args.attention)
            self.name = (
                f"{args.shape}_{args.mixer}_{share}" if share < 100 else (args.shape)
            )
        self.target = freeze(random_model(self.config, compute, 0))
        self.draft, self.draft_name = None, None
        if args.k:
            small = shapes.SHAPES.get(args.draft_shape) or shapes.keep(
                base, args.draft_layers
            )
            draft = random_model(small, compute, 1)
            self.draft_name = args.draft_shape or f"{args.draft_layers} layers"
            if args.draft_vocab:
                draft = draft.with_vocab(np.arange(args.draft_vocab))
                self.draft_name += f", head of {args.draft_vocab}"
            self.draft = freeze(draft)
        third = max(args.tokens // 3, 1)
        steps = max(num_steps(args.tokens), (args.k + 1) * num_steps(third))
        self.max_new_tokens = max(steps, 8 * args.tokens) + 2
        rng = np.random.default_rng(0)
        self.prompts = rng.integers(
            0, self.config.vocab_size, (args.batch, args.prompt), np.int32
        )

    def run(self) -> Iterator[dict[str, Any]]:
        """Yields rows as they are measured; a later one may replace an earlier."""
        args = self.args
        bandwidth = read_bandwidth()
        say(f"{jax.devices()[0].device_kind}: reads {bandwidth / 1e12:.2f} TB/s")
        say(f"{self.name}: {weight_bytes(self.target) / 1e9:.2f} GB of weights")
        row = {
            "model": self.name,
            "batch": args.batch,
            "prompt": args.prompt,
            "draft": None,
            "tokens_per_step": None,
            "dtype": args.dtype,
            "chunk": args.chunk,
            "cache": "read" if args.read else "random",
            # Every row has these fields; only speculation has times for them.
            "draft_ms": None,
            "verify_ms": None,
            "speedup": None,
        }
        if args.prefill_only:
            ms = self.time_prefill()
            mode = {"mode": "prefill", "k": 0, "step_ms": round(ms, 2)}
            tok_s = args.batch * args.prompt / ms * 1e3
            yield {**row, **mode, "tok_s": round(tok_s, 1), **memory()}
            return
        plain_ms = self.time_plain()
        read = self.bytes_per_step()
        yield {
            **row,
            "mode": "plain",
            "k": 0,
            "tok_s": round(1e3 * args.batch / plain_ms, 1),
            "tb_s": round(read / plain_ms / 1e9, 3),
            "bandwidth_share": round(read / plain_ms * 1e3 / bandwidth, 3),
            "step_ms": round(plain_ms, 4),
            **memory(),
        }
        if args.k:
            yield from self.time_speculation(row, plain_ms, bandwidth)
        if args.k and args.adaptive:
            yield self.time_adaptive(row, plain_ms)

    def start(self) -> decode.State:
        """Reads the prompts."""
        return decode.start(
            self.target,
            self.prompts,
            max_new_tokens=self.max_new_tokens,
            eos_ids=(),
            chunk=self.args.chunk,
        )

    def time_prefill(self) -> float:
        """Returns the milliseconds of reading the prompts."""
        jax.block_until_ready(self.start())
        return median_ms(self.start)

    def time_plain(self) -> float:
        """Returns the milliseconds of a plain step."""
        state = self.start() if self.args.read else self.unread(self.target, 1)
        advance = functools.partial(decode.advance, self.target)
        return time_loop(state, advance, self.args.tokens)[0]

    def unread(self, model: Frozen, max_step: int) -> decode.State:
        """Returns a state as after the prompts, of which nothing was read."""
        return _random_state(
            model, *self.prompts.shape, max_step, max_new_tokens=self.max_new_tokens
        )

    def unread_speculative(self) -> speculative.State:
        """Returns a state for speculation, the prompts unread: times are the same."""
        k = self.args.k
        state, draft = self.unread(self.target, k + 1), self.unread(self.draft, k + 1)
        behind = dataclasses.replace(draft.cache, lengths=draft.cache.lengths - 1)
        tokens = jnp.pad(state.tokens, ((0, 0), (0, k + 1)))
        counts = [jnp.zeros((k,), jnp.int32) for _ in range(2)]
        zeros = [jnp.zeros_like(state.lengths) for _ in range(3)]
        return speculative.State(
            tokens=tokens,
            lengths=state.lengths,
            done=state.done,
            last_prompt=zeros[0],
            last_two=jnp.zeros((len(self.prompts), 2), jnp.int32),
            step=state.step,
            keys=state.keys,
            target_cache=state.cache,
            draft_cache=behind,
            steps=zeros[1],
            accepted_at=counts[0],
            tried_at=counts[1],
            gained=zeros[2],
            max_new_tokens=self.max_new_tokens,
            sampling=state.sampling,
            eos_ids=state.eos_ids,
        )

    def time_speculation(
        self, row: dict[str, Any], plain_ms: float, bandwidth: float
    ) -> Iterator[dict[str, Any]]:
        """Yields the row of the speculative loop, then the same with its parts."""
        args, k = self.args, self.args.k
        verify = functools.partial(
            lot, probability=acceptance_of(args.tokens_per_step, k)
        )
        advance = functools.partial(
            speculative.advance, self.target, self.draft, verify=verify
        )
        count = max(args.tokens // 3, 1)
        step_ms, state = time_loop(self.unread_speculative(), advance, count)
        drawn = speculative.stats(state).tokens_per_step
        # The share of accepted drafts hardly changes a step's time, so the asked mean counts,
        # not what was drawn in these few steps.
        gained = args.tokens_per_step
        tok_s = 1e3 * args.batch * gained / step_ms
        read = self.bytes_per_step() + k * weight_bytes(self.draft, head_only_read=True)
        row = {
            **row,
            "mode": "speculative",
            "k": k,
            "draft": self.draft_name,
            "tok_s": round(tok_s, 1),
            "tb_s": round(read / step_ms / 1e9, 3),
            "bandwidth_share": round(read / step_ms * 1e3 / bandwidth, 3),
            "step_ms": round(step_ms, 4),
            "tokens_per_step": gained,
            "acceptance": f"by lot, {drawn:.2f} drawn",
            "plain_ms": round(plain_ms, 4),
            "speedup": round(tok_s / (1e3 * args.batch / plain_ms), 3),
            **memory(),
        }
        yield row
        draft_ms, verify_ms, judge_ms = self.time_parts(state, verify)
        yield {
            **row,
            "draft_ms": round(draft_ms, 4),
            "verify_ms": round(verify_ms, 4),
            "sampling_ms": round(judge_ms, 4),
            "rest_ms": round(step_ms - draft_ms - verify_ms - judge_ms, 4),
            "draft_step_share": round(draft_ms / k / plain_ms, 4),
            "verify_share": round(verify_ms / plain_ms, 4),
        }

    def time_adaptive(self, row: dict[str, Any], plain_ms: float) -> dict[str, Any]:
        """Returns the row of adaptive speculation with a draft that is never right."""
        args = self.args
        count = 8 * args.tokens
        advance = functools.partial(
            speculative.advance,
            self.target,
            self.draft,
            verify=functools.partial(lot, probability=0.0),
        )
        times = []
        # Programs are compiled in the first run.
        for _ in range(REPETITIONS):
            state = self.unread_speculative()
            chooser = Chooser(args.k)  # That has seen nothing of the draft.
            # A row of which only so many tokens are wanted.
            start = jnp.full_like(state.lengths, self.max_new_tokens - count)
            state = dataclasses.replace(state, lengths=start)
            jax.block_until_ready(state)
            before = time.perf_counter()
            while not np.all(state.done):
                state = chooser.run(advance, state)
            times.append(1e3 * (time.perf_counter() - before) / count)
            drafted = int(np.asarray(state.tried_at)[0])
            say(f"  {times[-1]:.4f} ms a token; {drafted} of {count} steps drafted")
        ms = statistics.median(times[1:])
        return {
            **row,
            "mode": "adaptive",
            "k": args.k,
            "draft": self.draft_name,
            "tok_s": round(1e3 * args.batch / ms, 1),
            "step_ms": round(ms, 4),
            "tokens_per_step": 1.0,
            "acceptance": "none",
            "plain_ms": round(plain_ms, 4),
            "speedup": round(plain_ms / ms, 4),
            **memory(),
        }

    def time_parts(
        self, state: speculative.State, verify: speculative.Verify
    ) -> tuple[float, float, float]:
        """Returns the milliseconds of drafting, verifying and judging, each in a loop."""
        k, count = self.args.k, 32
        zeros = jnp.zeros_like(state.lengths)

        @functools.partial(jax.jit, donate_argnums=1)
        def draft(model: Frozen, cache: Any, last_two: jax.Array) -> Any:
            def body(i: int, carry: tuple) -> tuple:
                cache, last = carry
                tokens, _, cache = speculative.propose(
                    thaw(model), state.keys, last, cache, k, Sampling()
                )
                return cache.keep(zeros), jnp.concatenate([last, tokens], 1)[:, -2:]

            return jax.lax.fori_loop(0, count, body, (cache, last_two))

        @functools.partial(jax.jit, donate_argnums=1)
        def check(model: Frozen, cache: Any, last: jax.Array) -> Any:
            def body(i: int, carry: tuple) -> tuple:
                cache, last = carry
                inputs = jnp.repeat(last, k + 1, axis=1)
                logits, cache = thaw(model).decode(inputs, cache)
                token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
                return cache.keep(zeros), token[:, -1:]

            return jax.lax.fori_loop(0, count, body, (cache, last))

        @jax.jit
        def judge(logits: jax.Array, drafts: jax.Array) -> Any:
            def body(i: int, carry: jax.Array) -> jax.Array:
                moved = logits + carry[0].astype(logits.dtype)
                verdict = verify(state.keys, moved, None, drafts, Sampling())
                return verdict.num_accepted

            return jax.lax.fori_loop(0, count, body, zeros)

        last_two = jnp.zeros((len(self.prompts), 2), jnp.int32)
        draft_ms = time_donating(draft, self.draft, state.draft_cache, last_two) / count
        cache = state.target_cache
        verify_ms = time_donating(check, self.target, cache, last_two[:, :1]) / count
        shape = (len(self.prompts), k + 1, self.config.vocab_size)
        logits, drafts = jnp.ones(shape), jnp.zeros((len(self.prompts), k), jnp.int32)
        jax.block_until_ready(judge(logits, drafts))
        judge_ms = median_ms(lambda: judge(logits, drafts)) / count
        # The loop of verification takes the likeliest tokens too, to depend on itself.
        return draft_ms, verify_ms - judge_ms, judge_ms

    def bytes_per_step(self) -> float:
        """Returns what a plain step has to read: weights, keys and values, states."""
        args, config = self.args, self.config
        size = jnp.dtype(args.dtype).itemsize
        length = args.prompt + num_steps(args.tokens) / 2
        if config.sliding_window:
            length = min(length, config.sliding_window)
        kv = 2 * config.n_kv_heads * config.head_dim * size * length
        layers = config.n_layers - len(config.ssm_layers)
        state = 0
        if config.ssm:
            # Read and written, float32.
            state = 8 * config.ssm.d_inner * config.ssm.d_state
        per_row = layers * kv + len(config.ssm_layers) * state
        return weight_bytes(self.target, head_only_read=True) + args.batch * per_row


def say(what: Any) -> None:
    """Prints at once, with the seconds since the start."""
    print(f"[{time.perf_counter() - _STARTED:.0f}s] {what}", flush=True)


def weight_bytes(model: Frozen, *, head_only_read: bool = False) -> int:
    """Returns the size of the weights, or of those that every token reads whole."""
    lm = thaw(model)
    total = sum(leaf.nbytes for leaf in model.arrays)
    if head_only_read and lm.lm_head is not None:
        total -= lm.embed.embedding[...].nbytes
    return total


def memory() -> dict[str, float]:
    """Returns the most memory that was in use so far."""
    stats = jax.devices()[0].memory_stats() or {}
    return {"peak_gb": round(stats.get("peak_bytes_in_use", 0) / 1e9, 2)}


def acceptance_of(tokens_per_step: float, k: int) -> float:
    """Returns the chance of each draft for which a step gives so many tokens."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        mean = sum(middle**i for i in range(k + 1))
        low, high = (middle, high) if mean < tokens_per_step else (low, middle)
    return low


def lot(
    key: jax.Array,
    target_logits: jax.Array,
    draft_logits: jax.Array | None,
    drafts: jax.Array,
    sampling: Sampling,
    *,
    probability: float,
) -> speculative.Verdict:
    """Judges as `speculative.verify` does if greedy, but accepts drafts by lot."""
    del draft_logits, sampling
    choice = jnp.argmax(target_logits, axis=-1).astype(jnp.int32)
    draw = jax.vmap(lambda key: jax.random.uniform(key, drafts.shape[1:]))(key)
    return speculative.accept(draw < probability, choice, drafts)


@functools.partial(
    jax.jit, static_argnames=("batch", "prompt", "max_step", "max_new_tokens")
)
def _random_state(
    model: Frozen, batch: int, prompt: int, max_step: int, *, max_new_tokens: int
) -> decode.State:
    # Room for a draft that catches up, too.
    length = prompt + max_new_tokens + speculative.CATCH_UP
    cache = init_cache(
        model.config, model.compute, batch=batch, max_length=length, max_step=max_step
    )
    empty, tree = jax.tree.flatten(cache.layers)
    # Zeros would be kinder to the device than what a prompt leaves behind.
    filled = [
        jax.random.normal(jax.random.key(i), leaf.shape, leaf.dtype)
        for i, leaf in enumerate(empty)
    ]
    zeros = jnp.zeros((batch,), jnp.int32)
    return decode.State(
        tokens=jnp.zeros((batch, max_new_tokens), jnp.int32),
        lengths=zeros + 1,
        done=zeros > 0,
        last=zeros,
        step=jnp.int32(1),
        keys=jax.vmap(jax.random.key)(jnp.arange(batch)),
        cache=dataclasses.replace(
            cache, layers=tree.unflatten(filled), lengths=zeros + prompt
        ),
        sampling=Sampling(),
        eos_ids=(),
    )


def num_steps(count: int) -> int:
    """Returns how many steps `time_loop` runs."""
    return 1 + REPETITIONS * 3 * count


def time_loop(
    state: Any, advance: Callable[[Any, int], Any], count: int
) -> tuple[float, Any]:
    """Returns the milliseconds of a step, and the last state.

    From runs of `count` steps and of twice as many: the difference is free of what a call
    costs once.
    """
    state = jax.block_until_ready(advance(state, 1))
    times: dict[int, list[float]] = {count: [], 2 * count: []}
    for _ in range(REPETITIONS):
        for steps, found in times.items():
            before = time.perf_counter()
            state = jax.block_until_ready(advance(state, steps))
            found.append(1e3 * (time.perf_counter() - before))
    short, long = (statistics.median(found) for found in times.values())
    say(f"  {count} steps {short:.2f} ms, {2 * count} steps {long:.2f} ms")
    # On a busy machine a short run may take longer than a long one.
    return (long - short if long > short else long / 2) / count, state


def time_donating(run: Callable[..., Any], model: Frozen, cache: Any, x: Any) -> float:
    """Returns the median milliseconds of calls that hand the cache on."""
    cache, _ = jax.block_until_ready(run(model, cache, x))
    times = []
    for _ in range(REPETITIONS):
        before = time.perf_counter()
        cache, _ = jax.block_until_ready(run(model, cache, x))
        times.append(1e3 * (time.perf_counter() - before))
    return statistics.median(times)


def median_ms(run: Callable[[], Any]) -> float:
    """Returns the median milliseconds of a call."""
    times = []
    for _ in range(REPETITIONS):
        before = time.perf_counter()
        jax.block_until_ready(run())
        times.append(1e3 * (time.perf_counter() - before))
    return statistics.median(times)


def read_bandwidth() -> float:
    """Returns the bytes per second at which the device reads an array."""
    num_bytes = 1e7 if jax.default_backend() == "cpu" else 4e9
    columns = 4096
    rows = math.ceil(num_bytes / columns / 4)
    values = jnp.ones((rows, columns), jnp.float32)

    @jax.jit
    def read(values: jax.Array) -> jax.Array:
        def body(i: int, total: jax.Array) -> jax.Array:
            return total + jnp.max(values + total, axis=1)[0] * 0

        return jax.lax.fori_loop(0, 10, body, jnp.float32(0))

    jax.block_until_ready(read(values))
    return values.nbytes * 10 / (median_ms(lambda: read(values)) / 1e3)


if __name__ == "__main__":
    sys.exit(main())
