"""Exact match and perplexity on held-out conversations."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mil_jax import losses
from mil_jax.data.chat import Tokenizer, encode_chat, encode_prompt
from mil_jax.data.types import Conversation
from mil_jax.errors import UserError
from mil_jax.generate.decode import generate
from mil_jax.models.decoder import HybridLM
from mil_jax.progress import progress
from mil_jax.train.step import next_token_targets


@dataclasses.dataclass(frozen=True)
class Scores:
    """Results on a set of conversations.

    Attributes:
        exact_match: Share of greedy answers equal to the reference, white space at the ends
            aside; of each conversation's last turn.
        ppl: Perplexity of all reference answers, exp of nats per token.
        count: Conversations.
    """

    exact_match: float
    ppl: float
    count: int


def evaluate(
    model: HybridLM,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    *,
    max_new_tokens: int,
    batch_size: int,
    name: str = "evaluate",
) -> Scores:
    """Returns the model's scores; `model` is best built with `layout="decode"`.

    Raises:
        UserError: A conversation does not end with an answer.
    """
    right, nll, tokens = 0, 0.0, 0.0
    starts = range(0, len(conversations), batch_size)
    for start in progress(starts, desc=name, unit="batch"):
        stop = min(start + batch_size, len(conversations))
        chats = [conversations[i] for i in range(start, stop)]
        for chat in chats:
            if not chat or chat[-1]["role"] != "assistant":
                raise UserError("evaluation needs conversations that end in an answer")
        filled = chats + [chats[0]] * (batch_size - len(chats))
        prompts = [encode_prompt(tokenizer, chat[:-1]) for chat in filled]
        answers = generate(model, prompts, max_new_tokens=max_new_tokens).rows()
        for chat, answer in zip(chats, answers, strict=False):
            text = tokenizer.decode(answer, skip_special_tokens=True)
            right += text.strip() == chat[-1]["content"].strip()
        batch_nll, batch_tokens = answer_nll(model, tokenizer, filled, len(chats))
        nll, tokens = nll + batch_nll, tokens + batch_tokens
    count = len(conversations)
    return Scores(right / count, math.exp(nll / max(tokens, 1.0)), count)


def answer_nll(
    model: HybridLM, tokenizer: Tokenizer, chats: Sequence[Conversation], used: int
) -> tuple[float, float]:
    """Returns the summed nats and the number of answer tokens of the first `used` chats."""
    examples = [encode_chat(tokenizer, chat) for chat in chats]
    longest = max(example.tokens.size for example in examples)
    width = -(-longest // 64) * 64
    batch = {
        "tokens": np.zeros((len(chats), width), np.int32),
        "loss_mask": np.zeros((len(chats), width), bool),
        "segment_ids": np.zeros((len(chats), width), np.int32),
    }
    for row, example in enumerate(examples):
        size = example.tokens.size
        batch["tokens"][row, :size] = example.tokens
        batch["loss_mask"][row, :size] = example.loss_mask & (row < used)
        batch["segment_ids"][row, :size] = 1
    total, count = _batch_nll(model, batch)
    return float(total), float(count)


@functools.partial(jax.jit)
def _batch_nll(
    model: HybridLM, batch: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    labels, mask = next_token_targets(batch)
    nll = losses.token_nll(model.logits, model.hidden(batch["tokens"]), labels)
    return jnp.sum(jnp.where(mask, nll, 0.0)), jnp.sum(mask, dtype=jnp.float32)
