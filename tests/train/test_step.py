"""Unit tests of targets, losses of stages, accumulation and what a step may change."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import tiny, training
from checks.compare import assert_close

from mil_jax.config import ComputeConfig, OptimizerConfig, StageConfig
from mil_jax.models.decoder import Blueprint
from mil_jax.train import state as state_lib
from mil_jax.train.step import join_pairs, make_loss_fn, make_train_step

from .conftest import mesh_of


class TestTargets:
    def test_packed_rows(self):
        training.check_targets()

    def test_agrees_with_loops(self, strict_jax):
        batch = training.uneven_batch()
        targets = training.step_lib.next_token_targets(batch)
        labels, mask = map(np.asarray, targets)
        found = [(row, t, labels[row, t]) for row, t in np.argwhere(mask)]
        assert found == list(training.predicted(batch))

    def test_pairs_are_joined_chosen_first(self):
        batch = training.preference_batch(2)
        joined = join_pairs(batch)
        assert set(joined) == {"tokens", "loss_mask", "segment_ids"}
        for name, value in joined.items():
            np.testing.assert_array_equal(value[:2], batch[f"chosen_{name}"])
            np.testing.assert_array_equal(value[2:], batch[f"rejected_{name}"])


class TestLosses:
    @pytest.mark.parametrize("reduction", ["token_mean", "original"])
    def test_distillation(self, strict_jax, reduction):
        training.check_distill_loss(reduction)

    def test_preferences(self, strict_jax):
        training.check_dpo_step()

    def test_without_kl_no_teacher_is_asked(self):
        stage = StageConfig(name="sft", packed=True)
        _, metrics = training.one_step(stage, 1, training.uneven_batch())
        assert set(metrics) == {"loss", "ce", "grad_norm", "lr"}

    def test_all_tokens(self):
        """loss_on="all" counts questions too, but neither padding nor borders."""
        weights, batch = training.bigram_weights(1), training.uneven_batch()
        log_q = training.log_probs(weights, batch["tokens"])
        everything = batch | {"loss_mask": np.ones_like(batch["loss_mask"])}
        found = list(training.predicted(everything))
        assert len(found) == 8 * (8 + 1)
        expected = np.mean([-log_q[row, t, y] for row, t, y in found])
        stage = StageConfig(name="pretrain", loss_on="all", packed=True)
        _, metrics = training.one_step(stage, 2, batch)
        assert_close(metrics["ce"], expected, atol=1e-5)


class TestAccumulation:
    @pytest.mark.parametrize(
        "stage",
        [
            {"kl_reduction": "token_mean"},
            {"kl_reduction": "original"},
            {"kl_weight": 0.0, "loss_on": "all"},
            {"name": "dpo"},
        ],
        ids=lambda stage: "-".join(map(str, stage.values())),
    )
    def test_equals_the_whole_batch(self, stage):
        training.check_accumulation(**stage)

    def test_a_micro_batch_without_answers(self):
        """Counts are the whole batch's, so an empty part weighs nothing."""
        batch = training.uneven_batch()
        batch["loss_mask"][::2] = False
        stage = StageConfig(name="sft")
        whole, metrics = training.one_step(stage, 1, batch)
        parts, part_metrics = training.one_step(stage, 2, batch)
        np.testing.assert_allclose(parts["head"], whole["head"], rtol=1e-5, atol=1e-7)
        assert float(part_metrics["loss"]) == pytest.approx(float(metrics["loss"]))


# One scanned block with every kind of weight, and unrolled layers of different kinds.
STACKED = dataclasses.replace(tiny.CONFIGS["mamba"], layer_types=("mamba",) * 2)


def _setup(config, trainable, *, optimizer=None, seed=0, **stage):
    """Returns what a step takes; the teacher is an attention model."""
    mesh = mesh_of(1, 1, 1)
    stage = StageConfig(
        **({"name": "distill", "kl_weight": 0.1, "packed": True} | stage),
        trainable=trainable,
        batch_size=4,
        loss_chunk=5,
    )
    params = tiny.random_params(config, seed)
    blueprint = Blueprint.create(config, ComputeConfig())
    teacher = Blueprint.create(tiny.ATTENTION, ComputeConfig())
    optimizer = optimizer or state_lib.make_optimizer(OptimizerConfig(lr=1e-3), 10)
    state, frozen = state_lib.create(blueprint, params, trainable, optimizer, mesh)
    train_step = make_train_step(
        make_loss_fn(stage, blueprint, teacher),
        optimizer,
        lambda step: 1e-3,
        accumulate=stage.accumulate,
        mesh=mesh,
    )
    teacher_weights = teacher.place(tiny.params("attention"), mesh)
    batch = training.uneven_batch(4)
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    before = {
        name: np.array(value) for name, value in (frozen | state.trainable).items()
    }
    return train_step, (state, frozen, teacher_weights, batch), before


