"""Running models that turn prompts into texts, a block of tokens at a time."""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import numpy as np

from mil_jax.checkpoint import models
from mil_jax.config import ComputeConfig
from mil_jax.data.chat import Tokenizer
from mil_jax.generate import decode, speculative
from mil_jax.generate.adaptive import Chooser
from mil_jax.generate.plan import AUTO, Plan
from mil_jax.models import decoder
from mil_jax.models.decoder import HybridLM

T = TypeVar("T")
logger = logging.getLogger(__name__)

# A character's bytes that may have been decoded before its last, and the EOS behind them.
_LONGEST_TAIL = 4
_BROKEN = "\ufffd"


@dataclasses.dataclass(frozen=True)
class Answer:
    """A finished answer.

    Attributes:
        text: Cut before the first stop string.
        num_tokens: Tokens that were decoded for it.
        finish: What ended it: "eos", "stop" (a stop string) or "length".
    """

    text: str
    num_tokens: int
    finish: Literal["eos", "stop", "length"]


@dataclasses.dataclass
class Speed:
    """What answers cost, compilation aside."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0
    num_steps: int = 0
    gained: int = 0
    accepted_at: np.ndarray | None = None
    tried_at: np.ndarray | None = None

    def line(self) -> str:
        """Returns all of it as one line."""
        parts = [
            f"prompt {_rate(self.prompt_tokens, self.prompt_seconds)}",
            f"answer {_rate(self.tokens, self.seconds)}",
        ]
        if self.num_steps:
            parts.append(f"{self.gained / self.num_steps:.2f} tokens per step")
            # Where K is chosen, the last positions may never be.
            tried = np.flatnonzero(self.tried_at)
            shares = self.accepted_at[tried] / self.tried_at[tried]
            if tried.size:
                text = " ".join(f"{share:.0%}" for share in shares)
                parts.append(f"accepted at 1 to {tried.size}: {text}")
        return "; ".join([*parts, f"compiled in {self.compile_seconds:.1f} s"])


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens} tokens at {tokens / max(seconds, 1e-9):,.1f} tokens/s"


class Engine:
    """Running models; `speed` sums up what they did."""

    def __init__(self, plan: Plan, model: HybridLM, draft: HybridLM | None):
        self.plan = plan
        self.speed = Speed()
        self._model = decoder.freeze(model)
        self._draft = None if draft is None else decoder.freeze(draft)
        self._chooser = Chooser() if plan.options.k == AUTO else None
        self._last_compile = _watch_compilation()

    def answer(
        self,
        prompts: Sequence[np.ndarray],
        rows: Sequence[int],
        *,
        used: int | None = None,
        width: int | None = None,
        block: int = 64,
        show: Callable[[str], None] | None = None,
    ) -> list[Answer]:
        """Answers a batch, some steps at a time.

        Args:
            prompts: From `Plan.encode`.
            rows: A number per prompt; what a row draws depends on it and the seed alone.
            used: Only so many are answered, the others fill the batch.
            width: As in `decode.start`.
            block: Steps between two looks at the answers.
            show: Gets the text of each row so far, as far as nothing can change it.
        """
        used = len(prompts) if used is None else used
        state, seconds, compiled = self._timed(
            lambda: self._start(prompts, rows, width)
        )
        self.speed.prompt_tokens += sum(prompt.size for prompt in prompts[:used])
        self.speed.prompt_seconds += seconds
        self.speed.compile_seconds += compiled
        answers: dict[int, Answer] = {}
        seen = _fetch(state)
        try:
            while True:
                for i in range(used):
                    if i not in answers and (answer := self._look(seen, i, show)):
                        answers[i] = answer
                if len(answers) == used:
                    return [answers[i] for i in range(used)]
                ended = [i >= used or i in answers for i in range(len(prompts))]
                state = decode.finish(state, ended)
                work = functools.partial(self._advance, state, block)
                state, seconds, compiled = self._timed(work)
                self.speed.seconds += seconds
                self.speed.compile_seconds += compiled
                seen = _fetch(state)
        finally:  # Also of an answer that was interrupted.
            self._count(seen, used)

    def _start(self, prompts: Sequence[np.ndarray], rows: Sequence[int], width: Any):
        options = self.plan.options
        kwargs = {
            "max_new_tokens": options.max_new_tokens,
            "sampling": options.sampling,
            "eos_ids": self.plan.eos_ids,
            "seed": options.seed,
            "rows": rows,
            "width": width,
        }
        if self._draft is None:
            return decode.start(self._model, prompts, **kwargs)
        k = self._chooser.k_max if self._chooser else options.k
        return speculative.start(self._model, self._draft, prompts, k=k, **kwargs)

    def _advance(self, state: Any, block: int) -> Any:
        if self._draft is None:
            return decode.advance(self._model, state, block)
        advance = functools.partial(speculative.advance, self._model, self._draft)
        if self._chooser is None:
            return advance(state, block)
        return self._chooser.run(advance, state, block)

    def _timed(self, work: Callable[[], T]) -> tuple[T, float, float]:
        """Returns the result, the seconds it ran and those it was compiled before."""
        start = time.perf_counter()
        result = jax.block_until_ready(work())
        begin = max(start, self._last_compile[0])
        return result, time.perf_counter() - begin, begin - start

    def _count(self, seen: "_Seen", used: int) -> None:
        # The prompt's pass makes the first token.
        self.speed.tokens += int(seen.lengths[:used].sum()) - used
        if seen.accepted_at is not None:
            self.speed.num_steps += int(seen.steps.sum())
            self.speed.gained += int(seen.gained.sum())
            for name in ("accepted_at", "tried_at"):
                before, new = getattr(self.speed, name), getattr(seen, name)
                setattr(self.speed, name, new if before is None else before + new)

    def _look(
        self, seen: "_Seen", row: int, show: Callable[[str], None] | None
    ) -> Answer | None:
        """Shows a row that goes on, or returns its answer."""
        stops = self.plan.options.stop
        is_done = bool(seen.done[row])
        if not (is_done or stops or show):
            return None
        tokens = seen.tokens[row, : seen.lengths[row]]
        text, is_stopped = cut(text_of(self.plan.tokenizer, tokens), stops)
        if show is not None:
            show(text if is_done or is_stopped else settled(text, stops))
        if not (is_done or is_stopped):
            return None
        finish = "eos" if int(tokens[-1]) in self.plan.eos_ids else "length"
        return Answer(text, tokens.size, "stop" if is_stopped else finish)


class _Seen(NamedTuple):
    """A state as the host sees it."""

    tokens: np.ndarray
    lengths: np.ndarray
    done: np.ndarray
    steps: np.ndarray | None
    gained: np.ndarray | None
    accepted_at: np.ndarray | None
    tried_at: np.ndarray | None


def _fetch(state: decode.State | speculative.State) -> _Seen:
    values = {name: getattr(state, name, None) for name in _Seen._fields}
    seen = _Seen(**jax.device_get(values))
    if isinstance(state, speculative.State):
        return seen._replace(tokens=seen.tokens[:, : state.max_new_tokens])
    return seen


def text_of(tokenizer: Tokenizer, tokens: Sequence[int] | np.ndarray) -> str:
    """Returns the text of an answer without its special tokens.

    A last character of which bytes are missing is left out.
    """

    def text(size: int) -> str:
        return tokenizer.decode(
            tokens[:size], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    size = len(tokens)
    whole = text(size)
    if not whole.endswith(_BROKEN):
        return whole
    shorter = map(text, range(size - 1, max(size - _LONGEST_TAIL, 0) - 1, -1))
    return next((t for t in shorter if not t.endswith(_BROKEN)), whole)


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Returns the text before the stop string that is complete first, if there is one.

    What comes first in the text may be complete only later, and has not been seen by then.
    """
    found = [
        (text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text
    ]
    return (text[: min(found)[1]], True) if found else (text, False)


def settled(text: str, stops: Sequence[str]) -> str:
    """Returns the beginning of an unfinished text that no later token can change."""
    text = text.rstrip(_BROKEN)
    held = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return text[: len(text) - max(held, default=0)]


@functools.cache
def _watch_compilation() -> list[float]:
    """Returns a list of one: when the last compilation ended."""
    last = [0.0]

    def note(event: str, seconds: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            last[0] = time.perf_counter()

    jax.monitoring.register_event_duration_secs_listener(note)
    return last


def load(plan: Plan) -> Engine:
    """Returns the models of a plan on the default device."""
    compute = ComputeConfig(dtype=plan.dtype, param_dtype=plan.dtype, layout="decode")
    logger.info("reading %s; the first answer waits for compilation", plan.folder)

    def build(folder: Path) -> HybridLM:
        checkpoint = models.load(folder)
        return decoder.build(checkpoint.config, checkpoint.params, compute)

    draft = None if plan.draft_folder is None else build(plan.draft_folder)
    if plan.draft_vocab is not None:
        draft = draft.with_vocab(plan.draft_vocab)
    return Engine(plan, build(plan.folder), draft)
