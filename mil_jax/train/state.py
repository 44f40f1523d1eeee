"""What a training step changes, and which weights it may change."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from mil_jax.array_types import Params
from mil_jax.config import OptimizerConfig
from mil_jax.models.decoder import Blueprint

Weights = dict[str, jax.Array]

TRAINABLE: dict[str, Callable[[str], bool]] = {
    "mamba": lambda name: ".mamba." in name or ".mamba2." in name,
    "not_mlp": lambda name: ".mlp." not in name,
    "all": lambda name: True,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Changes with every step.

    Attributes:
        step: Steps done.
        trainable: Float32 master weights that the stage trains.
        opt_state: Of the optimizer, for those weights.
    """

    step: Int[Array, ""]
    trainable: Weights
    opt_state: optax.OptState


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Returns the learning rate by step: linear warm-up, then the named decay."""
    share = round(config.warmup_fraction * num_steps)
    warmup = min(max(config.warmup_steps, share), num_steps)
    rest, end = max(num_steps - warmup, 1), config.lr * config.end_fraction
    decay = {
        "cosine": lambda: optax.cosine_decay_schedule(
            config.lr, rest, config.end_fraction
        ),
        "linear": lambda: optax.linear_schedule(config.lr, end, rest),
        "constant": lambda: optax.constant_schedule(config.lr),
    }[config.schedule]()
    if not warmup:
        return decay
    # The first step already moves: it has 1 / warmup of the peak, the last has all.
    ramp = optax.linear_schedule(config.lr / warmup, config.lr, warmup - 1)
    return optax.join_schedules([ramp, decay], [warmup])


def make_optimizer(
    config: OptimizerConfig, num_steps: int
) -> optax.GradientTransformation:
    """Returns AdamW with clipping by the global norm."""
    adamw = optax.adamw(
        make_schedule(config, num_steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    if not config.clip_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def create(
    blueprint: Blueprint,
    params: Params,
    trainable: str,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> tuple[TrainState, Weights]:
    """Returns a state at step 0 and the weights that stay as they are.

    Trained weights are float32 whatever the model's dtype, the others are kept in
    `param_dtype`.
    """
    is_trainable = TRAINABLE[trainable]

    def dtype_of(name: str) -> jnp.dtype:
        if is_trainable(name):
            return jnp.dtype(jnp.float32)
        return blueprint.storage_dtype(name)

    weights = blueprint.place(params, mesh, dtype_of=dtype_of)
    frozen = {n: w for n, w in weights.items() if not is_trainable(n)}
    # The step donates these buffers, which must not be shared with the caller's.
    trained = {n: w.copy() for n, w in weights.items() if is_trainable(n)}
    replicated = NamedSharding(mesh, PartitionSpec())
    # Moments lie as their weights do: left to the compiler they would all be made on one
    # device.
    placements = jax.tree.map(
        lambda _: replicated, jax.eval_shape(optimizer.init, trained)
    )
    placements = _map_weights(
        placements, trained, lambda _: {n: w.sharding for n, w in trained.items()}
    )
    opt_state = jax.jit(optimizer.init, out_shardings=placements)(trained)
    step = jax.device_put(jnp.int32(0), replicated)
    return TrainState(step, trained, opt_state), frozen


def to_disk(blueprint: Blueprint, state: TrainState) -> TrainState:
    """Returns the state with one entry per layer, as it is written to disk."""
    return _map_weights(state, state.trainable, blueprint.unstack)


def from_disk(
    blueprint: Blueprint, on_disk: TrainState, like: TrainState
) -> TrainState:
    """Inverse of `to_disk`; arrays are placed as those of `like`."""
    state = _map_weights(on_disk, on_disk.trainable, blueprint.stack)
    return jax.tree.map(lambda a, b: jax.device_put(a, b.sharding), state, like)


def _map_weights(
    tree: Any, names: Mapping[str, Any], fn: Callable[[Weights], Weights]
) -> Any:
    """Applies `fn` to every dict in `tree` that has one entry per trained weight."""

    def is_weights(node: Any) -> bool:
        return isinstance(node, dict) and node.keys() == names.keys()

    return jax.tree.map(
        lambda node: fn(node) if is_weights(node) else node, tree, is_leaf=is_weights
    )
