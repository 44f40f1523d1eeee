"""What K is chosen, under a clock and drafts of which everything is known."""

import dataclasses

import jax
import numpy as np
import pytest
from checks import generation, tiny

from mil_jax.errors import UserError
from mil_jax.generate import adaptive, decode, speculative
from mil_jax.generate.adaptive import Chooser

PLAIN, DRAFT, HOST = 4.0, 0.4, 0.3  # Milliseconds of a step, a draft, a block.


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Fake:
    """A state as far as a chooser looks at it."""

    step: int
    accepted_at: np.ndarray
    tried_at: np.ndarray
    tokens: np.ndarray
    cache: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((1, 9)))
    is_behind: bool = dataclasses.field(default=False, metadata={"static": True})


class World:
    """Runs steps by the book: `rate(tokens)` is the chance of each draft."""

    def __init__(self, monkeypatch, rate, k_max=8, seed=0):
        self.rate, self.now, self.made, self.used = rate, 0.0, 0, []
        self.rng = np.random.default_rng(seed)
        self.state = Fake(0, *np.zeros((2, k_max), int), np.zeros((1, 9)))
        monkeypatch.setattr(adaptive.time, "perf_counter", lambda: self.now / 1e3)

    def advance(self, state, num_steps, *, k):
        state = dataclasses.replace(
            state, accepted_at=state.accepted_at.copy(), tried_at=state.tried_at.copy()
        )
        if k and state.is_behind:
            self.now += 1.0
        self.now += HOST
        for _ in range(num_steps):
            wins = self.rng.random(k) < self.rate(self.made)
            n = int(np.cumprod(wins).sum())
            state.accepted_at[:n] += 1
            state.tried_at[:k] += 1
            self.now += PLAIN + k * DRAFT
            self.made += n + 1
            self.used.append(k)
        return dataclasses.replace(state, step=state.step + num_steps, is_behind=k == 0)

    def run(self, chooser, tokens):
        """Returns the milliseconds per token."""
        before, made = self.now, self.made
        while self.made - made < tokens:
            self.state = chooser.run(self.advance, self.state)
        return (self.now - before) / (self.made - made)


def test_compilation_for_another_width_is_not_counted(monkeypatch):
    world, chooser = World(monkeypatch, lambda made: 0.9), Chooser(4)
    world.run(chooser, 400)
    before = dict(chooser.milliseconds)
    slow = dataclasses.replace(world.state, cache=np.zeros((1, 99)))

    def compiling(state, num_steps, *, k):
        world.now += 5e3
        return world.advance(state, num_steps, k=k)

    chooser.run(compiling, slow)
    assert chooser.milliseconds == before


@pytest.mark.parametrize(("k_max", "choices"), [(0, None), (8, (16,)), (8, (0, 2))])
def test_impossible_choices_are_refused(k_max, choices):
    with pytest.raises(UserError, match="cannot choose K"):
        Chooser(k_max, choices)


@pytest.mark.parametrize("rate", [0.0, 0.05])
def test_a_bad_draft_costs_little(monkeypatch, rate):
    world, chooser = World(monkeypatch, lambda made: rate), Chooser(8)
    assert PLAIN / world.run(chooser, 512) > 0.965  # While it learns.
    assert PLAIN / world.run(chooser, 256) > 0.97
    assert PLAIN / world.run(chooser, 2048) > 0.98


@pytest.mark.parametrize(("rate", "fair"), [(0.6, (2, 4)), (0.95, (8,))])
def test_a_good_draft_is_used(monkeypatch, rate, fair):
    world, chooser = World(monkeypatch, lambda made: rate), Chooser(8)
    world.run(chooser, 400)
    world.used.clear()
    found = world.run(chooser, 800)
    best = min(
        (PLAIN + k * DRAFT) / sum(rate**i for i in range(k + 1)) for k in (1, 2, 4, 8)
    )
    assert found < 1.1 * best
    assert np.mean(np.isin(world.used, fair)) > 0.8


def test_what_changes_is_noticed(monkeypatch):
    """A draft that is good, then bad for long, then good again."""
    world = World(monkeypatch, lambda made: 0.0 if 1000 < made < 3000 else 0.8)
    chooser = Chooser(4)
    good = world.run(chooser, 1000)
    bad = world.run(chooser, 2000)
    world.run(chooser, 2048)  # The longest stretch without a look.
    again = world.run(chooser, 1000)
    assert good < 0.6 * PLAIN
    assert bad < PLAIN / 0.96
    assert again < 0.6 * PLAIN


def test_choices():
    assert Chooser(8).choices == (1, 2, 4, 8)
    assert Chooser(5).choices == (1, 2, 4, 5)
    assert Chooser(1).choices == (1,)
    assert Chooser(6, (2, 6)).choices == (2, 6)


@pytest.mark.parametrize("name", ["mamba~", "mamba"])
def test_answers_are_the_targets(monkeypatch, name):
    monkeypatch.setattr(adaptive, "FIRST_WAIT", 5)
    target, (draft, _) = tiny.model("mamba"), generation.draft(name)
    kwargs = {"max_new_tokens": 50, "eos_ids": ()}
    expected = decode.generate(target, generation.PROMPTS, **kwargs)
    chooser = Chooser(3)
    answers, stats = speculative.generate(
        target, draft, generation.PROMPTS, k=chooser, **kwargs
    )
    assert answers.tokens.tolist() == expected.tokens.tolist()
    assert stats.num_steps == stats.steps.sum() > stats.tried_at[0] > 0
    assert set(chooser.milliseconds) >= {0, 3}