IS_TRAINED = {
    "mamba": lambda name: "mamba" in name,
    "not_mlp": lambda name: "mlp" not in name or "mlp_norm" in name,
    "all": lambda name: True,
}


def check_frozen(trainable, config=tiny.CONFIGS["mamba"], **stage):
    """Two steps, so that what starts at zero has moved as well."""
    train_step, (state, frozen, *rest), before = _setup(config, trainable, **stage)
    for _ in range(2):
        state, _ = train_step(state, frozen, *rest)
    training.check_only_trained(before, state, frozen, IS_TRAINED[trainable])


class TestTrainable:
    @pytest.mark.parametrize("trainable", ["mamba", "not_mlp", "all"])
    def test_frozen_keep_their_bits_and_the_rest_moves(self, trainable):
        # One of them with a teacher; without one it compiles faster.
        check_frozen(trainable, kl_weight=0.1 if trainable == "mamba" else 0.0)

    def test_mamba2_stacked(self):
        """The kind is read from the name; one scanned entry stands for two layers."""
        config = dataclasses.replace(
            tiny.CONFIGS["mamba2"], layer_types=("mamba2", "mamba2")
        )
        check_frozen("mamba", config, kl_weight=0.0)

    def test_dtypes(self):
        """Trained weights are float32 masters, frozen ones are stored narrow."""
        config = tiny.CONFIGS["mamba"]
        blueprint = Blueprint.create(config, ComputeConfig(param_dtype="bfloat16"))
        mesh = mesh_of(1, 1, 1)
        state, frozen = state_lib.create(
            blueprint, tiny.params("mamba"), "mamba", optax.sgd(1.0), mesh
        )
        assert {w.dtype.name for w in state.trainable.values()} == {"float32"}
        assert {w.dtype.name for w in frozen.values()} == {"bfloat16"}
        assert all(".mamba." in name for name in state.trainable)
        assert not any(".mamba." in name for name in frozen)

    def test_the_callers_arrays_survive_the_donation(self):
        """The step gives its state's buffers away; the params it came from are shared."""
        config = dataclasses.replace(tiny.ATTENTION, layer_types=("attention",))
        params = {
            name: jnp.asarray(value)
            for name, value in tiny.random_params(config).items()
        }
        blueprint = Blueprint.create(config, ComputeConfig())
        mesh = mesh_of(1, 1, 1)
        state, _ = state_lib.create(blueprint, params, "all", optax.sgd(1.0), mesh)
        jax.jit(lambda s: jax.tree.map(lambda a: a + 1, s), donate_argnums=0)(state)
        assert not any(value.is_deleted() for value in params.values())


class TestHybridStep:
    def test_accumulated_step_of_a_hybrid(self):
        """Scanned Mamba layers, packed documents, KL and micro-batches at once."""
        results = []
        for accumulate in (1, 2):
            train_step, args, before = _setup(
                STACKED, "mamba", optimizer=optax.sgd(1.0), accumulate=accumulate
            )
            state, metrics = train_step(*args)
            assert int(state.step) == 1
            moved = {
                name: before[name] - np.asarray(value)
                for name, value in state.trainable.items()
            }
            results.append((moved, metrics))
        training.assert_trees_close(results[1][0], results[0][0], rtol=1e-4)
        for name, value in results[0][1].items():
            np.testing.assert_allclose(results[1][1][name], value, rtol=1e-5)

    def test_packing_does_not_change_the_loss(self):
        """Two documents in one row have the loss they have in rows of their own."""
        packed = training.uneven_batch(4)
        packed = {name: value[:, :11] for name, value in packed.items()}
        alone = {
            name: np.concatenate([value[:, :9], np.pad(value[:, 9:], ((0, 0), (0, 7)))])
            for name, value in packed.items()
        }
        alone["segment_ids"] = (alone["segment_ids"] > 0).astype(np.int32)
        results = []
        for batch, is_packed in ((packed, True), (alone, False)):
            stage = StageConfig(name="distill", kl_weight=0.5, packed=is_packed)
            student = Blueprint.create(tiny.CONFIGS["mamba"], ComputeConfig())
            teacher = Blueprint.create(tiny.ATTENTION, ComputeConfig())
            loss_fn = make_loss_fn(stage, student, teacher)
            counts = training.step_lib._whole_counts(batch, "answers")
            loss, metrics = jax.jit(loss_fn)(
                student.place(tiny.params("mamba")),
                teacher.place(tiny.params("attention")),
                batch,
                counts,
            )
            results.append([float(loss), float(metrics["ce"]), float(metrics["kl"])])
        assert_close(results[0], results[1], atol=1e-4)
