import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import generation, sampling, tiny

from mil_jax.errors import UserError
from mil_jax.generate import speculative
from mil_jax.generate.sampler import Sampling

pytestmark = pytest.mark.usefixtures("strict_jax")


def test_greedy_verdicts():
    generation.check_verify_greedy()


@pytest.mark.parametrize("name", sampling.SAMPLINGS)
def test_sampled_verdicts_follow_the_target(name):
    sampling.check_verify_draws(sampling.SAMPLINGS[name])


@pytest.mark.parametrize(
    ("target", "draft", "k"),
    [
        ("attention", "attention~", 2),
        ("attention", "mamba", 1),
        pytest.param("rich", "rich~", 2, marks=pytest.mark.slow),
        ("mamba", "mamba~", 3),
        ("mamba", "attention", 2),
        ("mamba2", "mamba2~", 2),
        ("mamba2", "mamba", 4),
        ("pure", "pure~", 2),
    ],
)
def test_greedy_answers_are_the_targets(target, draft, k):
    generation.check_some_accepted(target, draft, k)


@pytest.mark.parametrize(
    ("target", "draft", "k"),
    [
        ("mamba", "mamba2", 3),
        ("mamba2", "pure", 1),
        pytest.param("pure", "attention", 3, marks=pytest.mark.slow),
    ],
)
def test_greedy_answers_with_a_draft_that_is_rarely_right(target, draft, k):
    generation.check_speculation(target, draft, k)


@pytest.mark.parametrize(("kind", "k"), [("mamba", 3), ("mamba2", 2), ("pure", 1)])
def test_an_equal_draft_is_always_right(kind, k):
    generation.check_equal_draft(kind, k)


def test_more_drafts_than_the_window_is_wide(monkeypatch):
    """Eight in a hybrid whose attention sees five positions."""
    kinds = {"layer_types": ("mamba2", "attention"), "ssm": tiny.MAMBA2_SSM}
    config = dataclasses.replace(tiny.CONFIGS["rich"], **kinds)
    monkeypatch.setitem(tiny.CONFIGS, "rich_mamba2", config)
    assert config.sliding_window == 5
    generation.check_some_accepted("rich_mamba2", "rich_mamba2~", 8)


@pytest.mark.parametrize("prompt", generation.PROMPTS[:2])
def test_one_row(prompt):
    generation.check_speculation("mamba", "mamba~", 3, prompts=(prompt,))


def test_ends_of_answers():
    generation.check_ends()


def test_limits_of_answers():
    generation.check_limits()


def test_rows_do_not_see_each_other():
    """The last row is the same whether the others end early or not at all."""
    eos_ids, expected = generation.some_eos(tiny.reference("mamba"), 10)
    model, _ = generation.draft("mamba~")
    kwargs = {"k": 3, "max_new_tokens": 10}
    target = tiny.model("mamba")
    prompts = generation.PROMPTS
    both, stats = speculative.generate(
        target, model, prompts, eos_ids=eos_ids, **kwargs
    )
    other, other_stats = speculative.generate(
        target, model, prompts, eos_ids=(), **kwargs
    )
    assert both.lengths.tolist() != other.lengths.tolist()
    assert both.rows()[2].tolist() == other.rows()[2].tolist() == expected[2]
    assert stats.steps[2] == other_stats.steps[2]


@pytest.mark.parametrize("vocab", [None, (0, 2, 3, 5)])
def test_sampled_answers_follow_the_target(vocab):
    """Second and third tokens, which speculation makes, of many rows."""
    target, reference = sampling.small("mamba")
    draft, _ = sampling.small("mamba2")
    if vocab is not None:
        draft = draft.with_vocab(vocab)
    how = Sampling(temperature=1.2, top_k=4)
    answers, stats = speculative.generate(
        target,
        draft,
        np.tile([[1, 4]], (1024, 1)),
        k=2,
        max_new_tokens=3,
        sampling=how,
        eos_ids=(),
    )
    first = sampling.filtered(reference([1, 4])[-1], how)
    sampling.assert_follows(answers.tokens[:, 0], first, "first")
    pairs = answers.tokens[:, 1] * sampling.SMALL_VOCAB + answers.tokens[:, 2]
    sampling.assert_follows(pairs, sampling.joint(reference, (1, 4), how).ravel())
    assert 1.2 < stats.tokens_per_step < 2.8


def test_a_rejection_that_leaves_nothing_draws_from_the_target(monkeypatch):
    """Rounding can reject where p - q is nowhere positive."""
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.ones(shape))
    certain = np.array([[[-200.0, -200.0, 0.0]]], np.float32)
    verdict = speculative.verify(
        jax.random.key(0),
        np.tile(certain, (1, 2, 1)),
        certain,
        np.array([[2]], np.int32),
        Sampling(temperature=1.0),
    )
    assert verdict.num_accepted.tolist() == [0]
    assert verdict.tokens.tolist() == [[2, 0]]


def test_wrong_requests_are_refused():
    target = tiny.model("attention")
    config = dataclasses.replace(tiny.ATTENTION, vocab_size=tiny.VOCAB + 1)
    other = tiny.build(config, tiny.random_params(config))
    with pytest.raises(UserError, match=f"{tiny.VOCAB + 1} tokens and the target"):
        speculative.generate(target, other, [[1]], k=2, max_new_tokens=4)
    with pytest.raises(UserError, match="k is 0"):
        speculative.generate(target, target, [[1]], k=0, max_new_tokens=4)
    hybrid, k = tiny.model("mamba"), speculative.MAX_K + 1
    for models in ((hybrid, target), (target, hybrid), (target, target)):
        with pytest.raises(UserError, match=f"k is {k}; at most {k - 1} tokens"):
            speculative.generate(*models, [[1]], k=k, max_new_tokens=4)
    for prompts, message in (([], "no prompt"), ([[1], []], "prompt 1 is empty")):
        with pytest.raises(UserError, match=message):
            speculative.generate(target, target, prompts, k=2, max_new_tokens=4)
    with pytest.raises(UserError, match="exceeds the cache's 4"):
        speculative.generate(target, target, [[1]], k=2, max_new_tokens=4, max_length=4)
