r"""Chats and preference pairs from the demo world, from files, or from TFDS.

A spec is a comma-separated list of parts, read one after the other:

    demo:SPLIT:START:COUNT   tasks of the demo world, e.g. demo:train:0:2000
    tfds:NAME:SPLIT          a TensorFlow dataset with random access
    PATH or GLOB             .json, .jsonl, .jsonl.gz or .parquet files

Rows of files and of TFDS may have any of the usual forms:

    messages                     [{"role", "content"}, ...]
    conversations                [{"from": "human" | "gpt", "value"}, ...]
    instruction, input, output   Alpaca
    prompt, completion           texts, or lists of messages (`response` works as well)
    question, answer             texts
    prompt, chosen, rejected     pairs: texts or lists of messages
    chosen, rejected             pairs: "\n\nHuman: ...\n\nAssistant: ..." transcripts

Rows are read and parsed when they are asked for, so large files cost little memory. A
malformed row raises `RowError`, a `UserError` that a caller may catch to skip the row.
"""

import bisect
import hashlib
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from mil_jax.data import demo_world
from mil_jax.data.row_files import Row, RowError, Rows, find_files, open_rows
from mil_jax.data.types import Conversation, Message
from mil_jax.errors import UserError

T = TypeVar("T")

_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
}


class Preference(NamedTuple):
    """A prompt, ending in a user turn, with a better and a worse answer."""

    prompt: Conversation
    chosen: str
    rejected: str


def conversations(spec: str) -> Sequence[Conversation]:
    """Returns the chats of a spec, each with at least one answer.

    Raises:
        UserError: The spec, a file or (when it is read) a row is wrong; names the file
            and the line.
    """
    return _parts(spec, demo_world.task, _answered)


def prompts(spec: str) -> Sequence[Conversation]:
    """Returns the chats of a spec without their last answers, ending in a user turn.

    Rows that are prompts only (`prompt` or `instruction` without an answer) are fine.

    Raises:
        UserError: As in `conversations`.
    """
    return _parts(
        spec, lambda split, index: _prompt_of(demo_world.task(split, index)), _prompt
    )


def preference_pairs(spec: str) -> Sequence[Preference]:
    """Returns the preference pairs of a spec; demo tasks get one wrong answer each.

    Raises:
        UserError: As in `conversations`.
    """
    return _parts(spec, _demo_preference, _preference)


def digests(spec: str) -> dict[str, str]:
    """Returns a digest of each file's content, to tell when it was edited.

    The demo's tasks and TFDS have versions instead, which their names stand for.

    Raises:
        UserError: A file is not there.
    """
    found = {}
    for name in _names(spec):
        if not name.startswith(("demo:", "tfds:")):
            for path in find_files(name):
                with open(path, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256")
                found[path] = digest.hexdigest()[:16]
    return found


class _Lazy(Sequence[T]):
    """A sequence whose entries are made when they are asked for."""

    def __init__(self, length: int, get: Callable[[int], T]) -> None:
        self._length = length
        self._get = get

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._length))]
        if not -self._length <= index < self._length:
            raise IndexError(f"index {index} of {self._length}")
        return self._get(index % self._length)


def _parsed(rows: Rows, parse: Callable[[Row], T]) -> Sequence[T]:
    """Parses the rows of one file; errors name the file and the line."""

    def get(index: int) -> T:
        try:
            return parse(rows[index])
        except RowError as error:
            raise RowError(f"{rows.where(index)}: {error}") from error

    return _Lazy(len(rows), get)


def _joined(parts: Sequence[Sequence[T]]) -> Sequence[T]:
    """Several sequences, one after the other."""
    starts = list(itertools.accumulate(map(len, parts), initial=0))

    def get(index: int) -> T:
        part = bisect.bisect_right(starts, index) - 1
        return parts[part][index - starts[part]]

    return _Lazy(starts[-1], get)


def _parts(
    spec: str, demo: Callable[[Any, int], T], parse: Callable[[Row], T]
) -> Sequence[T]:
    names = _names(spec)
    if not names:
        raise UserError("the data spec is empty; give demo:SPLIT:START:COUNT or paths")
    parts: list[Sequence[T]] = []
    for name in names:
        if name.startswith("demo:"):
            parts.append(_demo_part(name, demo))
        else:
            parts += [_parsed(rows, parse) for rows in open_rows(name)]
    return parts[0] if len(parts) == 1 else _joined(parts)


def _names(spec: str) -> list[str]:
    return [name.strip() for name in spec.split(",") if name.strip()]


def _demo_part(name: str, make: Callable[[Any, int], T]) -> Sequence[T]:
    match = re.fullmatch(r"demo:(\w+):(\d+):(\d+)", name)
    if not match or match[1] not in demo_world.SPLITS or int(match[3]) == 0:
        raise UserError(
            f"data spec {name!r} is not demo:SPLIT:START:COUNT with SPLIT train or "
            "test and COUNT > 0, such as demo:train:0:2000"
        )
    start, count = int(match[2]), int(match[3])
    return _Lazy(count, lambda index: make(match[1], start + index))


def _demo_preference(split: demo_world.Split, index: int) -> Preference:
    conversation = demo_world.task(split, index)
    return Preference(
        conversation[:-1],
        demo_world.right_answer(conversation),
        demo_world.wrong_answer(conversation, index),
    )


def _answered(row: Row) -> Conversation:
    messages = _conversation(row)
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("the chat has no answer; add one or use the row as a prompt")
    return messages


def _prompt(row: Row) -> Conversation:
    return _prompt_of(_conversation(row))


def _prompt_of(messages: Conversation) -> Conversation:
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    if not end or messages[end - 1]["role"] != "user":
        raise RowError("no user turn comes before the last answer")
    return messages[:end]


