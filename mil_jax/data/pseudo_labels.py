"""The teacher answers prompts; its answers are the data of stage 1 (paper Sec. 3)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mil_jax.data.chat import Tokenizer, encode_prompt
from mil_jax.data.records import RecordWriter
from mil_jax.data.types import Conversation, Example
from mil_jax.generate.decode import generate
from mil_jax.generate.sampler import Sampling
from mil_jax.models.decoder import HybridLM
from mil_jax.progress import progress

# Batches per shard. Prompts of one shard are answered in the order of their lengths, so that
# rows of a batch need about as much padding and end about together.
BATCHES_PER_SHARD = 4


def write(
    teacher: HybridLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Conversation],
    directory: Path,
    *,
    fingerprint: str,
    inputs: Mapping[str, str] | None = None,
    batch_size: int,
    max_new_tokens: int,
    max_length: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
) -> None:
    """Writes one record per prompt: the prompt, the teacher's answer, the answer's mask.

    Records have the order of the prompts. A killed run goes on after the last finished shard
    and writes the same records that an undisturbed one writes: what a batch holds and how it
    is sampled depends on its shard's number alone.

    Args:
        teacher: Best built with `layout="decode"`.
        tokenizer: Has the chat template.
        prompts: Chats that end in a user turn.
        directory: Of the records.
        fingerprint: Names all that the answers depend on.
        inputs: As `RecordWriter` takes them.
        batch_size: Prompts answered together.
        max_new_tokens: Limit on an answer; one that reaches it ends without EOS.
        max_length: Of prompt and answer. A longer prompt is recorded without an answer,
            so that records and prompts keep the same numbers; training skips it.
        sampling: Greedy by default.
        seed: Of the sampling.
    """
    shard_size = BATCHES_PER_SHARD * batch_size
    with RecordWriter(
        directory, fingerprint=fingerprint, shard_size=shard_size, inputs=inputs
    ) as writer:
        start = writer.num_written
        bar = progress(
            total=len(prompts), initial=start, desc="pseudo_labels", unit="prompt"
        )
        with bar:
            for first in range(start, len(prompts), shard_size):
                chats = range(first, min(first + shard_size, len(prompts)))
                tokens = [encode_prompt(tokenizer, prompts[i]) for i in chats]
                answers = _answer_shard(
                    teacher,
                    tokens,
                    bar,
                    batch_size=batch_size,
                    max_new_tokens=max_new_tokens,
                    max_length=max_length,
                    sampling=sampling,
                    seed=seed + first,
                )
                for prompt, answer in zip(tokens, answers, strict=True):
                    writer.write(_example(prompt, answer))


def _answer_shard(
    teacher: HybridLM,
    prompts: Sequence[np.ndarray],
    bar: tqdm,
    *,
    batch_size: int,
    max_new_tokens: int,
    max_length: int,
    sampling: Sampling,
    seed: int,
) -> list[np.ndarray]:
    """Returns an answer per prompt, empty for those that leave no room for one."""
    answers = [np.zeros((0,), np.int32)] * len(prompts)
    fits = [i for i, prompt in enumerate(prompts) if prompt.size < max_length]
    bar.update(len(prompts) - len(fits))
    fits.sort(key=lambda i: prompts[i].size)
    for at in range(0, len(fits), batch_size):
        members = fits[at : at + batch_size]
        # Always a full batch, so that the last one compiles nothing new.
        filled = members + members[:1] * (batch_size - len(members))
        done = generate(
            teacher,
            [prompts[i] for i in filled],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed + at,
        )
        for i, answer in zip(members, done.rows(), strict=False):
            answers[i] = answer[: max_length - prompts[i].size]
        bar.update(len(members))
    return answers


def _example(prompt: np.ndarray, answer: np.ndarray) -> Example:
    tokens = np.concatenate([prompt, answer]).astype(np.int32)
    mask = np.arange(tokens.size) >= prompt.size
    return Example(tokens, mask)
