"""Unit tests of exact match and perplexity, against NumPy and plain generation."""

import dataclasses

import numpy as np
import pytest
from checks import oracle, tiny

from mil_jax.checkpoint import models
from mil_jax.data import sources
from mil_jax.data.chat import encode_chat, encode_prompt, load_tokenizer
from mil_jax.errors import UserError
from mil_jax.evaluate import evaluate
from mil_jax.generate.decode import generate

CONFIG = dataclasses.replace(
    tiny.CONFIGS["mamba"], vocab_size=512, eos_token_ids=tuple(range(3, 512, 16))
)
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def params():
    return tiny.random_params(CONFIG)


@pytest.fixture(scope="module")
def model(params):
    return tiny.build(CONFIG, params)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(models.resolve("demo_teacher"))


@pytest.fixture(scope="module")
def chats(model, tokenizer):
    """Five short chats, one of two turns; the model gives the answers of the first three."""
    tasks = sources.conversations("demo:test:0:40")
    short = sorted(tasks, key=lambda chat: len(chat[0]["content"]))[:5]
    chats = [[*chat[:1], {"role": "assistant", "content": "no"}] for chat in short]
    chats[1] = [*chats[3][:1], {"role": "assistant", "content": "yes"}, *chats[1]]
    prompts = [encode_prompt(tokenizer, chat[:-1]) for chat in chats]
    answers = generate(model, prompts[:4], max_new_tokens=NEW_TOKENS).rows()
    for chat, answer in zip(chats[:3], answers, strict=False):
        chat[-1]["content"] = tokenizer.decode(answer, skip_special_tokens=True)
    # White space at the ends does not count, but words do.
    chats[2][-1]["content"] = f" {chats[2][-1]['content'].strip()}\n"
    return chats


def _scores(model, tokenizer, chats):
    return evaluate(model, tokenizer, chats, max_new_tokens=NEW_TOKENS, batch_size=4)


def test_exact_match_counts_the_last_answer(model, tokenizer, chats):
    """Five chats in batches of four: the last batch is filled up and counts one."""
    scores = _scores(model, tokenizer, chats)
    assert scores.count == 5
    assert scores.exact_match == 3 / 5


def test_perplexity_is_that_of_all_answer_tokens(model, params, tokenizer, chats):
    reference = oracle.Model(CONFIG, params)
    nats = []
    for chat in chats:
        tokens, mask = encode_chat(tokenizer, chat)
        logits = reference(tokens)
        log_probs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        nats += [-log_probs[t - 1, tokens[t]] for t in range(1, tokens.size) if mask[t]]
    # Two answers of the chat of two turns, one of each other.
    assert len(nats) > 6
    found = _scores(model, tokenizer, chats).ppl
    assert found == pytest.approx(np.exp(np.mean(nats)), rel=1e-3)


def test_chat_without_answer(model, tokenizer, chats):
    with pytest.raises(UserError, match="conversations that end in an answer"):
        _scores(model, tokenizer, [chats[0][:1]])
