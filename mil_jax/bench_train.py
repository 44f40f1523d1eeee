r"""Times training steps at true shapes with random weights and random tokens.

python -m mil_jax.bench_train --config=configs/llama3_8b_mamba_50.py:stage=distill \
    --shape=llama3_8b --batch=2 --length=2048 --out=benchmarks/results/train_h200.json

Prints tokens/s (median over steps that rotate among batches), the memory that XLA plans for
the step (weights, optimizer state, activations) and the time to compile.
"""

import functools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from mil_jax import benchmarking, sharding, surgery
from mil_jax.cli import read_config, run_app
from mil_jax.config import ModelConfig, RunConfig
from mil_jax.errors import UserError
from mil_jax.models import decoder
from mil_jax.models.decoder import Blueprint
from mil_jax.shapes import SHAPES
from mil_jax.train import state as state_lib
from mil_jax.train.step import (
    TrainStep,
    make_loss_fn,
    make_train_step,
    reference_compute,
)

NUM_BATCHES = 4


def define_flags(values: flags.FlagValues) -> None:
    """Declares what the command line may say."""
    text = functools.partial(flags.DEFINE_string, flag_values=values)
    number = functools.partial(flags.DEFINE_integer, flag_values=values)
    config_flags.DEFINE_config_file(
        "config",
        help_string="As mil_jax.main takes it.",
        lock_config=True,
        flag_values=values,
    )
    shapes = sorted(SHAPES)
    flags.DEFINE_enum(
        "shape", "llama3_8b", shapes, "Teacher's shape.", flag_values=values
    )
    text("name", None, "Row's name; default shape, mixer and share.")
    number("batch", 2, "Rows of a step.")
    number("length", 2048, "Tokens of a row.")
    number("steps", 10, "Timed steps.", lower_bound=1)
    text("out", None, "JSON file that gets the row.")


def main(given: flags.FlagValues, argv: Sequence[str]) -> None:
    """Times one config and prints or records its row."""
    del argv
    config = read_config(given["config"])
    row = time_stage(config, given.shape, given.batch, given.length, given.steps)
    if given.name:
        row["config"] = given.name
    print({**row, "device": jax.devices()[0].device_kind})
    if given.out:
        key = ("config", "stage", "batch", "length", "devices", "implementation")
        benchmarking.record(Path(given.out), row, key)


def time_stage(
    config: RunConfig, shape: str, batch: int, length: int, steps: int
) -> dict[str, Any]:
    """Returns the row of one stage.

    Raises:
        UserError: The stage does not train.
    """
    stage = config.stage
    if stage.name not in ("distill", "sft", "dpo"):
        raise UserError(f"stage {stage.name} has no training step to time")
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    teacher = SHAPES[shape]
    arguments = prepare_step(config, teacher, mesh)
    batches = [
        random_batch(mesh, stage.name, batch, length, teacher.vocab_size, seed)
        for seed in range(NUM_BATCHES)
    ]
    seconds, compile_s, peak = time_steps(*arguments, batches, steps)
    share = round(100 * (1 - len(config.conversion.steps[-1]) / teacher.n_layers))
    rows = 2 * batch if stage.name == "dpo" else batch
    return {
        "config": f"{shape}_{config.conversion.mixer}_{share}",
        "stage": stage.name,
        "batch": batch,
        "length": length,
        "devices": mesh.size,
        "implementation": config.compute.implementation,
        "tok_s": round(rows * length / seconds, 1),
        "step_s": round(seconds, 4),
        "peak_gb": round(peak / 1e9, 2),
        "compile_s": round(compile_s, 1),
    }


def prepare_step(
    config: RunConfig, teacher_config: ModelConfig, mesh: jax.sharding.Mesh
) -> tuple[
    TrainStep, state_lib.TrainState, state_lib.Weights, state_lib.Weights | None
]:
    """Returns a stage's step, and random state, frozen weights and teacher for it."""
    stage = config.stage
    dtype = config.compute.param_dtype
    params = decoder.init_params(teacher_config, jax.random.key(0), dtype)
    teacher = teacher_blueprint = None
    if stage.kl_weight or stage.name == "dpo":
        compute = reference_compute(config.compute, mesh)
        teacher_blueprint = Blueprint.create(teacher_config, compute)
        teacher = teacher_blueprint.place(params, mesh)
    layers, mixer = config.conversion.steps[-1], config.conversion.mixer
    params, hybrid = surgery.attention_to_mamba(
        params, teacher_config, layers, mixer=mixer
    )
    blueprint = Blueprint.create(hybrid, config.compute)
    optimizer = state_lib.make_optimizer(stage.optimizer, 1000)
    state, frozen = state_lib.create(
        blueprint, params, stage.trainable, optimizer, mesh
    )
    step_fn = make_train_step(
        make_loss_fn(stage, blueprint, teacher_blueprint),
        optimizer,
        state_lib.make_schedule(stage.optimizer, 1000),
        mesh=mesh,
        like=state,
    )
    return step_fn, state, frozen, teacher


def time_steps(
    step_fn: TrainStep,
    state: state_lib.TrainState,
    frozen: state_lib.Weights,
    teacher: state_lib.Weights | None,
    batches: Sequence[dict[str, jax.Array]],
    steps: int,
) -> tuple[float, float, float]:
    """Returns the median step's seconds, seconds to compile, and planned bytes.

    A step's metrics are read after the next one is under way, as the training loop does.
    """
    start = time.perf_counter()
    compiled = step_fn.lower(state, frozen, teacher, batches[0]).compile()
    compile_s = time.perf_counter() - start
    memory = compiled.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    done, waiting = [], None
    for i in range(steps + 3):
        state, metrics = compiled(state, frozen, teacher, batches[i % len(batches)])
        if waiting is not None:
            loss = float(waiting)
            done.append(time.perf_counter())
            if not np.isfinite(loss):
                raise UserError(
                    f"the loss is {loss} at step {i - 1}; nothing is recorded"
                )
        waiting = metrics["loss"]
    jax.block_until_ready(state)
    return float(statistics.median(np.diff(done[1:]))), compile_s, peak


def random_batch(
    mesh: jax.sharding.Mesh,
    stage: str,
    batch: int,
    length: int,
    vocab_size: int,
    seed: int,
) -> dict[str, jax.Array]:
    """Returns full rows of random tokens of which all but the first quarter count."""
    rng = np.random.default_rng(seed)
    placement = sharding.named_sharding(mesh, ("batch", "length"), (batch, length))
    result = {}
    for prefix in ("chosen_", "rejected_") if stage == "dpo" else ("",):
        tokens = rng.integers(0, vocab_size, (batch, length), np.int32)
        mask = np.broadcast_to(np.arange(length) >= length // 4, tokens.shape)
        arrays = {
            "tokens": tokens,
            "loss_mask": mask,
            "segment_ids": np.ones_like(tokens),
        }
        for name, value in arrays.items():
            result[prefix + name] = jax.device_put(value, placement)
    return result


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    run_app(functools.partial(main, flags.FLAGS))
