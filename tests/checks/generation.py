"""Answers, plain and speculative, against the oracle's argmax one token at a time."""

import functools
import math

import numpy as np

from mil_jax.generate import decode, speculative
from mil_jax.generate.sampler import Sampling

from . import oracle, tiny

PROMPTS = ((4,), (20, 21, 22), (9, 26, 5, 35, 8, 9))


def until_eos(tokens, eos_ids):
    for i, token in enumerate(tokens):
        if token in eos_ids:
            return tokens[: i + 1]
    return tokens


def assert_answers(completions, expected, count):
    """Checks tokens, lengths and padding of every row."""
    assert completions.tokens.shape == (len(expected), count)
    assert completions.lengths.tolist() == [len(row) for row in expected]
    assert [row.tolist() for row in completions.rows()] == expected
    for tokens, row in zip(completions.tokens, expected, strict=True):
        assert not tokens[len(row) :].any()


def some_eos(reference, count):
    """Returns EOS ids that end the first answer at once and the second at its fourth."""
    answers = [reference.greedy(p, count) for p in PROMPTS]
    eos_ids = (answers[0][0], answers[1][3])
    expected = [until_eos(a, eos_ids) for a in answers]
    assert len(expected[0]) == 1
    assert len(expected[1]) == 4 < count
    assert len(expected[2]) == count
    return eos_ids, expected


def check_plain(kind):
    """A ragged batch answers as its rows do alone, by repeated full passes."""
    reference = tiny.reference(kind)
    expected = [reference.greedy(p, 8) for p in PROMPTS]
    assert len({t for row in expected for t in row}) > 4
    answers = decode.generate(tiny.model(kind), PROMPTS, max_new_tokens=8, eos_ids=())
    assert_answers(answers, expected, 8)


def check_plain_eos(kind="mamba"):
    eos_ids, expected = some_eos(tiny.reference(kind), 8)
    answers = decode.generate(
        tiny.model(kind), PROMPTS, max_new_tokens=8, eos_ids=eos_ids
    )
    assert_answers(answers, expected, 8)


@functools.cache
def draft(name):
    """Returns a draft and its oracle: "mamba", or "mamba~" for weights near mamba's."""
    kind = name.removesuffix("~")
    if name == kind:
        return tiny.model(kind), tiny.reference(kind)
    config = tiny.CONFIGS[kind]
    weights = tiny.perturbed(tiny.params(kind), 0.15)
    return tiny.build(config, weights), oracle.Model(config, weights)


def simulate(target, draft, prompt, k, count, eos_ids):
    """Greedy speculation by the book on one row: tokens, passes, accepted per place."""
    history, out = list(prompt), [int(target(prompt)[-1].argmax())]
    accepted_at, steps, gained = np.zeros(k, int), 0, 0
    while len(out) < count and out[-1] not in eos_ids:
        drafts = draft.greedy(history + out, k)
        choices = target(history + out + drafts)[-k - 1 :].argmax(axis=-1).tolist()
        accepted = 0
        while accepted < k and choices[accepted] == drafts[accepted]:
            accepted += 1
        before = len(out)
        accepted_at[:accepted] += 1
        out = until_eos(out + choices[: accepted + 1], eos_ids)[:count]
        steps, gained = steps + 1, gained + len(out) - before
    return out, steps, accepted_at, gained


def check_speculation(kind, draft_name, k, *, prompts=PROMPTS, count=10, eos_ids=()):
    """Tokens are the target's own; passes and acceptances are the simulation's.

    The latter see what the tokens cannot: a draft that lost its place.
    """
    model, draft_reference = draft(draft_name)
    target = tiny.reference(kind)
    answers, stats = speculative.generate(
        tiny.model(kind),
        model,
        prompts,
        k=k,
        max_new_tokens=count,
        eos_ids=eos_ids,
    )
    runs = [simulate(target, draft_reference, p, k, count, eos_ids) for p in prompts]
    expected = [until_eos(target.greedy(p, count), eos_ids) for p in prompts]
    assert [run[0] for run in runs] == expected
    assert_answers(answers, expected, count)
    assert stats.steps.tolist() == [run[1] for run in runs]
    assert stats.accepted_at.tolist() == sum(run[2] for run in runs).tolist()
    total, gained = (sum(run[i] for run in runs) for i in (1, 3))
    assert stats.num_steps == total
    assert stats.tokens_per_step == gained / max(total, 1)
    return stats


def check_some_accepted(kind, draft_name, k):
    """A draft that is right now and then: both ways of going on happen."""
    stats = check_speculation(kind, draft_name, k)
    assert 1 < stats.tokens_per_step < k + 1


def check_equal_draft(kind, k):
    stats = check_speculation(kind, kind, k)
    # Nine tokens after the prompt's own, K + 1 a pass; the last pass may have some over.
    assert stats.tokens_per_step == 9 / math.ceil(9 / (k + 1))
    assert stats.accepted_at.tolist() == [stats.num_steps] * k


def check_ends(kind="attention", draft_name="attention~", k=3):
    """EOS as the first token and inside a draft, the limit inside a draft."""
    eos_ids, _ = some_eos(tiny.reference(kind), 10)
    # 0 fills what a pass does not gain and must not end a row there.
    check_speculation(kind, draft_name, k, eos_ids=(*eos_ids, 0))


def check_limits(kind="attention", k=1):
    """Limits before, inside and at the end of a pass that accepts everything."""
    for count in (1, 3, 4):
        check_speculation(kind, kind, k, count=count)


VERDICTS = {
    "none": ([1, 1, 1], [2, 3, 4, 5], 0),
    "all": ([2, 3, 4], [2, 3, 4, 5], 3),
    "first": ([2, 1, 1], [2, 3, 4, 5], 1),
    "last_rejected": ([2, 3, 1], [2, 3, 4, 5], 2),
    "alternating": ([2, 1, 4], [2, 3, 4, 5], 1),
    "late": ([1, 3, 4], [2, 3, 4, 5], 0),
}


def check_verify_greedy():
    """Every pattern of agreement, in one batch; the last column is the last choice."""
    drafts = np.array([d for d, _, _ in VERDICTS.values()], np.int32)
    choices = np.array([c for _, c, _ in VERDICTS.values()])
    logits = np.random.default_rng(0).uniform(0, 1, (*choices.shape, 8))
    np.put_along_axis(logits, choices[..., None], 2.0, axis=-1)
    logits = logits.astype(np.float32)
    verdict = speculative.verify(None, logits, logits[:, :3], drafts, Sampling())
    for b, (name, (draft, choice, accepted)) in enumerate(VERDICTS.items()):
        assert verdict.num_accepted[b] == accepted, name
        expected = [*draft[:accepted], choice[accepted]]
        expected += [0] * (4 - len(expected))
        assert verdict.tokens[b].tolist() == expected, name
