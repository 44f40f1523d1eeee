"""How many tokens to draft, from what drafts were worth and what steps took."""

import time
from typing import Any, Protocol, TypeVar

import jax
import numpy as np

from mil_jax.errors import UserError

S = TypeVar("S")

# Steps after which what was observed counts for half.
HALF_LIFE = 24
# Acceptance of which nothing is known yet is that of so many observations at the mean.
PRIOR = 1.0
# Speculation has to promise so much more than plain decoding.
MARGIN = 1.03
# Steps of a block: of the first ones, and of one whose K has proved itself.
FIRST_BLOCK, LAST_BLOCK = 4, 32
# Tokens between two looks at a draft that was worth nothing; they double.
FIRST_WAIT, LAST_WAIT = 128, 2048


class Advance(Protocol):
    """`speculative.advance` with its models."""

    def __call__(self, state: S, num_steps: int, *, k: int) -> S:
        """Returns the state some steps later."""


class Chooser:
    """Chooses K between blocks of steps: 0 (plain decoding) or one of a few.

    Expected tokens per step come from how often the draft's i-th token was accepted where
    those before it were; times are measured block by block. Where drafting does not pay it
    is tried again after ever longer stretches of plain decoding, so that a bad draft costs
    little and one that becomes good is found. Keeps what it learnt from batch to batch.
    """

    def __init__(self, k_max: int = 8, choices: tuple[int, ...] | None = None):
        """Takes the largest K, and which ones may be chosen (default 1, 2, 4, ..., k_max).

        Each is a program of its own, compiled when it is first chosen.
        """
        if k_max < 1 or not all(1 <= k <= k_max for k in choices or (1,)):
            raise UserError(f"cannot choose K among {choices} of at most {k_max}")
        powers = {2**i for i in range(k_max.bit_length()) if 2**i <= k_max}
        self.choices = tuple(sorted(set(choices or powers | {k_max})))
        self.k_max = k_max
        self.k = self.choices[min(2, len(self.choices) - 1)]
        self.milliseconds: dict[int, float] = {}
        self._is_compiled: set[tuple] = set()
        self._reached, self._accepted = np.zeros((2, k_max))
        self._block = FIRST_BLOCK
        self._wait = FIRST_WAIT
        self._since = 0

    def run(self, advance: Advance, state: S, limit: int = LAST_BLOCK) -> S:
        """Advances by one block and learns from it.

        Args:
            advance: Runs steps.
            state: Speculative, with at least one row that has not ended.
            limit: Most steps of the block.
        """
        before = _counts(state)
        k, was_behind = self.k, state.is_behind
        size = min(self._block, limit)
        if k == 0:
            size = min(size, max(self._wait - self._since, 1))
        start = time.perf_counter()
        state = advance(state, size, k=k)
        after = _counts(state)
        seconds = time.perf_counter() - start
        steps = int(after["step"] - before["step"])
        # Compilation and catching up are no part of a step. What is compiled depends on
        # the width of the prompts too, which the caches tell.
        key = (k, tuple(np.shape(leaf) for leaf in jax.tree.leaves(state)))
        if key in self._is_compiled and not (k and was_behind) and steps:
            self._note_time(k, 1e3 * seconds / steps)
        self._is_compiled.add(key)
        difference = {
            name: after[name] - before[name] for name in ("accepted_at", "tried_at")
        }
        self._note_acceptance(k, steps, **difference)
        self._choose(k, steps)
        return state

    def expected_tokens(self, k: int) -> float:
        """Returns the mean tokens of a step with k drafts."""
        return float(1 + np.sum(np.cumprod(self.acceptance()[:k])))

    def acceptance(self) -> np.ndarray:
        """Returns how often a draft is accepted where those before it are, [K]."""
        mean = (self._accepted.sum() + 0.5) / (self._reached.sum() + 1)
        return (self._accepted + PRIOR * mean) / (self._reached + PRIOR)

    def expected_ms(self, k: int) -> float:
        """Returns what a step takes, measured or drawn from those that were."""
        known = self.milliseconds
        if k in known:
            return known[k]
        # Steps cost what plain ones do, and as much more for every draft.
        slopes = [(known[n] - known[0]) / n for n in known if n]
        return known[0] + k * max(min(slopes), 0.0)

    def _note_time(self, k: int, milliseconds: float) -> None:
        before = self.milliseconds.get(k, milliseconds)
        # A slow block may be another program's doing; a fast one is not.
        weight = 0.5 if milliseconds < before else 0.2
        self.milliseconds[k] = before + weight * (milliseconds - before)

    def _note_acceptance(
        self, k: int, steps: int, accepted_at: np.ndarray, tried_at: np.ndarray
    ) -> None:
        if not k:
            return
        reached = np.concatenate([tried_at[:1], accepted_at[: k - 1]])
        for total, new in ((self._reached, reached), (self._accepted, accepted_at[:k])):
            total *= 0.5 ** (steps / HALF_LIFE)
            total[:k] += new

    def _choose(self, k: int, steps: int) -> None:
        self._since = self._since + steps if k == 0 else 0
        untimed = next(
            (n for n in (self.k or k, 0) if n not in self.milliseconds), None
        )
        if untimed is not None:
            self.k, self._block = untimed, FIRST_BLOCK
            return
        best = max(self.choices, key=self._rate)
        if self._rate(best) < MARGIN * self._rate(0):
            self._rest(k)
            return
        self._wait = FIRST_WAIT
        self._block = min(2 * self._block, LAST_BLOCK) if best == k else FIRST_BLOCK
        self.k = best

    def _rest(self, k: int) -> None:
        """Decodes plainly, but for a look at the draft now and then."""
        if k == 0 and self._since >= self._wait:
            self._wait = min(2 * self._wait, LAST_WAIT)
            self.k, self._block = (
                self.choices[min(1, len(self.choices) - 1)],
                FIRST_BLOCK,
            )
            # What is seen now counts for more than what is remembered.
            self._reached /= 4
            self._accepted /= 4
            return
        self._block = LAST_BLOCK if k == 0 else FIRST_BLOCK
        self._block = min(2 * self._block, LAST_BLOCK)
        self.k = 0

    def _rate(self, k: int) -> float:
        return (
            self.expected_tokens(k) / self.expected_ms(k)
            if k
            else (1 / self.milliseconds[0])
        )


def _counts(state: Any) -> dict[str, Any]:
    """Returns what the host needs to know, once the device is done."""
    return jax.device_get(
        {name: getattr(state, name) for name in ("step", "accepted_at", "tried_at")}
    )