def _conversation(row: Row) -> Conversation:
    """Returns the chat of a row in any of the known forms."""
    system = _system(row)
    if "messages" in row:
        return system + _messages(row["messages"], "messages")
    if "conversations" in row and "chosen" not in row:
        return system + _messages(row["conversations"], "conversations")
    if "chosen" in row:
        turns, answer = _answer(row["chosen"], "chosen", _pair_prompt(row))
        return [*turns, Message(role="assistant", content=answer)]
    if "instruction" in row:
        extra = _text(row, "input") if row.get("input") else ""
        question = _text(row, "instruction") + (f"\n\n{extra}" if extra else "")
        return system + _turns(question, row, ("output",))
    if "prompt" in row:
        if not isinstance(row["prompt"], str):
            return _list_turns(system, row)
        return system + _turns(_text(row, "prompt"), row, ("completion", "response"))
    if "question" in row:
        return system + _turns(_text(row, "question"), row, ("answer",))
    raise RowError(
        f"unknown form with the keys {', '.join(map(str, row)) or '(none)'}; expected "
        "messages, conversations, instruction/output, prompt/completion or "
        "question/answer"
    )


def _system(row: Row) -> Conversation:
    if not row.get("system"):
        return []
    return [Message(role="system", content=_text(row, "system"))]


def _turns(question: str, row: Row, answer_keys: Sequence[str]) -> Conversation:
    turns = [Message(role="user", content=question)]
    for key in answer_keys:
        if row.get(key) is not None:
            return [*turns, Message(role="assistant", content=_text(row, key))]
    return turns


def _list_turns(system: Conversation, row: Row) -> Conversation:
    turns = system + _messages(row["prompt"], "prompt")
    for key in ("completion", "response"):
        if isinstance(row.get(key), str):
            return [*turns, Message(role="assistant", content=row[key])]
        if row.get(key) is not None:
            return turns + _messages(row[key], key)
    return turns


def _text(row: Row, key: str) -> str:
    if not isinstance(row.get(key), str):
        raise RowError(f"`{key}` is missing or not a text")
    return row[key]


def _messages(values: Any, key: str) -> Conversation:
    """Returns turns given as role/content or from/value mappings."""
    if isinstance(values, Mapping):  # one list per field, as TFDS gives sequences
        columns = [v for v in values.values() if isinstance(v, list)]
        if len(columns) < len(values) or len({len(c) for c in columns}) != 1:
            raise RowError(f"`{key}` is not a list of turns")
        turns = zip(*columns, strict=True)
        values = [dict(zip(values, turn, strict=True)) for turn in turns]
    if not isinstance(values, list) or not values:
        raise RowError(f"`{key}` is not a list of turns")
    messages = []
    for i, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise RowError(f"turn {i} of `{key}` is not an object")
        name = value.get("role", value.get("from"))
        content = value.get("content", value.get("value"))
        if not isinstance(name, str) or name not in _ROLES:
            raise RowError(f"turn {i} of `{key}` has the unknown role {name!r}")
        if not isinstance(content, str):
            raise RowError(f"turn {i} of `{key}` has no text")
        messages.append(Message(role=_ROLES[name], content=content))
    return messages


def _pair_prompt(row: Row) -> Conversation:
    """Returns the turns of a pair that stand outside of `chosen` and `rejected`."""
    prompt = _system(row)
    if "conversations" in row:
        prompt += _messages(row["conversations"], "conversations")
    elif isinstance(row.get("prompt"), str):
        prompt.append(Message(role="user", content=row["prompt"]))
    elif row.get("prompt") is not None:
        prompt += _messages(row["prompt"], "prompt")
    return prompt


def _preference(row: Row) -> Preference:
    """Returns the pair of a row in any of the known forms."""
    for key in ("chosen", "rejected"):
        if key not in row:
            raise RowError(f"a preference pair needs `{key}`")
    prompt = _pair_prompt(row)
    chosen_prompt, chosen = _answer(row["chosen"], "chosen", prompt)
    rejected_prompt, rejected = _answer(row["rejected"], "rejected", prompt)
    if chosen_prompt != rejected_prompt:
        raise RowError("`chosen` and `rejected` do not answer the same prompt")
    if not chosen_prompt or chosen_prompt[-1]["role"] != "user":
        raise RowError("the prompt of the pair does not end in a user turn")
    return Preference(chosen_prompt, chosen, rejected)


def _answer(value: Any, key: str, prompt: Conversation) -> tuple[Conversation, str]:
    """Returns the prompt and the last answer of one side of a pair."""
    if isinstance(value, str) and not prompt:
        turns = _transcript(value, key)
    elif isinstance(value, str):
        return prompt, value
    else:
        is_turn = isinstance(value, Mapping) and isinstance(
            value.get("content", value.get("value")), str
        )
        turns = _messages([value] if is_turn else value, key)
    if turns[-1]["role"] != "assistant":
        raise RowError(f"`{key}` does not end in an answer of the assistant")
    # A list of one turn is the answer; a longer one repeats the prompt.
    return (turns[:-1] if len(turns) > 1 else prompt), turns[-1]["content"]


def _transcript(text: str, key: str) -> Conversation:
    r"""Splits a "\n\nHuman: ...\n\nAssistant: ..." transcript into turns."""
    pieces = re.split(r"\n\n(Human|Assistant):", text)
    if len(pieces) < 3 or pieces[0].strip():
        raise RowError(
            f"`{key}` is a text without a prompt, and no transcript that begins with "
            "'\\n\\nHuman:'"
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        Message(role=roles[name], content=content.strip())
        for name, content in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
