"""Several short documents in one row."""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from jaxtyping import Bool, Int32

from mil_jax.data.types import Example


class Rows(TypedDict):
    """Rows of documents; `segment_ids` is 1, 2, ... in them and 0 at padding."""

    tokens: Int32[np.ndarray, "B L"]
    loss_mask: Bool[np.ndarray, "B L"]
    segment_ids: Int32[np.ndarray, "B L"]


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Returns bins of document indices, first fit: each goes into the first with room.

    Documents keep their order inside a bin, and bins are in the order of their first
    document. Takes O(n log n) time: a tree over the bins knows the largest room below
    each node.

    Args:
        lengths: Length of each document, in [1, max_length].
        max_length: Capacity of a bin.

    Raises:
        ValueError: A length is outside of [1, max_length].
    """
    size = 1
    while size < len(lengths):
        size *= 2
    # The children of a node are 2 * node and 2 * node + 1; the bins are the leaves.
    room = [max_length] * (2 * size)
    bins: list[list[int]] = []
    for index, length in enumerate(lengths):
        if not 1 <= length <= max_length:
            raise ValueError(
                f"document {index} has length {length}; expected 1 to {max_length}"
            )
        node = 1
        while node < size:
            node *= 2
            if room[node] < length:
                node += 1
        if node - size == len(bins):
            bins.append([])
        bins[node - size].append(index)
        room[node] -= int(length)
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins


def lay_out(rows: Sequence[Sequence[Example]], length: int, pad_id: int = 0) -> Rows:
    """Lays the examples of each row one after the other and pads on the right.

    The first token of a document has no loss: nothing of its own document precedes it.

    Raises:
        ValueError: A row's examples are longer than `length` together.
    """
    shape = (len(rows), length)
    tokens = np.full(shape, pad_id, np.int32)
    loss_mask = np.zeros(shape, bool)
    segment_ids = np.zeros(shape, np.int32)
    for row, examples in enumerate(rows):
        start = 0
        for segment, example in enumerate(examples, start=1):
            stop = start + len(example.tokens)
            if stop > length:
                raise ValueError(
                    f"row {row} has {stop} tokens; there is room for {length}"
                )
            tokens[row, start:stop] = example.tokens
            loss_mask[row, start + 1 : stop] = example.loss_mask[1:]
            segment_ids[row, start:stop] = segment
            start = stop
    return Rows(tokens=tokens, loss_mask=loss_mask, segment_ids=segment_ids)
