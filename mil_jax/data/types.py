"""The few types that flow through the data code: chats, examples and pairs."""

from typing import Literal, NamedTuple, TypeAlias, TypedDict

import numpy as np
from jaxtyping import Bool, Int32

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """One turn of a chat."""

    role: Role
    content: str


Conversation: TypeAlias = list[Message]


class Example(NamedTuple):
    """A tokenised chat.

    Attributes:
        tokens: Token ids.
        loss_mask: True where `tokens[t]` is a token the model should predict: the
            answers with the tokens that end them.
    """

    tokens: Int32[np.ndarray, "L"]
    loss_mask: Bool[np.ndarray, "L"]


class Pair(NamedTuple):
    """Two answers to one prompt, each as a whole tokenised chat.

    The prompt is what precedes the first True of each `loss_mask`.
    """

    chosen: Example
    rejected: Example
