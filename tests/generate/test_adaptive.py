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

# Milliseconds of a step, a draft, a block, and what a draft reads that was left behind.
PLAIN, DRAFT, HOST, CATCH_UP = 4.0, 0.4, 0.3, 1.0


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
            self.now += CATCH_UP
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
        if state is slow:
            world.now += 5e3
        return world.advance(state, num_steps, k=k)

    chooser.run(compiling, slow)
    assert chooser.milliseconds == pytest.approx(before, abs=HOST)


def test_no_k_is_refused():
    with pytest.raises(UserError, match="the largest K is 0"):
        Chooser(0)


@pytest.mark.parametrize("share", [0.1, 0.15, 0.3])
@pytest.mark.parametrize("rate", [0.0, 0.05])
def test_a_bad_draft_costs_little(monkeypatch, share, rate):
    """A step with K drafts takes 1 + K share plain ones."""
    monkeypatch.setitem(globals(), "DRAFT", share * PLAIN)
    for tokens in (32, 64, 96, 128, 256, 512):
        world, chooser = World(monkeypatch, lambda made: rate), Chooser(8)
        assert PLAIN / world.run(chooser, tokens) > (0.97 if tokens >= 64 else 0.95)
    # What was learnt is kept for the next batch.
    world.state = dataclasses.replace(world.state, is_behind=False)
    assert PLAIN / world.run(chooser, 128) > 0.975
    assert PLAIN / world.run(chooser, 2048) > 0.985


@pytest.mark.parametrize("share", [0.075, 0.15, 0.28])
@pytest.mark.parametrize("rate", [0.0, 0.03, 0.06])
@pytest.mark.parametrize("late", [1.0, 3.0, 10.0, 100.0])
def test_plain_steps_that_began_slowly_do_not_flatter_a_draft(
    monkeypatch, share, rate, late
):
    """As on a device where a program's second run was slower than all that follow."""
    monkeypatch.setitem(globals(), "DRAFT", share * PLAIN)
    world = World(monkeypatch, lambda made: rate)
    delays = iter([late])

    def slow_at_first(state, num_steps, *, k):
        if num_steps > 1:
            world.now += next(delays, 0.0)
        return world.advance(state, num_steps, k=k)

    chooser = Chooser(4)
    while world.made < 512:
        world.state = chooser.run(slow_at_first, world.state)
    assert PLAIN * world.made / (world.now - late) > 0.97
    # To be passed: what is measured again is near the truth.
    assert chooser.milliseconds[0] == pytest.approx(PLAIN, rel=0.08)


def test_catching_up_is_paid_for_too(monkeypatch):
    for name in ("FIRST_WAIT", "LAST_WAIT"):
        monkeypatch.setattr(adaptive, name, 16)
    monkeypatch.setitem(globals(), "CATCH_UP", 4 * PLAIN)
    world = World(monkeypatch, lambda made: 0.0)
    assert PLAIN / world.run(Chooser(8), 2048) > 0.97


def test_a_short_answer_pays_for_one_look(monkeypatch):
    """Some plain steps, of which the first has a program of its own, then the least K."""
    world = World(monkeypatch, lambda made: 0.0)
    world.run(Chooser(8), 32)
    assert world.used[:9] == [0] * 4 + [1] * 4 + [0]
    assert world.used.count(1) == 4
    assert set(world.used) == {0, 1}


@pytest.mark.parametrize(
    ("rate", "share", "least"),
    [(0.8, 0.074, 2.2), (0.8, 0.28, 1.35), (0.9, 0.074, 2.9), (0.9, 0.28, 1.6)],
)
def test_a_good_draft_is_found_in_an_answer_of_128_tokens(
    monkeypatch, rate, share, least
):
    monkeypatch.setitem(globals(), "DRAFT", share * PLAIN)
    times = []
    for seed in range(20):
        world = World(monkeypatch, lambda made: rate, seed=seed)
        times.append(world.run(Chooser(8), 128))
    assert PLAIN / np.mean(times) > least


def test_a_draft_that_fails_after_long_costs_no_more_than_was_saved(monkeypatch):
    world = World(monkeypatch, lambda made: 0.9 if made < 4000 else 0.0)
    chooser = Chooser(8)
    while world.made < 4000:
        world.run(chooser, 1)
    start, tokens = world.now, world.made
    world.run(chooser, 256)
    lost = (world.now - start) / PLAIN - (world.made - tokens)
    assert 4 < lost < 20


def test_a_look_that_another_program_disturbed_is_forgotten_soon(monkeypatch):
    world, chooser = World(monkeypatch, lambda made: 0.8), Chooser(4)
    disturbances = iter([500.0])  # Milliseconds, in the first look.

    def disturbed(state, num_steps, *, k):
        if k and num_steps > 1:
            world.now += next(disturbances, 0.0)
        return world.advance(state, num_steps, k=k)

    while world.made < 600:
        world.state = chooser.run(disturbed, world.state)
    world.used.clear()
    world.run(chooser, 400)
    assert np.mean(np.array(world.used) > 1) > 0.8


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
    monkeypatch.setitem(globals(), "DRAFT", 0.1)  # Looks are never too dear.
    world.run(Chooser(8), 9000)
    runs = [(k, len(list(steps))) for k, steps in itertools.groupby(world.used)]
    waits = [steps for k, steps in runs if k == 0]
    assert waits[:10] == [4, 32, 64, 128, 256, 512, 1024, 2048, 2048, 2048]


def test_catching_up_is_no_part_of_a_step(monkeypatch):
    world, chooser = World(monkeypatch, lambda made: 0.0), Chooser(8)
    world.run(chooser, 3000)
    # All looks are blocks of four steps, each after plain ones.
    assert chooser.milliseconds[1] == pytest.approx(PLAIN + DRAFT + HOST / 4, abs=0.01)


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
    assert (np.mean(world.used) > 0.5) == is_used


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


@pytest.mark.parametrize("limit", [1, 3])
def test_blocks_are_no_longer_than_the_limit(monkeypatch, limit):
    world, chooser = World(monkeypatch, lambda made: 0.9), Chooser(4)
    for _ in range(20):
        before = len(world.used)
        world.state = chooser.run(world.advance, world.state, limit=limit)
        assert 1 <= len(world.used) - before <= limit
    assert set(chooser.milliseconds) > {0, 1}


def test_choices():
    assert Chooser(8).choices == (1, 2, 4, 8)
    assert Chooser(5).choices == (1, 2, 4, 5)
    assert Chooser(1).choices == (1,)


@pytest.mark.parametrize("name", ["mamba~", "mamba"])
def test_answers_are_the_targets(monkeypatch, name):
    monkeypatch.setattr(adaptive, "FIRST_WAIT", 5)
    monkeypatch.setattr(adaptive, "LOSS", 100.0)
    target, (draft, _) = tiny.model("mamba"), generation.draft(name)
    kwargs = {"max_new_tokens": 50, "eos_ids": ()}
    expected = decode.generate(target, generation.PROMPTS, **kwargs)
    chooser = Chooser(3)
    answers, stats = speculative.generate(
        target, draft, generation.PROMPTS, k=chooser, **kwargs
    )
    assert answers.tokens.tolist() == expected.tokens.tolist()
    assert stats.num_steps == stats.steps.sum() > stats.tried_at[0] > 0
    assert set(chooser.milliseconds) >= {0, 1}
