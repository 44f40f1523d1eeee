"""Chats of one turn from plain text and from chat files, split by a stable hash."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from mil_jax.data import sources
from mil_jax.data.chat import Tokenizer, encode_prompt
from mil_jax.data.demo_tasks import stable_hash
from mil_jax.data.types import Conversation, Message
from mil_jax.errors import UserError

PROMPT_WORDS = 24
PASSAGE_WORDS = 160
HELD_OUT = 12  # one prompt in this many


class Split(NamedTuple):
    """Chats to train on, and chats whose prompts occur in none of those."""

    train: list[Conversation]
    held_out: list[Conversation]


def read(paths: Sequence[str]) -> list[Conversation]:
    """Returns chats of one turn from files.

    Of chats in the forms of `sources`, the first question with its answer is kept. A `.txt`
    file is cut into passages, of which the first words are the prompt and the rest is the
    answer.

    Raises:
        UserError: A file is missing, no UTF-8, malformed or holds no passage.
    """
    chats: list[Conversation] = []
    for path in paths:
        if path.endswith(".txt"):
            chats += _passages(Path(path))
        else:
            chats += [_first_turn(chat) for chat in sources.conversations(path)]
    return chats


def split(chats: Iterable[Conversation]) -> Split:
    """Returns the chats in two parts by a hash of their prompts."""
    parts = Split([], [])
    for chat in chats:
        is_held_out = stable_hash(chat[0]["content"]) % HELD_OUT == 0
        (parts.held_out if is_held_out else parts.train).append(chat)
    return parts


def short(
    chats: Iterable[Conversation], tokenizer: Tokenizer, limit: int
) -> list[Conversation]:
    """Returns the chats whose prompts, without the last answer, have up to `limit` tokens."""
    return [c for c in chats if len(encode_prompt(tokenizer, c[:-1])) <= limit]


def write(path: Path, chats: Iterable[Conversation]) -> None:
    """Writes chats as rows of `messages`; the file appears when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for chat in chats:
            file.write(json.dumps({"messages": chat}, ensure_ascii=False) + "\n")
    partial.replace(path)


def _passages(path: Path) -> list[Conversation]:
    try:
        words = path.read_text("utf-8").split()
    except OSError as error:
        raise UserError(
            f"text file {path} cannot be read ({error.strerror})"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"text file {path} is not UTF-8: {error}") from error
    starts = range(0, len(words) - 2 * PROMPT_WORDS + 1, PASSAGE_WORDS)
    chats = []
    for start in starts:
        cut, end = start + PROMPT_WORDS, start + PASSAGE_WORDS
        chats.append(_turn(" ".join(words[start:cut]), " ".join(words[cut:end])))
    return chats


def _first_turn(chat: Conversation) -> Conversation:
    at = next(i for i, m in enumerate(chat) if m["role"] == "assistant")
    asked = "\n".join(m["content"] for m in chat[:at])
    return _turn(asked, chat[at]["content"])


def _turn(question: str, answer: str) -> Conversation:
    return [
        Message(role="user", content=question),
        Message(role="assistant", content=answer),
    ]
