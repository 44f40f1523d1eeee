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
# And so much more while plain steps were timed in one block only.
CLEAR_MARGIN = 1.15
# Steps of a block: of the first ones, and of one whose K has proved itself.
FIRST_BLOCK, LAST_BLOCK = 4, 32
# Tokens between two looks at a draft that was worth nothing; they double.
FIRST_WAIT, LAST_WAIT = 32, 2048
# What looks and other drafting may lose, per token.
LOSS = 0.02
# Most that is saved up or owed of it, in plain steps.
MOST_SAVED, MOST_OWED = 16.0, 4.0


class Advance(Protocol):
    """`speculative.advance` with its models."""

    def __call__(self, state: S, num_steps: int, *, k: int) -> S:
        """Returns the state some steps later."""


class Chooser:
    """Chooses K between blocks of steps: 0 (plain decoding) or one of a few.

    Expected tokens per step come from how often the draft's i-th token was accepted where
    those before it were; times are measured block by block. Plain steps come first, then
    `FIRST_BLOCK` steps of the smallest K, whatever they cost. From there on drafting is
    paid, as if no draft were accepted, from what it has gained and from `LOSS` of what was
    decoded; so a bad draft costs little, however long the answer. Where drafting does not
    pay it is tried again after ever longer stretches of plain decoding, so that a draft
    that becomes good is found. Keeps what it learnt from batch to batch.
    """

    def __init__(self, k_max: int = 8):
        """Takes the largest K; the others are the powers of two below it.

        Each is a program of its own, compiled when it is first chosen.
        """
        if k_max < 1:
            raise UserError(f"the largest K is {k_max}; it has to be at least 1")
        powers = {2**i for i in range(k_max.bit_length())}
        self.choices = tuple(sorted(powers | {k_max}))
        self.k_max = k_max
        self.k = 0
        self.milliseconds: dict[int, float] = {}
        self._plain_blocks = 0
        self._is_compiled: set[tuple] = set()
        self._reached, self._accepted = np.zeros((2, k_max))
        self._block = FIRST_BLOCK
        self._wait = FIRST_WAIT
        self._since = 0
        self._saved = 0.0  # In plain steps.

    def run(self, advance: Advance, state: S, limit: int = LAST_BLOCK) -> S:
        """Advances by one block and learns from it.

        Args:
            advance: Runs steps.
            state: Speculative, with at least one row that has not ended.
            limit: Most steps of the block.
        """
        before = _counts(state)
        k, size = self.k, min(self._block, limit)
        if k == 0 and self._since < self._wait:
            size = min(size, self._wait - self._since)
        state, prepared, preparation_ms = self._prepare(advance, state, k)
        start = time.perf_counter()
        state = advance(state, size - prepared, k=k)
        after = _counts(state)
        seconds = time.perf_counter() - start
        difference = {name: after[name] - before[name] for name in after}
        steps = int(difference.pop("step"))
        if steps > prepared:
            self._note_time(k, 1e3 * seconds / (steps - prepared))
        self._note_acceptance(k, steps, **difference)
        self._note_loss(k, steps, preparation_ms, **difference)
        self._choose(k, steps)
        return state

    def _prepare(self, advance: Advance, state: S, k: int) -> tuple[S, int, float]:
        """Compiles the programs of a block and lets the draft catch up.

        Neither is part of a step, and so not to be measured with them.

        Returns:
            The state, how many steps it has advanced, and the milliseconds that took, 0
            with compilation.
        """
        key = _program(state, k)
        is_compiled = key in self._is_compiled
        if is_compiled and not (k and state.is_behind):
            return state, 0, 0.0
        start = time.perf_counter()
        # Devices load what is new when it first runs.
        steps = 0 if is_compiled else 1
        state = advance(state, steps, k=k)
        _counts(state)
        self._is_compiled |= {key, _program(state, k)}
        seconds = time.perf_counter() - start
        return state, steps, 1e3 * seconds if is_compiled else 0.0

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
        return known[0] + k * max(min(slopes, default=0.0), 0.0)

    def _note_time(self, k: int, milliseconds: float) -> None:
        before = self.milliseconds.get(k, milliseconds)
        if before > 2 * milliseconds:
            before = milliseconds
        # A slow block may be another program's doing; a fast one is not.
        weight = 0.5 if milliseconds < before else 0.2
        self.milliseconds[k] = before + weight * (milliseconds - before)
        self._plain_blocks += k == 0
        # A step that drafts does all that a plain one does: where it was faster, the plain
        # ones were disturbed, and a useless draft would look like a gain for good.
        if 0 in self.milliseconds:
            self.milliseconds[0] = min(self.milliseconds.values())

    def _note_acceptance(
        self, k: int, steps: int, accepted_at: np.ndarray, tried_at: np.ndarray
    ) -> None:
        if not k:
            return
        reached = np.concatenate([tried_at[:1], accepted_at[: k - 1]])
        for total, new in ((self._reached, reached), (self._accepted, accepted_at[:k])):
            total *= 0.5 ** (steps / HALF_LIFE)
            total[:k] += new

    def _note_loss(
        self,
        k: int,
        steps: int,
        preparation_ms: float,
        accepted_at: np.ndarray,
        tried_at: np.ndarray,
    ) -> None:
        """Books what a block lost against plain decoding, in steps of that."""
        tokens, lost = float(steps), 0.0
        if k:
            tokens += steps * accepted_at.sum() / max(tried_at[0], 1)
            ms = steps * self.expected_ms(k) + preparation_ms
            lost = ms / self.milliseconds[0] - tokens
        saved = self._saved + LOSS * tokens - lost
        self._saved = float(np.clip(saved, -MOST_OWED, MOST_SAVED))

    def _choose(self, k: int, steps: int) -> None:
        self._since = self._since + steps if k == 0 else 0
        if len(self.milliseconds) < 2:
            self.k = self.choices[0] if 0 in self.milliseconds else 0
            return
        payable = [n for n in self.choices if self._payable_steps(n) >= 2]
        best = max(payable, key=self._rate, default=0)
        margin = MARGIN if self._plain_blocks > 1 else CLEAR_MARGIN
        if self._rate(best) < margin * self._rate(0):
            self._rest(k)
            return
        self._wait = FIRST_WAIT
        self._block = min(2 * self._block, LAST_BLOCK) if best == k else FIRST_BLOCK
        self._block = int(min(self._block, self._payable_steps(best)))
        self.k = best

    def _payable_steps(self, k: int) -> float:
        """Returns how many steps without an accepted draft what was saved up pays for."""
        cost = self._cost(k)
        return self._saved / cost if cost > 0 else np.inf

    def _cost(self, k: int) -> float:
        """Returns what a step of which no draft is accepted loses, in plain steps."""
        return max(self.expected_ms(k) / self.milliseconds[0] - 1, 0.0)

    def _rest(self, k: int) -> None:
        """Decodes plainly, but for a look at the draft now and then."""
        # What was measured may have been another program's doing.
        needed = min(FIRST_BLOCK * self._cost(self.choices[0]), MOST_OWED)
        is_payable = self._saved >= needed
        if k == 0 and self._since >= self._wait and is_payable:
            self._wait = min(2 * self._wait, LAST_WAIT)
            self.k, self._block = self.choices[0], FIRST_BLOCK
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


def _program(state: Any, k: int) -> tuple:
    """Returns what a block's programs depend on, with the width of the prompts."""
    shapes = tuple(np.shape(leaf) for leaf in jax.tree.leaves(state))
    return k, state.is_behind, shapes


def _counts(state: Any) -> dict[str, Any]:
    """Returns what the host needs to know, once the device is done."""
    return jax.device_get(
        {name: getattr(state, name) for name in ("step", "accepted_at", "tried_at")}
    )
