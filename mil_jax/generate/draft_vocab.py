"""Which tokens a draft may propose: the commonest ones, so that its head is small."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, Int32

from mil_jax.errors import UserError

FILE = "draft_vocab.npy"


def count(
    token_arrays: Iterable[Int[np.ndarray, "L"]], vocab_size: int
) -> Int[np.ndarray, "V"]:
    """Returns how often each token occurs."""
    counts = np.zeros((vocab_size,), np.int64)
    for tokens in token_arrays:
        counts += np.bincount(tokens, minlength=vocab_size)
    return counts


def choose(
    counts: Int[np.ndarray, "V"], size: int, always: Sequence[int] = ()
) -> Int32[np.ndarray, "N"]:
    """Returns the `size` commonest tokens, sorted by id.

    Args:
        counts: From `count`.
        size: How many.
        always: Tokens that are among them whatever their count, such as EOS.
    """
    first = np.zeros(counts.shape, bool)
    first[list(always)] = True
    order = np.lexsort((np.arange(counts.size), -counts, ~first))
    return np.sort(order[:size]).astype(np.int32)


def save(folder: Path, ids: Int32[np.ndarray, "N"]) -> None:
    """Writes the tokens beside a model."""
    partial = folder / f".{FILE}"
    with partial.open("wb") as file:
        np.save(file, ids)
    partial.replace(folder / FILE)


def load(folder: Path, vocab_size: int | None = None) -> Int32[np.ndarray, "N"] | None:
    """Returns the tokens stored beside a model; None where all may be proposed.

    Args:
        folder: The model's.
        vocab_size: The model's tokens, to check the stored ones.

    Raises:
        UserError: The file cannot be read, or does not fit the model.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); write it again") from None
    is_list = ids.ndim == 1 and ids.size and np.issubdtype(ids.dtype, np.integer)
    if not is_list or np.unique(ids).size < ids.size or ids.min() < 0:
        raise UserError(f"{path} does not hold tokens, each once; write it again")
    if vocab_size is not None and ids.max() >= vocab_size:
        raise UserError(
            f"{path} holds token {ids.max()}; the model has {vocab_size} tokens"
        )
    return ids.astype(np.int32)
