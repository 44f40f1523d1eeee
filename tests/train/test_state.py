"""Unit tests of schedules, the optimizer and the way of a state to disk and back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import tiny, training
from checks.compare import assert_close

from mil_jax.checkpoint.orbax_io import RunCheckpoints
from mil_jax.config import ComputeConfig, OptimizerConfig
from mil_jax.models.decoder import Blueprint
from mil_jax.train import state as state_lib
from mil_jax.train.step import make_loss_fn, make_train_step

from .conftest import mesh_of


def _values(num_steps, count, **config):
    schedule = state_lib.make_schedule(OptimizerConfig(**config), num_steps)
    return [float(schedule(i)) for i in range(count)]


class TestSchedule:
    def test_warm_up_and_cosine(self):
        training.check_schedule()

    def test_without_warm_up_the_first_step_has_the_peak(self):
        assert _values(4, 5, lr=2.0) == pytest.approx([2, 1.7071068, 1, 0.2928932, 0])

    def test_linear(self):
        found = _values(
            6, 8, lr=1.0, schedule="linear", warmup_steps=2, end_fraction=0.2
        )
        assert found == pytest.approx([0.5, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2])

    def test_constant(self):
        found = _values(5, 7, lr=1.0, schedule="constant", warmup_steps=2)
        assert found == pytest.approx([0.5, 1, 1, 1, 1, 1, 1])

    def test_one_step_of_warm_up_is_none(self):
        assert _values(3, 2, lr=1.0, schedule="constant", warmup_steps=1) == [1, 1]

    def test_the_larger_of_steps_and_share_counts(self):
        kwargs = {"lr": 1.0, "schedule": "constant"}
        found = _values(40, 5, warmup_fraction=0.1, warmup_steps=2, **kwargs)
        assert found == pytest.approx([0.25, 0.5, 0.75, 1, 1])
        found = _values(40, 5, warmup_fraction=0.05, warmup_steps=4, **kwargs)
        assert found == pytest.approx([0.25, 0.5, 0.75, 1, 1])

    def test_a_run_shorter_than_its_warm_up_reaches_the_peak(self):
        found = _values(2, 3, lr=1.0, warmup_steps=500)
        assert found[:2] == pytest.approx([0.5, 1])
        assert np.isfinite(found).all()


class TestOptimizer:
    CONFIG = OptimizerConfig(
        lr=0.1,
        schedule="linear",
        warmup_steps=2,
        b1=0.8,
        b2=0.95,
        eps=1e-3,
        weight_decay=0.3,
        clip_norm=2.0,
    )
    START = np.array([1.0, -2.0, 3.0])
    # Norms 3 and 0.3: the first is clipped to 2, the second is not.
    GRADS = (np.array([2.0, 1.0, 2.0]), np.array([-0.1, 0.2, 0.2]), np.zeros(3))

    def _by_hand(self, config):
        """AdamW in float64 from its formulas."""
        w, m, v = self.START.copy(), np.zeros(3), np.zeros(3)
        rates = [0.05, 0.1, 0.1]
        for i, (g, rate) in enumerate(zip(self.GRADS, rates, strict=True), 1):
            norm = np.linalg.norm(g)
            if config.clip_norm and norm > config.clip_norm:
                g = g * config.clip_norm / norm
            m = config.b1 * m + (1 - config.b1) * g
            v = config.b2 * v + (1 - config.b2) * g**2
            m_hat, v_hat = m / (1 - config.b1**i), v / (1 - config.b2**i)
            step = m_hat / (np.sqrt(v_hat) + config.eps) + config.weight_decay * w
            w = w - rate * step
        return w

    def _by_optax(self, config):
        optimizer = state_lib.make_optimizer(config, 5)
        w = {"w": jnp.asarray(self.START, jnp.float32)}
        opt_state = optimizer.init(w)
        for g in self.GRADS:
            updates, opt_state = optimizer.update(
                {"w": jnp.asarray(g, jnp.float32)}, opt_state, w
            )
            w = optax.apply_updates(w, updates)
        return w["w"]

    @pytest.mark.parametrize("clip_norm", [2.0, 0.0])
    def test_against_the_formulas(self, clip_norm):
        config = dataclasses.replace(self.CONFIG, clip_norm=clip_norm)
        assert_close(self._by_optax(config), self._by_hand(config), atol=1e-5)

    def test_clipping_makes_a_difference(self):
        clipped, free = (
            self._by_hand(dataclasses.replace(self.CONFIG, clip_norm=norm))
            for norm in (2.0, 0.0)
        )
        assert np.abs(clipped - free).max() > 1e-3

    def test_the_logged_norm_is_that_before_clipping(self):
        stage = training.StageConfig(name="sft")
        moved, metrics = training.one_step(stage, 1, training.uneven_batch())
        norm = np.sqrt(
            sum((np.asarray(g, np.float64) ** 2).sum() for g in moved.values())
        )
        assert_close(metrics["grad_norm"], norm, atol=1e-4)


def test_the_logged_rate_is_that_of_the_step():
    """Of plain descent: every step is as long as the rate times the gradient's norm."""
    stage = training.StageConfig(name="sft")
    rates = [0.5, 0.25, 0.125]
    optimizer = optax.sgd(lambda step: 0.5 ** (step + 1.0))
    weights = {n: jnp.asarray(w) for n, w in training.bigram_weights(1).items()}
    state = state_lib.TrainState(jnp.int32(0), weights, optimizer.init(weights))
    loss_fn = make_loss_fn(stage, training.BigramBlueprint(), None)
    train_step = make_train_step(loss_fn, optimizer, lambda step: 0.5 ** (step + 1.0))
    for rate in rates:
        before = {n: np.asarray(w).copy() for n, w in state.trainable.items()}
        state, metrics = train_step(state, {}, None, training.uneven_batch())
        length = np.sqrt(
            sum(np.sum((before[n] - w) ** 2) for n, w in state.trainable.items())
        )
        assert float(metrics["lr"]) == rate
        assert_close(length, rate * float(metrics["grad_norm"]), atol=1e-5)


