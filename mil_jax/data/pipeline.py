"""Records to batches with Grain: random access, so a run resumes at any step.

`batches` and `pair_batches` return a `grain.MapDataset` whose element i is the batch of
step i, whatever was read before. Epochs follow each other without a gap: each is
shuffled anew, a batch may span two of them, and only the incomplete last batch of a run
is dropped.
"""

import collections
import functools
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import grain
import numpy as np
from jaxtyping import Bool, Int32

from mil_jax.data import packing
from mil_jax.data.types import Example, Pair
from mil_jax.errors import UserError

log = logging.getLogger(__name__)

Batch = dict[str, Int32[np.ndarray, "B L"] | Bool[np.ndarray, "B L"]]
T = TypeVar("T", Example, Pair)


def batches(
    source: Sequence[Example],
    *,
    batch_size: int,
    length: int,
    packed: bool,
    seed: int,
    num_epochs: int | None,
    pad_id: int,
    shuffle: bool = True,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.MapDataset:
    """Returns batches of examples for the training steps.

    Reads the source once to learn the lengths. Examples longer than `length` lose their
    end, those left without an answer token are skipped; both are counted in the log.

    Args:
        source: For instance a `RecordSource`.
        batch_size: Rows of a global batch; each process gets an equal share.
        length: Tokens per row.
        packed: Put several examples into a row, first fit in the order of the source.
        seed: Of the shuffling.
        num_epochs: Passes over the source; None repeats for ever.
        pad_id: Fills the end of a row.
        shuffle: Shuffle the rows, differently in each epoch.
        process_index: This process.
        process_count: Number of processes.

    Returns:
        Batches {"tokens" int32, "loss_mask" bool, "segment_ids" int32}, each
        [batch_size / process_count, length]; segment ids are 0 at padding.

    Raises:
        UserError: No example is usable, the rows of all epochs do not fill one batch,
            or the processes cannot share a batch evenly.
    """
    lengths, kept = [], []
    counts: collections.Counter[str] = collections.Counter()
    for i in range(len(source)):
        example = _expect(source[i], Example)
        counts["truncated"] += len(example.tokens) > length
        if example.loss_mask[1:length].any():
            kept.append(i)
            lengths.append(min(len(example.tokens), length))
        else:
            counts["without an answer"] += 1
    _report(counts, len(source), length)
    bins = packing.pack(lengths, length) if packed else [[i] for i in range(len(kept))]
    rows = [[kept[i] for i in members] for members in bins]
    log.info("%d examples in %d rows of %d tokens", len(kept), len(rows), length)
    make = functools.partial(_example_batch, source, rows, length=length, pad_id=pad_id)
    return _schedule(
        make,
        len(rows),
        batch_size=batch_size,
        seed=seed,
        num_epochs=num_epochs,
        shuffle=shuffle,
        process_index=process_index,
        process_count=process_count,
    )


def pair_batches(
    source: Sequence[Pair],
    *,
    batch_size: int,
    length: int,
    max_prompt_length: int,
    seed: int,
    num_epochs: int | None,
    pad_id: int,
    shuffle: bool = True,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.MapDataset:
    """Returns batches of preference pairs, one pair per row.

    A prompt longer than `max_prompt_length` keeps its end; then the answer is cut so
    that the row has at most `length` tokens. Pairs in which an answer is cut away
    altogether, or both are the same, are skipped and counted in the log.

    Args:
        source: For instance a `RecordSource` of pairs.
        batch_size: Pairs of a global batch.
        length: Tokens per row, prompt and answer together.
        max_prompt_length: Tokens of the prompt to keep, less than `length`.
        seed: Of the shuffling.
        num_epochs: Passes over the source; None repeats for ever.
        pad_id: Fills the end of a row.
        shuffle: Shuffle the pairs, differently in each epoch.
        process_index: This process.
        process_count: Number of processes.

    Returns:
        Batches with `chosen_` and `rejected_` before "tokens", "loss_mask" and
        "segment_ids" as in `batches`.

    Raises:
        UserError: As in `batches`, or `max_prompt_length` leaves no room for an answer.
    """
    if not 0 < max_prompt_length < length:
        raise UserError(
            f"max_prompt_length is {max_prompt_length}; it must be between 1 and "
            f"length - 1 = {length - 1}"
        )
    kept = []
    counts: collections.Counter[str] = collections.Counter()
    for i in range(len(source)):
        pair = _expect(source[i], Pair)
        cut = _cut_pair(pair, max_prompt_length, length)
        counts["truncated"] += any(
            len(a.tokens) < len(b.tokens) for a, b in zip(cut, pair, strict=True)
        )
        if not all(example.loss_mask.any() for example in cut):
            counts["without an answer"] += 1
        elif np.array_equal(cut.chosen.tokens, cut.rejected.tokens):
            counts["with equal answers"] += 1
        else:
            kept.append(i)
    _report(counts, len(source), length)
    make = functools.partial(
        _pair_batch,
        source,
        kept,
        length=length,
        max_prompt_length=max_prompt_length,
        pad_id=pad_id,
    )
    return _schedule(
        make,
        len(kept),
        batch_size=batch_size,
        seed=seed,
        num_epochs=num_epochs,
        shuffle=shuffle,
        process_index=process_index,
        process_count=process_count,
    )


def _expect(record: Example | Pair, kind: type[T]) -> T:
    if not isinstance(record, kind):
        raise UserError(
            f"the records are of type {type(record).__name__}, this stage needs "
            f"{kind.__name__}; write them for this stage"
        )
    return record


def _report(counts: collections.Counter[str], total: int, length: int) -> None:
    truncated = counts.pop("truncated", 0)
    if truncated:
        log.warning("%d of %d records cut to %d tokens", truncated, total, length)
    for reason, count in counts.items():
        log.warning("%d of %d records skipped: %s", count, total, reason)
    if total == counts.total():
        raise UserError(
            f"none of the {total} records has an answer to learn within {length} "
            "tokens; raise the length or check the records"
        )


def _schedule(
    make: Callable[[list[int]], Batch],
    num_rows: int,
    *,
    batch_size: int,
    seed: int,
    num_epochs: int | None,
    shuffle: bool,
    process_index: int,
    process_count: int,
) -> grain.MapDataset:
    """Orders row numbers, cuts them into batches and makes this process's share."""
    if batch_size % process_count:
        raise UserError(
            f"batch_size {batch_size} does not divide among {process_count} processes"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} of {process_count} processes")
    if num_epochs is not None and num_epochs * num_rows < batch_size:
        raise UserError(
            f"{num_rows} rows in {num_epochs} epochs do not fill one batch of "
            f"{batch_size}; lower batch_size, raise num_epochs or add data"
        )
    share = batch_size // process_count
    dataset = grain.MapDataset.range(num_rows).seed(seed)
    if shuffle:
        dataset = dataset.shuffle()
    dataset = dataset.repeat(num_epochs)
    dataset = dataset.batch(batch_size, drop_remainder=True, batch_fn=list)
    start = process_index * share
    return dataset.map(lambda numbers: make(numbers[start : start + share]))


def _example_batch(
    source: Sequence[Example],
    rows: Sequence[Sequence[int]],
    numbers: Sequence[int],
    *,
    length: int,
    pad_id: int,
) -> Batch:
    examples = [[_cut(source[i], length) for i in rows[n]] for n in numbers]
    return dict(packing.lay_out(examples, length, pad_id))


def _pair_batch(
    source: Sequence[Pair],
    kept: Sequence[int],
    numbers: Sequence[int],
    *,
    length: int,
    max_prompt_length: int,
    pad_id: int,
) -> Batch:
    pairs = [_cut_pair(source[kept[n]], max_prompt_length, length) for n in numbers]
    batch = {}
    for side in ("chosen", "rejected"):
        rows = packing.lay_out([[getattr(p, side)] for p in pairs], length, pad_id)
        batch |= {f"{side}_{name}": array for name, array in rows.items()}
    return batch


def _cut(example: Example, length: int) -> Example:
    return Example(example.tokens[:length], example.loss_mask[:length])


def _cut_pair(pair: Pair, max_prompt_length: int, length: int) -> Pair:
    """Cuts prompts on the left, then whole rows on the right."""

    def cut(example: Example) -> Example:
        is_answer = example.loss_mask.any()
        prompt = int(example.loss_mask.argmax()) if is_answer else len(example.tokens)
        start = max(0, prompt - max_prompt_length)
        return _cut(Example(example.tokens[start:], example.loss_mask[start:]), length)

    return Pair(cut(pair.chosen), cut(pair.rejected))
