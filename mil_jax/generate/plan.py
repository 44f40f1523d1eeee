"""What a model is asked to do, checked against its config and tokenizer beforehand."""

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import jax
import numpy as np

from mil_jax.checkpoint import models
from mil_jax.checkpoint.orbax_io import TOKENIZER_FILES
from mil_jax.config import ModelConfig
from mil_jax.data.chat import Tokenizer, encode_prompt, load_tokenizer
from mil_jax.data.row_files import Row, RowError
from mil_jax.data.types import Message
from mil_jax.errors import UserError
from mil_jax.generate import draft_vocab, speculative
from mil_jax.generate.sampler import Sampling

logger = logging.getLogger(__name__)

# A text, or a chat that waits for an answer.
Request: TypeAlias = str | Sequence[Message]
# As K: chosen while decoding.
AUTO = "auto"
FORMS = '{"prompt": TEXT} or {"messages": [{"role": ..., "content": ...}, ...]}'


@dataclasses.dataclass(frozen=True)
class Options:
    """What an answer depends on beside its request.

    Attributes:
        model: A folder, hub id or `demo_teacher`.
        draft: The same, of a smaller model; None decodes plainly.
        k: Draft tokens per step, or "auto": chosen between blocks of steps.
        chat: Whether to use the chat template; None if there is one.
        system: System message of chats that have none.
        max_new_tokens: Limit on an answer.
        max_length: Limit on prompt and answer together, beside the model's own.
        sampling: How tokens are drawn.
        seed: Of the sampling.
        dtype: "auto" is bfloat16 on a GPU, else float32.
        stop: An answer ends before the first of these.
    """

    model: str
    draft: str | None = None
    k: int | Literal["auto"] = 4
    chat: bool | None = None
    system: str | None = None
    max_new_tokens: int = 256
    max_length: int | None = None
    sampling: Sampling = Sampling()
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("k", "max_new_tokens", "max_length"):
            value = getattr(self, name)
            may_be = {"k": AUTO, "max_length": None}.get(name, 1)
            if value != may_be and not (isinstance(value, int) and value >= 1):
                also = f' or "{AUTO}"' if name == "k" else ""
                raise UserError(f"{name} is {value}; it must be at least 1{also}")
        if not math.isfinite(self.sampling.temperature):
            raise UserError(
                f"temperature is {self.sampling.temperature}; it must be finite"
            )
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}; it must be from 0 to {2**32 - 1}")
        if "" in self.stop:
            raise UserError("a stop string is empty; give at least one character")
        if self.chat is False and self.system is not None:
            raise UserError("a system message needs the chat template: not with nochat")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A model that is known to fit its options, without its weights.

    Attributes:
        options: What was asked for.
        config: The model's architecture.
        folder: Where it lies.
        draft_folder: Where the draft lies.
        draft_vocab: The tokens that it may propose; None for all.
        tokenizer: The model's.
        is_chat: Whether requests go through the chat template.
        draft_positions: How many the draft knows; None without attention or a draft.
    """

    options: Options
    config: ModelConfig
    folder: Path
    draft_folder: Path | None
    draft_vocab: np.ndarray | None
    tokenizer: Tokenizer
    is_chat: bool
    draft_positions: int | None = None

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: the model's and the tokenizer's."""
        ids = {*self.config.eos_token_ids, self.tokenizer.eos_token_id}
        return tuple(sorted(ids - {None}))

    @property
    def dtype(self) -> str:
        """Dtype of weights and matrix products."""
        if self.options.dtype != "auto":
            return self.options.dtype
        return "bfloat16" if jax.default_backend() == "gpu" else "float32"

    def encode(self, request: Request) -> np.ndarray:
        """Returns the prompt's tokens.

        Raises:
            UserError: The request is empty or malformed, or leaves no room for an answer.
        """
        if not request:
            raise UserError("the prompt is empty; write something")
        try:
            json.dumps(request, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the prompt is not Unicode text ({error.reason})"
            ) from None
        if self.is_chat:
            if isinstance(request, str):
                request = [Message(role="user", content=request)]
            if self.options.system is not None and request[0].get("role") != "system":
                message = Message(role="system", content=self.options.system)
                request = [message, *request]
            tokens = encode_prompt(self.tokenizer, request)
        elif isinstance(request, str):
            tokens = np.array(self.tokenizer(request)["input_ids"], np.int32)
        else:
            raise UserError("messages need a chat template; give a prompt")
        self._check(tokens)
        return tokens

    def _check(self, tokens: np.ndarray) -> None:
        if not tokens.size:
            raise UserError("the prompt has no tokens; write something")
        if tokens.max() >= self.config.vocab_size:
            raise UserError(
                f"the tokenizer gave token {tokens.max()}; the model's vocabulary has "
                f"{self.config.vocab_size}, so the tokenizer is another model's"
            )
        limits = {}
        # Without attention no layer knows positions.
        if "attention" in self.config.layer_types:
            limits["the model's max_position_embeddings"] = (
                self.config.max_position_embeddings
            )
        if self.options.max_length is not None:
            limits["max_length"] = self.options.max_length
        for name, limit in limits.items():
            if tokens.size + self.options.max_new_tokens > limit:
                raise UserError(
                    f"the prompt has {tokens.size} tokens; with "
                    f"{self.options.max_new_tokens} new ones (max_new_tokens) that "
                    f"exceeds {name}, {limit}; "
                    + ("ask for fewer" if tokens.size < limit else "shorten the prompt")
                )
        most = self.draft_positions
        if most is not None and tokens.size + self.options.max_new_tokens > most:
            _warn_of_positions(self.options.draft, most)