class TestPlacement:
    """On eight devices; the root conftest makes them."""

    @pytest.mark.parametrize("sizes", [(2, 4, 1), (1, 4, 2)])
    def test_moments_lie_as_their_weights_before_and_after_a_step(self, sizes):
        mesh = mesh_of(*sizes)
        config = tiny.CONFIGS["mamba"]
        blueprint = Blueprint.create(config, ComputeConfig())
        optimizer = state_lib.make_optimizer(OptimizerConfig(lr=1e-3), 10)
        state, frozen = state_lib.create(
            blueprint, tiny.params("mamba"), "all", optimizer, mesh
        )
        step_fn = make_train_step(
            make_loss_fn(training.StageConfig(name="sft"), blueprint, None),
            optimizer,
            state_lib.make_schedule(OptimizerConfig(lr=1e-3), 10),
            mesh=mesh,
            like=state,
        )
        self._check(state)
        rows = np.tile(tiny.tokens(1, 16), (8, 1))
        batch = {
            "tokens": rows,
            "loss_mask": np.ones_like(rows, bool),
            "segment_ids": np.ones_like(rows),
        }
        state, _ = step_fn(state, frozen, None, batch)
        self._check(state)

    def _check(self, state):
        moments = [
            node
            for node in jax.tree.leaves(
                state.opt_state, is_leaf=lambda node: isinstance(node, dict)
            )
            if isinstance(node, dict)
        ]
        assert len(moments) == 2
        assert any(not w.is_fully_replicated for w in state.trainable.values())
        for name, weight in state.trainable.items():
            for moment in moments:
                same = moment[name].sharding.is_equivalent_to(
                    weight.sharding, weight.ndim
                )
                assert same, name


class TestDisk:
    """States of eight devices; the root conftest makes them."""

    CONFIG = dataclasses.replace(tiny.CONFIGS["mamba"], layer_types=("mamba",) * 2)

    def _state(self, mesh, seed=0, scan_layers=True):
        compute = ComputeConfig(scan_layers=scan_layers)
        blueprint = Blueprint.create(self.CONFIG, compute)
        params = tiny.random_params(self.CONFIG, seed)
        optimizer = state_lib.make_optimizer(OptimizerConfig(lr=1e-3), 10)
        state, _ = state_lib.create(blueprint, params, "mamba", optimizer, mesh)
        # Moments and counts that are not zero, each different.
        leaves, tree = jax.tree.flatten(state)
        leaves = [
            jax.device_put((leaf + i).astype(leaf.dtype), leaf.sharding)
            for i, leaf in enumerate(leaves)
        ]
        return blueprint, jax.tree.unflatten(tree, leaves)

    def test_layers_are_separate_on_disk(self):
        blueprint, state = self._state(mesh_of(1, 8, 1))
        on_disk = state_lib.to_disk(blueprint, state)
        assert "layers.0::1.mamba.x_proj.kernel" in state.trainable
        names = {"layers.0.mamba.x_proj.kernel", "layers.1.mamba.x_proj.kernel"}
        assert names <= set(on_disk.trainable)
        moments = [
            node
            for node in jax.tree.leaves(
                on_disk.opt_state, is_leaf=lambda node: isinstance(node, dict)
            )
            if isinstance(node, dict)
        ]
        assert len(moments) == 2
        for moment in moments:
            assert set(moment) == set(on_disk.trainable)
            np.testing.assert_array_equal(
                moment["layers.1.mamba.x_proj.kernel"].shape, (32, 32)
            )

    @pytest.mark.parametrize("unscanned", [False, True])
    def test_restored_on_another_mesh(self, tmp_path, unscanned):
        """Saved on 2x4, read on 1x8, also by a run that does not scan its layers."""
        assert jax.device_count() == 8
        blueprint, state = self._state(mesh_of(2, 4, 1))
        checkpoints = RunCheckpoints(tmp_path)
        on_disk = state_lib.to_disk(blueprint, state)
        checkpoints.save(3, on_disk, {"step": 3})
        checkpoints.close()

        mesh = mesh_of(1, 8, 1)
        other, like = self._state(mesh, seed=1, scan_layers=not unscanned)
        abstract = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding),
            state_lib.to_disk(other, like),
        )
        checkpoints = RunCheckpoints(tmp_path)
        restored, position = checkpoints.restore(3, abstract)
        checkpoints.close()
        assert position == {"step": 3}
        found = state_lib.from_disk(other, restored, like)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(like), strict=True):
            assert a.sharding == b.sharding and a.dtype == b.dtype
        kernel = next(v for k, v in found.trainable.items() if "x_proj.kernel" in k)
        assert kernel.sharding.mesh.shape["fsdp"] == 8
        assert not kernel.sharding.is_fully_replicated
        again = state_lib.to_disk(other, found)
        assert jax.tree.structure(again) == jax.tree.structure(on_disk)
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(on_disk), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
