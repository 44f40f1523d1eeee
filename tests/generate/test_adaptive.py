"""What K is chosen, under a clock and drafts of which everything is known."""

import dataclasses
import itertools

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


def test_waits_between_two_looks_double(monkeypatch):
    world = World(monkeypatch, lambda made: 0.0)
    world.run(Chooser(8), 9000)
    runs = [(k, len(list(steps))) for k, steps in itertools.groupby(world.used)]
    waits = [steps for k, steps in runs if k == 0]
    assert waits[:7] == [128, 256, 512, 1024, 2048, 2048, 2048]


def test_catching_up_is_no_part_of_a_step(monkeypatch):
    world, chooser = World(monkeypatch, lambda made: 0.0), Chooser(8)
    world.run(chooser, 3000)
    # All looks are blocks of four steps, each after plain ones.
    assert chooser.milliseconds[2] == pytest.approx(PLAIN + 2 * DRAFT + HOST / 4)


def test_a_look_counts_for_more_than_what_is_remembered(monkeypatch):
    """A draft that was bad for very long is used soon after it has become fair."""
    world = World(monkeypatch, lambda made: 0.0 if made < 9000 else 0.6)
    chooser = Chooser(4)
    world.run(chooser, 9000)
    world.used.clear()
    world.run(chooser, 12000)
    assert np.mean(np.array(world.used) > 0) > 0.75


@pytest.mark.parametrize(("gain", "is_used"), [(1.02, False), (1.05, True)])
def test_drafting_has_to_promise_some_gain(monkeypatch, gain, is_used):
    """Against plain decoding, with drafts whose worth is known and blocks for free."""
    world, chooser = World(monkeypatch, lambda made: 0.5), Chooser(1)
    monkeypatch.setitem(globals(), "HOST", 0.0)
    tokens = gain * (PLAIN + DRAFT) / PLAIN
    monkeypatch.setattr(chooser, "expected_tokens", lambda k: tokens if k else 1.0)
    world.run(chooser, 200)
    world.used.clear()
    world.run(chooser, 100)
    assert (1 in world.used) == is_used


def test_a_slow_block_moves_the_time_less_than_a_fast_one(monkeypatch):
    world, chooser = World(monkeypatch, lambda made: 1.0), Chooser(4)
    world.run(chooser, 2000)
    k, before = chooser.k, chooser.milliseconds[chooser.k]

    def within(milliseconds):
        def advance(state, num_steps, *, k):
            state = world.advance(state, num_steps, k=k)
            world.now = start + milliseconds * num_steps
            return state

        start = world.now
        world.state = chooser.run(advance, world.state)
        return chooser.milliseconds[k]

    assert before < within(before + 10.0) <= before + 2.5
    before = chooser.milliseconds[k]
    assert within(before - 1.0) <= before - 0.45


def test_blocks_are_no_longer_than_the_limit(monkeypatch):
    world, chooser = World(monkeypatch, lambda made: 0.9), Chooser(4)
    for _ in range(20):
        before = len(world.used)
        world.state = chooser.run(world.advance, world.state, limit=3)
        assert 1 <= len(world.used) - before <= 3


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
