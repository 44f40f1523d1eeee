"""Greedy speculation is plain decoding under every pattern of acceptance."""

import functools

import numpy as np
import pytest
from checks import generation, scripted, tiny

from mil_jax.generate import decode, speculative

pytestmark = pytest.mark.usefixtures("strict_jax")

COUNT = 18
PROMPTS = ((4,), (20, 21, 22), (9, 26, 5, 35, 8, 9), (7, 7))
# Whether the draft is wrong at the answer's i-th token (the 0-th is the prompt's).
WRONG = {
    "none": lambda i, row: True,
    "all": lambda i, row: False,
    "one": lambda i, row: i % 2 == 0,
    "two": lambda i, row: i % 3 == 0,
    "rows_differ": lambda i, row: i % (row + 2) == 0,
    # All of a step, then none for a while, then all again.
    "bursts": lambda i, row: (i + row) % 9 in (5, 6, 7),
    "random": lambda i, row: (i * 7 + row * 5 + i * i) % 5 < 2,
}


@functools.cache
def plain(kind, eos_ids=()):
    return decode.generate(
        tiny.model(kind), PROMPTS, max_new_tokens=COUNT, eos_ids=eos_ids
    )


def draft_of(kind, is_wrong):
    """Returns the draft that is wrong where it shall be, by the target's own answers."""
    answers = plain(kind).tokens
    size = max(map(len, PROMPTS)) + COUNT
    script = np.zeros((len(PROMPTS), size), np.int32)
    for row, prompt in enumerate(PROMPTS):
        for i, token in enumerate(answers[row]):
            wrong = (int(token) + 1) % tiny.VOCAB
            script[row, len(prompt) + i] = wrong if is_wrong(i, row) else token
    return scripted.Draft(script)


def simulate(is_wrong, row, k, count=COUNT):
    """Returns how many drafts each step of a row accepts."""
    accepted, at = [], 1
    while at < count:
        n = 0
        while n < k and at + n < count and not is_wrong(at + n, row):
            n += 1
        accepted.append(n)
        at += n + 1
    return accepted


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_every_pattern(kind, k):
    """All by one program."""
    programs = set()
    for name, is_wrong in WRONG.items():
        answers, stats = speculative.generate(
            tiny.model(kind),
            draft_of(kind, is_wrong),
            PROMPTS,
            k=k,
            max_new_tokens=COUNT,
            eos_ids=(),
        )
        assert answers.tokens.tolist() == plain(kind).tokens.tolist(), name
        runs = [simulate(is_wrong, row, k) for row in range(len(PROMPTS))]
        assert stats.steps.tolist() == [len(run) for run in runs], name
        counts = [sum(n > i for run in runs for n in run) for i in range(k)]
        assert stats.accepted_at.tolist() == counts, name
        programs.add(speculative._advance._cache_size())
    assert len(programs) == 1
    assert programs.pop() > 0


@pytest.mark.parametrize("place", range(1, 9))
def test_an_eos_at_every_place_of_a_step(place):
    """Where the token occurs before, the row ends there; the others go on."""
    eos_ids = (int(plain("mamba").tokens[2, place]),)
    expected = plain("mamba", eos_ids)
    assert expected.lengths[2] <= place + 1
    for name in ("all", "two"):
        answers, _ = speculative.generate(
            tiny.model("mamba"),
            draft_of("mamba", WRONG[name]),
            PROMPTS,
            k=4,
            max_new_tokens=COUNT,
            eos_ids=eos_ids,
        )
        assert answers.tokens.tolist() == expected.tokens.tolist(), name
        assert answers.lengths.tolist() == expected.lengths.tolist(), name


def test_k_may_change_from_block_to_block():
    """Also to plain decoding and back, which the draft catches up on."""
    model, draft = tiny.model("mamba"), generation.draft("mamba~")[0]
    for drafts, ends in ((model, (5,)), (draft, (5, 0)), (draft, ())):
        expected = decode.generate(model, PROMPTS, max_new_tokens=90, eos_ids=ends)
        state = speculative.start(
            model, drafts, PROMPTS, k=4, max_new_tokens=90, eos_ids=ends
        )
        for k, steps in ((4, 1), (0, 4), (2, 1), (0, 70), (4, 2), (0, 1), (1, 90)):
            state = speculative.advance(model, drafts, state, steps, k=k)
            assert state.is_behind == (k == 0) or np.all(state.done)
        answers = speculative.completions(state)
        assert answers.tokens.tolist() == expected.tokens.tolist()
        stats = speculative.stats(state)
        if drafts is model:  # That has caught up is never wrong.
            assert stats.accepted_at.tolist() == stats.tried_at.tolist()


def test_a_draft_with_fewer_tokens():
    """What it cannot propose is the target's to say."""
    model, draft = tiny.model("mamba2"), tiny.model("mamba2")
    ids = np.unique(plain("mamba2").tokens)[::2]
    answers, stats = speculative.generate(
        model,
        draft.with_vocab(ids),
        PROMPTS,
        k=3,
        max_new_tokens=COUNT,
        eos_ids=(),
    )
    assert answers.tokens.tolist() == plain("mamba2").tokens.tolist()
    runs = [
        simulate(lambda i, row: plain("mamba2").tokens[row, i] not in ids, row, 3)
        for row in range(len(PROMPTS))
    ]
    assert stats.steps.tolist() == [len(run) for run in runs]
    assert 1 < stats.tokens_per_step < 4