@functools.cache
def _warn_of_positions(draft: str, limit: int) -> None:
    # Answers are the model's in any case.
    logger.warning(
        "the draft %s knows %d positions (max_position_embeddings); beyond them fewer of "
        "its tokens may be accepted",
        draft,
        limit,
    )


def make_plan(options: Options) -> Plan:
    """Reads configs and tokenizers, so that what does not fit is known at once.

    Raises:
        UserError: A model or tokenizer is missing, or the draft is not of the same
            vocabulary.
    """
    config, folder = models.read_config(options.model)
    tokenizer = load_tokenizer(folder, needs_chat_template=options.chat is True)
    is_chat = bool(tokenizer.chat_template) and options.chat is not False
    if options.system is not None and not is_chat:
        raise UserError(f"a system message needs a chat template; {folder} has none")
    draft_folder, vocab, positions = None, None, None
    if options.draft is not None:
        draft_config, draft_folder = models.read_config(options.draft)
        if draft_config.vocab_size != config.vocab_size:
            raise UserError(
                f"the draft {options.draft} has a vocabulary of "
                f"{draft_config.vocab_size}, the model of {config.vocab_size}; both must "
                "use the same"
            )
        _check_same_tokenizer(tokenizer, draft_folder)
        if options.k != AUTO:
            speculative.check_models(config, draft_config, options.k)
        vocab = draft_vocab.load(draft_folder, config.vocab_size)
        if "attention" in draft_config.layer_types:
            positions = draft_config.max_position_embeddings
    return Plan(
        options, config, folder, draft_folder, vocab, tokenizer, is_chat, positions
    )


def _check_same_tokenizer(tokenizer: Tokenizer, draft: Path) -> None:
    # Without one the draft cannot contradict.
    if not any((draft / name).is_file() for name in TOKENIZER_FILES):
        return
    other = load_tokenizer(draft, needs_chat_template=False)
    if other.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"the draft {draft} has another tokenizer than the model; take a draft that "
            "was made for this model"
        )


def request_of(row: Row) -> Request:
    """Returns the text or the chat of a line.

    Raises:
        RowError: It has neither of the two forms.
    """
    if ("prompt" in row) == ("messages" in row):
        keys = ", ".join(map(str, row)) or "(none)"
        raise RowError(f"unknown form with the keys {keys}; expected {FORMS}")
    if "prompt" in row:
        if not isinstance(row["prompt"], str):
            raise RowError("`prompt` is not a text")
        return row["prompt"]
    messages = row["messages"]
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) for message in messages
    ):
        raise RowError("`messages` is not a list of turns")
    return messages
