"""A program that writes pseudo-labels of a tiny model: python labels_run.py FOLDER."""

import dataclasses
import sys
import time
from pathlib import Path

from checks import tiny

from mil_jax.checkpoint import models
from mil_jax.data import pseudo_labels, sources
from mil_jax.data.chat import load_tokenizer
from mil_jax.generate.sampler import Sampling

# Every 16th token ends an answer, so that some answers of random weights end early.
CONFIG = dataclasses.replace(
    tiny.CONFIGS["mamba"], vocab_size=512, eos_token_ids=tuple(range(3, 512, 16))
)
PROMPTS = sources.prompts("demo:train:0:37")
OPTIONS = {
    "fingerprint": "f",
    "batch_size": 2,
    "max_new_tokens": 12,
    "max_length": 96,
    "sampling": Sampling(temperature=1.0),
}


def tokenizer():
    return load_tokenizer(models.resolve("demo_teacher"))


def model():
    return tiny.build(CONFIG, tiny.random_params(CONFIG))


def write(folder, prompts=PROMPTS, **changes):
    return pseudo_labels.write(
        model(), tokenizer(), prompts, folder, **(OPTIONS | changes)
    )


class Slow:
    """Prompts that take their time, to be killed in."""

    def __len__(self):
        return len(PROMPTS)

    def __getitem__(self, index):
        time.sleep(0.05)
        return PROMPTS[index]


if __name__ == "__main__":
    write(Path(sys.argv[1]), Slow())
