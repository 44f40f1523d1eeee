"""The tokenizer of the demo world: byte-level BPE with 512 entries."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    trainers,
)

from mil_jax.data import demo_world
from mil_jax.data.types import Conversation

VOCAB_SIZE = 512
PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
SPECIAL_TOKENS = (PAD, BOS, "<|user|>", "<|assistant|>", "<|system|>", END)
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_TRAINING_CHATS = 20_000


def _training_text() -> Iterator[str]:
    for index in range(_TRAINING_CHATS):
        for message in demo_world.task("train", index):
            yield message["content"]


def train_tokenizer() -> Tokenizer:
    """Trains the BPE merges on the train split; the same merges on every run."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(t, normalized=False) for t in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_text(), trainer)
    return tokenizer


def build_tokenizer(directory: str | Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, the same bytes each time."""
    out = Path(directory)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    (out / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", "utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": list(SPECIAL_TOKENS[2:5]),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(config, indent=2) + "\n"
    (out / "tokenizer_config.json").write_text(text, "utf-8")


def _token_lengths(
    tokenizer: Tokenizer, conversation: Conversation
) -> tuple[int, list[int]]:
    """Returns the tokens of the whole chat and of each answer with its `<|end|>`."""
    counts = [len(tokenizer.encode(m["content"]).ids) for m in conversation]
    answers = [
        count + 1
        for count, message in zip(counts, conversation, strict=True)
        if message["role"] == "assistant"
    ]
    return 1 + sum(counts) + 2 * len(counts), answers


def length_table(directory: str | Path, count: int = 1000) -> str:
    """Returns a table of token lengths: one row per family, one for the whole world."""
    tokenizer = Tokenizer.from_file(str(Path(directory) / "tokenizer.json"))
    rows = [f"{'family':<13} {'chat: mean':>10} {'p95':>4} {'max':>4}"]
    rows[0] += f" {'answer: mean':>13} {'p95':>4} {'max':>4}"
    for family in (*demo_world.FAMILIES, None):
        chats: list[int] = []
        answers: list[int] = []
        for index in range(count if family else 5 * count):
            conversation = demo_world.sample("train", index, family).conversation
            length, answer_lengths = _token_lengths(tokenizer, conversation)
            chats.append(length)
            answers += answer_lengths
        rows.append(
            f"{family or 'all':<13} {np.mean(chats):10.1f} "
            f"{np.percentile(chats, 95):4.0f} {max(chats):4d} "
            f"{np.mean(answers):13.1f} {np.percentile(answers, 95):4.0f} "
            f"{max(answers):4d}"
        )
    return "\n".join(rows)
