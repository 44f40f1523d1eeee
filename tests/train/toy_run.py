"""A loop whose step compiles at once: weights and loss depend on every batch so far."""

import dataclasses
import signal

import grain
import jax
import jax.numpy as jnp
import numpy as np
from checks import tiny

from mil_jax.config import ComputeConfig, OptimizerConfig
from mil_jax.models.decoder import Blueprint
from mil_jax.train import state as state_lib
from mil_jax.train.loop import Loop

# Two layers that are scanned, so that states are stacked and unstacked on their way.
CONFIG = dataclasses.replace(tiny.CONFIGS["mamba"], layer_types=("mamba",) * 2)
OPTIMIZER = state_lib.make_optimizer(OptimizerConfig(lr=1e-2), 100)


def batch(i):
    rng = np.random.default_rng(i)
    return {
        "tokens": rng.integers(0, 9, (2, 3)).astype(np.int32),
        "number": np.full((2, 1), i, np.int32),
    }


@jax.jit
def update(state, batch):
    noise = jnp.sum(batch["tokens"] * jnp.arange(1.0, 7.0).reshape(2, 3))
    grads = jax.tree.map(lambda w: jnp.sin(w * noise), state.trainable)
    updates, opt_state = OPTIMIZER.update(grads, state.opt_state, state.trainable)
    trainable = jax.tree.map(jnp.add, state.trainable, updates)
    size = sum(jnp.sum(w) for w in jax.tree.leaves(trainable))
    metrics = {"loss": size, "grad_norm": noise, "seen": batch["number"][0, 0]}
    return state_lib.TrainState(state.step + 1, trainable, opt_state), metrics


class Steps:
    """The step function; may signal its own process or spoil a metric."""

    def __init__(self, signals=None, spoil=None):
        self.seen = []
        self.signals = signals or {}
        self.spoil = spoil or {}

    def __call__(self, state, frozen, teacher, batch):
        step = int(state.step)
        self.seen.append(step)
        for number in self.signals.get(step, ()):
            signal.raise_signal(number)
        state, metrics = update(state, batch)
        if step in self.spoil:
            metrics[self.spoil[step]] = jnp.float32(np.nan)
        return state, metrics


def run(
    folder, mesh, num_steps=10, *, checkpoint_every=3, stop_at=None, data="", **steps
):
    """Runs or continues; returns the state on disk's layout and the step function.

    `stop_at` is a batch that cannot be read: as good as a kill.
    """

    def read(i):
        if i == stop_at:
            raise KeyboardInterrupt
        return batch(i)

    folder.mkdir(exist_ok=True)
    blueprint = Blueprint.create(CONFIG, ComputeConfig())
    state, frozen = state_lib.create(
        blueprint, tiny.random_params(CONFIG), "mamba", OPTIMIZER, mesh
    )
    step_fn = Steps(**steps)
    loop = Loop(
        name="toy",
        folder=folder,
        blueprint=blueprint,
        step_fn=step_fn,
        dataset=grain.MapDataset.range(100).map(read),
        num_steps=num_steps,
        checkpoint_every=checkpoint_every,
        mesh=mesh,
        data=data,
    )
    state = loop.run(state, frozen, None)
    return state_lib.to_disk(blueprint, state), step_fn


def assert_same_state(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def check_killed_run(tmp_path, mesh):
    """A run stopped between checkpoints continues to the state it would have had."""
    expected, _ = run(tmp_path / "undisturbed", mesh, 6, checkpoint_every=2)
    try:
        run(tmp_path / "killed", mesh, 6, checkpoint_every=2, stop_at=3)
    except KeyboardInterrupt:
        pass
    found, step_fn = run(tmp_path / "killed", mesh, 6, checkpoint_every=2)
    assert step_fn.seen == [2, 3, 4, 5]
    assert_same_state(found, expected)
