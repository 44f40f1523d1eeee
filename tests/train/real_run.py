"""A program that trains a tiny hybrid with the real step: python real_run.py FOLDER."""

import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
from checks import tiny

from mil_jax import sharding
from mil_jax.config import ComputeConfig, OptimizerConfig, StageConfig
from mil_jax.data import pipeline
from mil_jax.data.types import Example
from mil_jax.models.decoder import Blueprint
from mil_jax.train import state as state_lib
from mil_jax.train.loop import Loop
from mil_jax.train.step import make_loss_fn, make_train_step

CONFIG = dataclasses.replace(tiny.CONFIGS["mamba"], layer_types=("mamba",) * 2)
STAGE = StageConfig(
    name="distill",
    batch_size=4,
    length=24,
    packed=True,
    optimizer=OptimizerConfig(lr=1e-2, warmup_steps=3),
)
NUM_STEPS, CHECKPOINT_EVERY = 24, 5


def records():
    examples = []
    for i in range(240):
        rng = np.random.default_rng(i)
        length = int(rng.integers(4, 20))
        # Every token is three after the one before, which a few steps suffice to learn.
        tokens = (rng.integers(tiny.VOCAB) + 3 * np.arange(length)) % tiny.VOCAB
        tokens = tokens.astype(np.int32)
        examples.append(Example(tokens, np.arange(length) >= length // 3))
    return examples


def main(folder):
    mesh = sharding.make_mesh()
    blueprint = Blueprint.create(CONFIG, ComputeConfig())
    optimizer = state_lib.make_optimizer(STAGE.optimizer, NUM_STEPS)
    state, frozen = state_lib.create(
        blueprint, tiny.random_params(CONFIG), "mamba", optimizer, mesh
    )
    dataset = pipeline.batches(
        records(),
        batch_size=STAGE.batch_size,
        length=STAGE.length,
        packed=True,
        seed=0,
        num_epochs=1,
        pad_id=0,
    )
    train_step = make_train_step(
        make_loss_fn(STAGE, blueprint, None),
        optimizer,
        state_lib.make_schedule(STAGE.optimizer, NUM_STEPS),
        mesh=mesh,
    )

    def step_fn(*args):
        time.sleep(0.05)  # So that there is time to be killed between two steps.
        return train_step(*args)

    loop = Loop(
        name="real",
        folder=folder,
        blueprint=blueprint,
        step_fn=step_fn,
        dataset=dataset,
        num_steps=NUM_STEPS,
        checkpoint_every=CHECKPOINT_EVERY,
        mesh=mesh,
    )
    state = loop.run(state, frozen, None)
    on_disk = state_lib.to_disk(blueprint, state)
    np.savez(folder / "weights.npz", **on_disk.trainable)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
