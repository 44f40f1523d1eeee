"""The teacher answers prompts; its answers are the data of stage 1 (paper Sec. 3)."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mil_jax.data.chat import Tokenizer, encode_prompt
from mil_jax.data.records import RecordWriter
from mil_jax.data.types import Conversation, Example
from mil_jax.generate.decode import generate
from mil_jax.generate.sampler import Sampling
from mil_jax.models.decoder import HybridLM


def write(
    teacher: HybridLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Conversation],
    directory: Path,
    *,
    fingerprint: str,
    batch_size: int,
    max_new_tokens: int,
    max_length: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
) -> int:
    """Writes one record per prompt: the prompt, the teacher's answer, the answer's mask.

    A killed run goes on after the last finished shard and writes the same records that an
    undisturbed one writes: batch i holds the prompts from `i * batch_size` on, and its
    sampling depends on i alone.

    Args:
        teacher: Best built with `scan_layers=False`.
        tokenizer: Has the chat template.
        prompts: Chats that end in a user turn.
        directory: Of the records.
        fingerprint: Names all that the answers depend on.
        batch_size: Prompts answered together.
        max_new_tokens: Limit on an answer; one that reaches it ends without EOS.
        max_length: Of prompt and answer. A longer prompt is recorded without an answer,
            so that records and prompts keep the same numbers; training skips it.
        sampling: Greedy by default.
        seed: Of the sampling.

    Returns:
        Number of records in the folder.
    """
    with RecordWriter(
        directory, fingerprint=fingerprint, shard_size=4 * batch_size
    ) as writer:
        bar = tqdm(
            total=len(prompts),
            initial=writer.num_written,
            desc="pseudo_labels",
            unit="prompt",
            dynamic_ncols=True,
        )
        with bar:
            start = writer.num_written
            for first in range(start, len(prompts), batch_size):
                chats = [
                    prompts[i]
                    for i in range(first, min(first + batch_size, len(prompts)))
                ]
                tokens = [encode_prompt(tokenizer, chat) for chat in chats]
                answers = _answer(
                    teacher,
                    tokens,
                    max_new_tokens=max_new_tokens,
                    max_length=max_length,
                    batch_size=batch_size,
                    sampling=sampling,
                    seed=seed + first,
                )
                for prompt, answer in zip(tokens, answers, strict=True):
                    writer.write(_example(prompt, answer))
                bar.update(len(chats))
        return start + max(len(prompts) - start, 0)


def _answer(
    teacher: HybridLM,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    max_length: int,
    batch_size: int,
    sampling: Sampling,
    seed: int,
) -> Iterator[np.ndarray]:
    """Yields an answer per prompt, empty for those that leave no room for one."""
    fits = [i for i, p in enumerate(prompts) if p.size < max_length]
    rows = [prompts[i] for i in fits]
    if rows:
        # Always a full batch, so that the last one compiles nothing new.
        filled = rows + [rows[0]] * (batch_size - len(rows))
        done = generate(
            teacher,
            filled,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
        )
        answers = dict(zip(fits, done.rows(), strict=False))
    for i, prompt in enumerate(prompts):
        if i in fits:
            yield answers[i][: max_length - prompt.size]
        else:
            yield np.zeros((0,), np.int32)


def _example(prompt: np.ndarray, answer: np.ndarray) -> Example:
    tokens = np.concatenate([prompt, answer]).astype(np.int32)
    mask = np.arange(tokens.size) >= prompt.size
    return Example(tokens, mask)
