"""Generation that stops and goes on gives what one call gives."""

import numpy as np
import pytest
from checks import generation, tiny

from mil_jax.errors import UserError
from mil_jax.generate import decode, speculative
from mil_jax.generate.sampler import Sampling

pytestmark = pytest.mark.usefixtures("strict_jax")

PROMPTS = generation.PROMPTS
COUNT = 10
HOT = Sampling(temperature=1.5, top_k=20)


def in_blocks(module, models, state, sizes):
    """Returns the last state; what was seen before never changes."""
    before = module.completions(state).rows()
    for size in sizes:
        state = module.advance(*models, state, size)
        now = module.completions(state).rows()
        for old, new in zip(before, now, strict=True):
            assert new[: old.size].tolist() == old.tolist()
        before = now
    return state


@pytest.mark.parametrize("sampling", [Sampling(), HOT], ids=["greedy", "hot"])
def test_plain(sampling):
    """A ragged batch of which one row ends at once and one at its fourth token."""
    model = tiny.model("mamba")
    eos_ids, _ = generation.some_eos(tiny.reference("mamba"), COUNT)
    kwargs = {"max_new_tokens": COUNT, "sampling": sampling, "eos_ids": eos_ids}
    expected = decode.generate(model, PROMPTS, **kwargs)
    state = decode.start(model, PROMPTS, **kwargs)
    assert decode.completions(state).lengths.tolist() == [1, 1, 1]
    state = in_blocks(decode, [model], state, [1, 2])
    lengths = np.minimum(expected.lengths, 4)
    assert decode.completions(state).lengths.tolist() == lengths.tolist()
    state = in_blocks(decode, [model], state, [0, 1, 50])
    answers = decode.completions(state)
    assert answers.tokens.tolist() == expected.tokens.tolist()
    assert answers.lengths.tolist() == expected.lengths.tolist()
    assert np.asarray(state.done).all()


@pytest.mark.parametrize("sampling", [Sampling(), HOT], ids=["greedy", "hot"])
def test_speculative(sampling):
    draft, _ = generation.draft("attention~")
    models = (tiny.model("attention"), draft)
    eos_ids, _ = generation.some_eos(tiny.reference("attention"), COUNT)
    kwargs = {"max_new_tokens": COUNT, "sampling": sampling, "eos_ids": eos_ids}
    expected, gain = speculative.generate(*models, PROMPTS, k=3, **kwargs)
    state = speculative.start(*models, PROMPTS, k=3, **kwargs)
    for size, total in ((1, 1), (0, 1), (2, 3)):
        state = in_blocks(speculative, models, state, [size])
        steps = np.minimum(gain.steps, total)
        assert speculative.stats(state).steps.tolist() == steps.tolist()
    state = in_blocks(speculative, models, state, [1, 50])
    answers = speculative.completions(state)
    assert answers.tokens.tolist() == expected.tokens.tolist()
    assert answers.lengths.tolist() == expected.lengths.tolist()
    now = speculative.stats(state)
    assert now.steps.tolist() == gain.steps.tolist()
    assert now.accepted_at.tolist() == gain.accepted_at.tolist()
    assert now.tokens_per_step == gain.tokens_per_step > 1


def test_finished_rows_stay():
    model = tiny.model("mamba2")
    kwargs = {"max_new_tokens": COUNT, "eos_ids": ()}
    expected = decode.generate(model, PROMPTS, **kwargs).rows()
    state = decode.advance(model, decode.start(model, PROMPTS, **kwargs), 2)
    state = decode.advance(model, decode.finish(state, [False, True, False]), COUNT)
    rows = decode.completions(state).rows()
    assert [row.size for row in rows] == [COUNT, 3, COUNT]
    for row, whole in zip(rows, expected, strict=True):
        assert row.tolist() == whole[: row.size].tolist()


def test_every_block_runs_one_program():
    model = tiny.model("mamba2")
    state = decode.start(model, PROMPTS, max_new_tokens=COUNT, eos_ids=())
    state = decode.advance(model, state, 1)
    programs = decode.advance._cache_size()
    for size in (2, 3):
        state = decode.advance(model, state, size)
    assert decode.advance._cache_size() == programs
    assert decode.completions(state).lengths.tolist() == [7, 7, 7]


@pytest.mark.parametrize("is_speculative", [False, True])
def test_draws_depend_on_the_rows_number_and_the_seed(is_speculative):
    """Whatever else is in the batch, and wherever the row lies in it."""
    target = tiny.model("attention")
    draft, _ = generation.draft("attention~")

    def run(prompts, rows, seed=0):
        kwargs = {"max_new_tokens": 8, "sampling": HOT, "eos_ids": (), "seed": seed}
        if not is_speculative:
            state = decode.start(target, prompts, rows=rows, **kwargs)
            return decode.completions(decode.advance(target, state, 8)).tokens.tolist()
        models = (target, draft)
        state = speculative.start(*models, prompts, rows=rows, k=2, **kwargs)
        state = speculative.advance(*models, state, 8)
        return speculative.completions(state).tokens.tolist()

    a, b, c = PROMPTS
    answers = run([a, b, c], [4, 9, 7])
    assert run([c, a, a], [7, 3, 4])[::2] == [answers[2], answers[0]]
    assert run([a, b, c], [4, 8, 7])[1] != answers[1]
    assert run([a, b, c], [4, 9, 7], seed=1) != answers
    assert run([a, b, c], None) == run([a, b, c], [0, 1, 2])


@pytest.mark.parametrize("is_speculative", [False, True])
def test_every_step_draws_anew(is_speculative):
    """So hot that all tokens are as likely: the same draw would give the same token."""
    model, count = tiny.model("pure"), 48
    kwargs = {"max_new_tokens": count, "sampling": Sampling(1e6), "eos_ids": ()}
    if is_speculative:
        answers, _ = speculative.generate(model, model, PROMPTS, k=2, **kwargs)
    else:
        answers = decode.generate(model, PROMPTS, **kwargs)
    for row in answers.rows():
        # 33 of 61 on average.
        assert len(set(row.tolist())) > 20
    assert len({tuple(row.tolist()) for row in answers.rows()}) == len(PROMPTS)


def test_rows_are_one_number_each():
    with pytest.raises(UserError, match="2 row numbers for 3 rows"):
        decode.start(tiny.model("mamba"), PROMPTS, max_new_tokens=2, rows=[0, 1])
