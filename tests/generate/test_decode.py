import dataclasses

import numpy as np
import pytest
from checks import generation, sampling, tiny

from mil_jax.errors import UserError
from mil_jax.generate import decode
from mil_jax.generate.sampler import Sampling

pytestmark = pytest.mark.usefixtures("strict_jax")


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_answers_are_those_of_repeated_full_passes(kind):
    generation.check_plain(kind)


def test_answers_end_with_eos():
    generation.check_plain_eos()


def test_eos_is_the_models_unless_told_otherwise():
    reference = tiny.reference("attention")
    answer = reference.greedy([20, 21, 22], 8)
    config = dataclasses.replace(tiny.CONFIGS["attention"], eos_token_ids=(answer[2],))
    model = tiny.build(config, tiny.params("attention"))
    expected = generation.until_eos(answer, (answer[2],))
    (row,) = decode.generate(model, [[20, 21, 22]], max_new_tokens=8).rows()
    assert row.tolist() == expected
    assert len(expected) < 8
    answers = decode.generate(model, [[20, 21, 22]], max_new_tokens=8, eos_ids=())
    assert answers.rows()[0].tolist() == answer


def test_one_new_token():
    answers = decode.generate(tiny.model("mamba"), [[5, 6]], max_new_tokens=1)
    assert answers.tokens.tolist() == [tiny.reference("mamba").greedy([5, 6], 1)]


def test_a_prompt_longer_than_a_bucket():
    prompt = tiny.tokens(1, decode.PROMPT_BUCKET + 1)[0]
    batch = decode.pad_prompts([prompt, [4]], tiny.ATTENTION)
    assert batch.tokens.shape == (2, 2 * decode.PROMPT_BUCKET)
    answers = decode.generate(tiny.model("mamba2"), [prompt, [4]], max_new_tokens=3)
    reference = tiny.reference("mamba2")
    expected = [reference.greedy(prompt, 3), reference.greedy([4], 3)]
    generation.assert_answers(answers, expected, 3)


@pytest.mark.parametrize("chunk", [None, 40])
def test_max_length_may_be_just_enough(chunk):
    """Though the prompt, padded to 64 or to two chunks, is written as a whole."""
    model, prompt = tiny.model("attention"), tiny.tokens(1, 33)[0]
    answers = decode.generate(
        model, [prompt], max_new_tokens=5, max_length=38, chunk=chunk
    )
    expected = tiny.reference("attention").greedy(prompt, 5)
    assert answers.tokens.tolist() == [expected]


@pytest.mark.parametrize(
    ("rows", "chunk"),
    [(1, 2048), (8, 2048), (9, 1820), (16, 1024), (64, 256), (99, 256)],
)
def test_many_rows_are_read_in_smaller_chunks(rows, chunk):
    """16,384 tokens at a time, within 256 to 2,048 of a row."""
    batch = decode.pad_prompts([[1]] * rows, tiny.ATTENTION)
    assert decode.prefill_chunk(batch) == chunk
    assert decode.prefill_chunk(batch, 7) == 7


def test_prompts_are_padded_on_the_right():
    batch = decode.pad_prompts([[1, 2, 3], np.array([4])], tiny.ATTENTION)
    assert batch.tokens.shape == (2, decode.PROMPT_BUCKET)
    assert batch.tokens[:, :4].tolist() == [[1, 2, 3, 0], [4, 0, 0, 0]]
    assert batch.lengths.tolist() == [3, 1]


@pytest.mark.slow
def test_sampled_answers_follow_the_model():
    """First and second tokens of many rows; seeds decide."""
    model, reference = sampling.small("mamba2")
    how = Sampling(temperature=1.1, top_k=5)
    prompts = np.tile([[1, 4]], (1024, 1))

    def run(seed):
        answers = decode.generate(
            model, prompts, max_new_tokens=3, sampling=how, eos_ids=(), seed=seed
        )
        return answers.tokens

    tokens = run(0)
    first = sampling.filtered(reference([1, 4])[-1], how)
    sampling.assert_follows(tokens[:, 0], first, "first")
    pairs = tokens[:, 1] * sampling.SMALL_VOCAB + tokens[:, 2]
    sampling.assert_follows(pairs, sampling.joint(reference, (1, 4), how).ravel())
    np.testing.assert_array_equal(run(0), tokens)
    assert (run(1) != tokens).any()


@pytest.mark.parametrize(
    ("prompts", "kwargs", "message"),
    [
        ([], {}, "there is no prompt"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, tiny.VOCAB]], {}, f"prompt 0 holds token {tiny.VOCAB}"),
        ([[1], [2, -3]], {}, "prompt 1 holds token -3"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1], [1, 2, 3]], {"max_length": 6}, "prompt 1 has 3 tokens; with 4 new"),
    ],
)
def test_wrong_requests_are_refused(prompts, kwargs, message):
    with pytest.raises(UserError, match=message):
        decode.generate(
            tiny.model("attention"), prompts, **({"max_new_tokens": 4} | kwargs)
        )
