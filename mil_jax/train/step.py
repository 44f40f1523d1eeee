"""The training step: the only place where training is jitted."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from mil_jax import losses, sharding
from mil_jax.config import ComputeConfig, StageConfig
from mil_jax.models.decoder import Blueprint, HybridLM
from mil_jax.train.state import TrainState, Weights

Batch = Mapping[str, jax.Array]
Metrics = losses.Metrics

# (weights, teacher's weights, batch, the whole batch's counts) -> (loss, metrics)
LossFn = Callable[
    [Weights, Weights | None, Batch, losses.Counts], tuple[jax.Array, Metrics]
]
TrainStep = Callable[
    [TrainState, Weights, Weights | None, Batch], tuple[TrainState, Metrics]
]


def reference_compute(compute: ComputeConfig, mesh: Mesh) -> ComputeConfig:
    """Returns how a teacher runs beside a student that runs as `compute` says.

    It is only read, so on one device its projections of one input lie side by side.
    """
    layout = "decode" if mesh.size == 1 else compute.layout
    return dataclasses.replace(compute, remat=False, layout=layout)


def make_loss_fn(
    stage: StageConfig, student: Blueprint, teacher: Blueprint | None
) -> LossFn:
    """Returns the stage's loss: preferences for dpo, Eq. 2 for all others.

    Args:
        stage: Coefficients and options.
        student: The trained model.
        teacher: The model of the KL term, or DPO's reference; None without either.
    """

    def lm_loss(
        weights: Weights,
        teacher_weights: Weights | None,
        batch: Batch,
        counts: losses.Counts,
    ) -> tuple[jax.Array, Metrics]:
        labels, mask = next_token_targets(batch, stage.loss_on)
        segments = batch["segment_ids"] if stage.packed else None
        model = student.model(student.cast_kernels(weights))
        hidden = model.hidden(batch["tokens"], segments)
        if not stage.kl_weight:
            per_token = losses.nll_of_slice(model.logits)
            arrays = (hidden, labels)
        else:
            other = teacher.model(teacher_weights)
            other_hidden = jax.lax.stop_gradient(
                other.hidden(batch["tokens"], segments)
            )
            per_token = losses.nll_and_kl_of_slice(model.logits, other.logits)
            arrays = (hidden, other_hidden, labels)

        def reduce(
            nll: jax.Array, kl: jax.Array | None = None
        ) -> tuple[jax.Array, Metrics]:
            return losses.distill_loss(
                nll,
                kl,
                mask,
                ce_weight=stage.ce_weight,
                kl_weight=stage.kl_weight,
                kl_reduction=stage.kl_reduction,
                counts=counts,
            )

        return losses.reduce_over_chunks(
            per_token, reduce, arrays, chunk=stage.loss_chunk
        )

    def preference_loss(
        weights: Weights,
        reference_weights: Weights | None,
        batch: Batch,
        counts: losses.Counts,
    ) -> tuple[jax.Array, Metrics]:
        both = join_pairs(batch)
        model = student.model(student.cast_kernels(weights))
        policy = answer_log_probs(model, both, stage.loss_chunk)
        reference = jax.lax.stop_gradient(
            answer_log_probs(teacher.model(reference_weights), both, stage.loss_chunk)
        )
        return losses.dpo_loss(
            *jnp.split(policy, 2),
            *jnp.split(reference, 2),
            beta=stage.dpo_beta,
            rows=counts.rows,
        )

    return preference_loss if stage.name == "dpo" else lm_loss


def next_token_targets(
    batch: Batch, loss_on: str = "answers"
) -> tuple[Int[Array, "B L"], Bool[Array, "B L"]]:
    """Returns, for each position, the token that follows and whether it counts.

    The last position of a row and of a document predicts nothing.
    """
    segments = batch["segment_ids"]
    labels = jnp.roll(batch["tokens"], -1, axis=1)
    wanted = batch["loss_mask"] if loss_on == "answers" else segments > 0
    mask = jnp.roll(wanted, -1, axis=1) & (jnp.roll(segments, -1, axis=1) == segments)
    return labels, mask.at[:, -1].set(False) & (segments > 0)


def join_pairs(batch: Batch) -> dict[str, jax.Array]:
    """Returns chosen and rejected rows as one batch, the chosen first."""
    names = ("tokens", "loss_mask", "segment_ids")
    return {
        name: jnp.concatenate([batch[f"chosen_{name}"], batch[f"rejected_{name}"]])
        for name in names
    }


def answer_log_probs(model: HybridLM, batch: Batch, chunk: int) -> Float[Array, "B"]:
    """Returns the sum of each answer's token log-probabilities, in nats."""
    labels, mask = next_token_targets(batch)
    hidden = model.hidden(batch["tokens"])
    nll = losses.token_nll(model.logits, hidden, labels, chunk=chunk)
    return -jnp.sum(jnp.where(mask, nll, 0.0), axis=1)


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    loss_on: str = "answers",
    accumulate: int = 1,
    mesh: Mesh | None = None,
    like: TrainState | None = None,
) -> TrainStep:
    """Returns the jitted step; its state argument is donated.

    Args:
        loss_fn: From `make_loss_fn`.
        optimizer: Updates the trainable weights.
        schedule: Logged beside the loss.
        loss_on: As in the stage.
        accumulate: Micro-batches; the gradients are those of the whole batch.
        mesh: Devices over which activations are split.
        like: A state whose placement every new state keeps; None leaves it to the compiler.
    """

    def gradients(
        state: TrainState, frozen: Weights, teacher: Weights | None, batch: Batch
    ) -> tuple[Weights, Metrics]:
        counts = _whole_counts(batch, loss_on)

        def loss_of(trainable: Weights, micro: Batch) -> tuple[jax.Array, Metrics]:
            return loss_fn(frozen | trainable, teacher, micro, counts)

        grad_fn = jax.grad(loss_of, has_aux=True)
        if accumulate == 1:
            return grad_fn(state.trainable, batch)
        micros = {name: _split(value, accumulate) for name, value in batch.items()}

        def add(total: tuple, micro: Batch) -> tuple[tuple, None]:
            part = grad_fn(state.trainable, micro)
            return jax.tree.map(jnp.add, total, part), None

        first = {name: value[0] for name, value in micros.items()}
        zeros = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype),
            jax.eval_shape(grad_fn, state.trainable, first),
        )
        return jax.lax.scan(add, zeros, micros)[0]

    kept = {}
    if jax.default_backend() == "gpu":
        kept["compiler_options"] = {
            # Merging products of one input costs copies of their weights and results.
            "xla_gpu_dot_merger_threshold_mb": 0,
            # 0.5% of a Llama-3-8B step on an H200.
            "xla_gpu_enable_cublaslt": True,
        }
    if like is not None:
        kept["out_shardings"] = (jax.tree.map(lambda leaf: leaf.sharding, like), None)

    @functools.partial(jax.jit, donate_argnums=(0,), **kept)
    def train_step(
        state: TrainState, frozen: Weights, teacher: Weights | None, batch: Batch
    ) -> tuple[TrainState, Metrics]:
        with sharding.mesh_context(mesh):
            grads, metrics = gradients(state, frozen, teacher, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics |= {
            "grad_norm": optax.tree.norm(grads),
            "lr": jnp.asarray(schedule(state.step), jnp.float32),
        }
        return TrainState(state.step + 1, trainable, opt_state), metrics

    return train_step


def _whole_counts(batch: Batch, loss_on: str) -> losses.Counts:
    if "chosen_tokens" in batch:
        return losses.count(batch["chosen_loss_mask"])
    return losses.count(next_token_targets(batch, loss_on)[1])


def _split(value: jax.Array, parts: int) -> jax.Array:
    """Returns [A, B/A, ...]; a micro-batch takes every A-th row.

    So each device's rows stay on it when the batch axis is split over devices.
    """
    split = value.reshape(value.shape[0] // parts, parts, *value.shape[1:])
    return jnp.swapaxes(split, 0, 1)
