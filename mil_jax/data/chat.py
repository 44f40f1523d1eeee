"""Chats to token ids through the chat template, with answer-only loss masks."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias, get_args

import numpy as np
from jaxtyping import Bool, Int, Int32

from mil_jax.data.types import Conversation, Example, Message, Pair, Role
from mil_jax.errors import UserError

__all__ = [
    "Conversation",
    "Example",
    "Message",
    "Pair",
    "Tokenizer",
    "encode_chat",
    "encode_pair",
    "encode_prompt",
    "load_tokenizer",
]

# A transformers.PreTrainedTokenizerBase; importing its class would cost every start-up
# about a second.
Tokenizer: TypeAlias = Any
_ROLES = get_args(Role)
_ANY_OF = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_FILES = "tokenizer.json and tokenizer_config.json (or tokenizer.model)"


def load_tokenizer(
    path_or_id: str | os.PathLike[str], *, needs_chat_template: bool = True
) -> Tokenizer:
    """Returns the tokenizer in a folder or of a Hugging Face model id.

    A folder may hold a `tokenizer.json`, or a bare SentencePiece or tiktoken
    `tokenizer.model`. A bare `tokenizer.model` has no chat template, and that of
    Llama 3 no special tokens either: for chats, put the `tokenizer.json` and
    `tokenizer_config.json` of the Hugging Face release next to it.

    Args:
        path_or_id: A local folder or a model id such as "HuggingFaceH4/zephyr-7b-beta".
        needs_chat_template: Whether chats will be encoded.

    Raises:
        UserError: There is no tokenizer, or no chat template or EOS token for chats.
    """
    name = os.fspath(path_or_id)
    is_folder = Path(name).is_dir()
    if not is_folder and (Path(name).is_absolute() or name.startswith((".", "~"))):
        raise UserError(
            f"tokenizer folder {name} does not exist; give one with {_FILES}"
        )
    if is_folder and not any((Path(name) / file).is_file() for file in _ANY_OF):
        raise UserError(
            f"cannot load a tokenizer from folder {name}: there is none; copy {_FILES} of "
            "its model into it"
        )
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        where = f"folder {name}" if is_folder else f"local folder or model id {name!r}"
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot load a tokenizer from {where}; it needs {_FILES} ({reason})"
        ) from error
    if needs_chat_template and not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {name} has no chat template; add chat_template.jinja "
            "or the tokenizer_config.json of the chat model's release"
        )
    if needs_chat_template and tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {name} defines no EOS token, so chats would not end; "
            "add the tokenizer_config.json of the chat model's release"
        )
    return tokenizer


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], *, max_length: int | None = None
) -> Example:
    """Tokenises a whole chat; the loss mask covers every answer of the assistant.

    The text is exactly what the chat template renders: if the template writes no BOS,
    there is none, and the tokenizer adds none of its own. An answer begins where the
    template's generation prompt ends and includes the end-of-turn or EOS token. White
    space that the template writes behind that token is left out, because nothing is
    generated after it. A token across the border of the answer counts as prompt.

    Args:
        tokenizer: From `load_tokenizer`.
        messages: Turns; those of the assistant get a loss.
        max_length: Keep only the first `max_length` tokens.

    Raises:
        UserError: A message is malformed, or the template rewrites earlier turns when
            later ones follow, so that answers cannot be located.
    """
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    tokens, mask = _encode(tokenizer, messages, answers)
    return Example(tokens[:max_length], mask[:max_length])


def encode_prompt(
    tokenizer: Tokenizer, messages: Sequence[Message]
) -> Int32[np.ndarray, "L"]:
    """Tokenises a chat that waits for an answer, with the generation prompt at its end.

    Raises:
        UserError: A message is malformed or the last one is already an answer.
    """
    _check_messages(messages)
    if messages[-1]["role"] == "assistant":
        raise UserError(
            "a prompt ends in an assistant turn; drop the turn to be answered"
        )
    text = _render(tokenizer, messages, add_generation_prompt=True)
    return np.array(_token_ids(tokenizer, text), np.int32)


def encode_pair(
    tokenizer: Tokenizer, prompt: Sequence[Message], chosen: str, rejected: str
) -> Pair:
    """Tokenises a preference pair; the masks cover only the two last answers.

    Earlier answers of the assistant belong to the prompt.
    """

    def encode(answer: str) -> Example:
        messages = [*prompt, Message(role="assistant", content=answer)]
        return _encode(tokenizer, messages, [len(prompt)])

    return Pair(encode(chosen), encode(rejected))


def _encode(
    tokenizer: Tokenizer, messages: Sequence[Message], answers: Sequence[int]
) -> Example:
    """Tokenises a chat with a mask over the messages whose indices are `answers`."""
    _check_messages(messages)
    text = _render(tokenizer, messages)
    spans = []
    for i in answers:
        header = _render(tokenizer, messages[:i], add_generation_prompt=True)
        whole = _render(tokenizer, messages[: i + 1])
        if not whole.startswith(header):
            raise _not_appending(i, "its generation prompt is no prefix of the answer")
        if not text.startswith(whole):
            raise _not_appending(i, "it changes once later turns follow")
        spans.append((header, whole))
    if getattr(tokenizer, "is_fast", False):
        return _mask_by_offsets(tokenizer, text, spans)
    return _mask_by_prefixes(tokenizer, text, spans)


def _not_appending(index: int, problem: str) -> UserError:
    return UserError(
        f"the chat template does not only append: at message {index} (assistant) "
        f"{problem}; answers cannot be located, use a template without such rewriting"
    )


def _check_messages(messages: Sequence[Message]) -> None:
    if not messages:
        raise UserError("a chat has no messages")
    if messages[0].get("role") == "assistant":
        raise UserError(
            "message 0 is an assistant turn; a chat starts with another role"
        )
    for i, message in enumerate(messages):
        if message.get("role") not in _ROLES:
            raise UserError(
                f"message {i} has role {message.get('role')!r}; "
                f"expected one of {', '.join(_ROLES)}"
            )
        if not isinstance(message.get("content"), str):
            raise UserError(f"message {i} ({message['role']}) has no text in `content`")


def _render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
) -> str:
    """Returns the text that the chat template makes of some messages."""
    import jinja2

    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except jinja2.exceptions.TemplateError as error:
        roles = ", ".join(m["role"] for m in messages)
        raise UserError(
            f"the chat template rejects a chat with the turns [{roles}]: {error}"
        ) from error


def _token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _mask_by_offsets(
    tokenizer: Tokenizer, text: str, spans: Sequence[tuple[str, str]]
) -> Example:
    encoded = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    starts, ends = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
    tokens = np.array(encoded["input_ids"], np.int32)
    mask = np.zeros(tokens.shape, bool)
    for header, whole in spans:
        inside = (starts >= len(header)) & (starts < len(whole)) & (ends <= len(whole))
        mask |= _cut_after_end_of_turn(tokenizer, tokens, inside)
    return Example(tokens, mask)


def _mask_by_prefixes(
    tokenizer: Tokenizer, text: str, spans: Sequence[tuple[str, str]]
) -> Example:
    """Locates answers without offsets, by the token ids of prefixes of the text."""
    tokens = _token_ids(tokenizer, text)
    positions = np.arange(len(tokens))
    mask = np.zeros(len(tokens), bool)
    for header, whole in spans:
        bounds = []
        for part in (header, whole):
            ids = _token_ids(tokenizer, part)
            if tokens[: len(ids)] != ids:
                raise UserError(
                    "this tokenizer reports no offsets and merges tokens across the "
                    f"border of an answer ({part[-20:]!r}); use its fast version "
                    "(tokenizer.json)"
                )
            bounds.append(len(ids))
        inside = (positions >= bounds[0]) & (positions < bounds[1])
        mask |= _cut_after_end_of_turn(tokenizer, np.array(tokens), inside)
    return Example(np.array(tokens, np.int32), mask)


def _cut_after_end_of_turn(
    tokenizer: Tokenizer, tokens: Int[np.ndarray, "L"], inside: Bool[np.ndarray, "L"]
) -> Bool[np.ndarray, "L"]:
    """Ends an answer at its last special token; without one it stays as it is."""
    special = set(tokenizer.all_special_ids)
    special |= {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    last = [i for i in np.flatnonzero(inside) if int(tokens[i]) in special][-1:]
    if last:
        inside = inside & (np.arange(len(tokens)) <= last[0])
    return inside
