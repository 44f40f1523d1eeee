"""Checks of losses, steps and schedules: values by hand or from NumPy in float64.

Each looks the tested function up when it runs, so that a patched one is tested.
"""

import dataclasses

import jax
import numpy as np
import optax

from mil_jax import losses
from mil_jax.config import OptimizerConfig, StageConfig
from mil_jax.train import state as state_lib
from mil_jax.train import step as step_lib
from mil_jax.train.state import TrainState

from .compare import assert_close, assert_trees_close

VOCAB, WIDTH, LENGTH = 11, 5, 13


@dataclasses.dataclass(frozen=True)
class Bigram:
    """The least that a loss needs of a model: it looks at one token."""

    weights: dict

    def hidden(self, tokens, segment_ids=None):
        return self.weights["embed"][tokens]

    def logits(self, hidden):
        return hidden @ self.weights["head"]


class BigramBlueprint:
    model = staticmethod(Bigram)
    cast_kernels = staticmethod(dict)


def bigram_weights(seed):
    rng = np.random.default_rng(seed)
    return {
        "embed": rng.standard_normal((VOCAB, WIDTH)).astype(np.float32),
        "head": rng.standard_normal((WIDTH, VOCAB)).astype(np.float32),
    }


def uneven_batch(rows=8, seed=3, prefix=""):
    """Row r answers with 1 + r tokens in its first document; padding at the end."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((rows, LENGTH), bool)
    segments = np.ones((rows, LENGTH), np.int32)
    segments[:, 9:11], segments[:, 11:] = 2, 0
    for row in range(rows):
        mask[row, 8 - row : 9] = row > 0
        mask[row, 10] = row % 3 == 0
    arrays = {
        "tokens": rng.integers(0, VOCAB, (rows, LENGTH)).astype(np.int32),
        "loss_mask": mask,
        "segment_ids": segments,
    }
    return {prefix + name: value for name, value in arrays.items()}


def preference_batch(rows=8):
    chosen = uneven_batch(rows, seed=4, prefix="chosen_")
    return chosen | uneven_batch(rows, seed=5, prefix="rejected_")


def log_probs(weights, tokens):
    """Returns log-probabilities [B, L, V] after each token, in float64."""
    weights = {name: np.asarray(w, np.float64) for name, w in weights.items()}
    logits = weights["embed"][tokens] @ weights["head"]
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def predicted(batch):
    """Yields (row, position, token to predict) of every answer token, by loops."""
    tokens, mask = batch["tokens"], batch["loss_mask"]
    segments = batch["segment_ids"]
    for row in range(tokens.shape[0]):
        for t in range(1, tokens.shape[1]):
            if mask[row, t] and segments[row, t] == segments[row, t - 1] > 0:
                yield row, t - 1, tokens[row, t]


def check_targets():
    """Two documents and padding in one row; a full row; a masked first token."""
    batch = {
        "tokens": np.array([[10, 11, 12, 20, 21, 22, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8]]),
        "segment_ids": np.array([[1, 1, 1, 2, 2, 2, 0, 0], [1] * 8]),
        "loss_mask": np.array(
            [[0, 1, 1, 1, 0, 1, 0, 0], [1, 0, 0, 1, 1, 0, 0, 1]], bool
        ),
    }
    batch = {name: jax.numpy.asarray(value) for name, value in batch.items()}
    labels, mask = step_lib.next_token_targets(batch)
    # 20 opens a document, so no token predicts it though it is marked; nor is the first.
    expected = [[1, 1, 0, 0, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0, 1, 0]]
    np.testing.assert_array_equal(np.asarray(mask, int), expected)
    np.testing.assert_array_equal(
        np.asarray(labels)[np.asarray(mask)], [11, 12, 22, 4, 5, 8]
    )
    _, mask = step_lib.next_token_targets(batch, "all")
    expected = [[1, 1, 0, 1, 1, 0, 0, 0], [1] * 7 + [0]]
    np.testing.assert_array_equal(np.asarray(mask, int), expected)


def check_token_kl():
    """KL[(1/2, 1/2) || (1/4, 3/4)] = ln(4/3) / 2; the other way round it is 0.1308."""
    p, q = np.log(np.float32([[0.5, 0.5]])), np.log(np.float32([[0.25, 0.75]]))
    assert_close(losses.token_kl(p + 2, q - 7), [0.14384104], atol=1e-6)


def check_distill_loss(reduction="token_mean"):
    """Eq. 2 on a packed batch, with the KL from the teacher to the student."""
    stage = StageConfig(
        name="distill",
        ce_weight=0.7,
        kl_weight=0.3,
        kl_reduction=reduction,
        loss_chunk=4,
        packed=True,
    )
    student, teacher, batch = bigram_weights(1), bigram_weights(2), uneven_batch()
    log_q = log_probs(student, batch["tokens"])
    log_p = log_probs(teacher, batch["tokens"])
    kl = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
    found = list(predicted(batch))
    ce = np.mean([-log_q[row, t, y] for row, t, y in found])
    if reduction == "original":
        divergence = kl.sum() / len(kl)
    else:
        divergence = np.mean([kl[row, t] for row, t, _ in found])
    loss_fn = step_lib.make_loss_fn(stage, BigramBlueprint(), BigramBlueprint())
    counts = step_lib._whole_counts(batch, "answers")
    loss, metrics = jax.jit(loss_fn)(student, teacher, batch, counts)
    assert_close(metrics["ce"], ce, atol=1e-5)
    assert_close(metrics["kl"], divergence, atol=1e-4)
    assert_close(loss, 0.7 * ce + 0.3 * divergence, atol=1e-4)


def check_dpo_numbers():
    """Two pairs worked by hand with beta = 0.5.

    Rewards 0.5 * (-1 - -2) = 0.5 and 0.5 * (-4 - -3) = -0.5: margin 1; and 0.5 * (-5 - -4)
    = -0.5 and 0.5 * (-2 - -3) = 0.5: margin -1. Losses ln(1 + e^-1) and ln(1 + e).
    """
    policy_chosen, policy_rejected = np.float32([-1, -5]), np.float32([-4, -2])
    reference_chosen, reference_rejected = np.float32([-2, -4]), np.float32([-3, -3])
    loss, metrics = losses.dpo_loss(
        policy_chosen[:1],
        policy_rejected[:1],
        reference_chosen[:1],
        reference_rejected[:1],
        beta=0.5,
    )
    assert_close(loss, 0.3132616875, atol=1e-6)
    loss, metrics = losses.dpo_loss(
        policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=0.5
    )
    assert_close(loss, (0.3132616875 + 1.3132616875) / 2, atol=1e-6)
    assert float(metrics["accuracy"]) == 0.5
    assert abs(float(metrics["margin"])) < 1e-6
    assert abs(float(metrics["reward_chosen"])) < 1e-6


def check_dpo_step():
    """The stage's loss against sums of log-probabilities by loops."""
    stage = StageConfig(name="dpo", dpo_beta=0.2, loss_chunk=4)
    policy, reference, batch = bigram_weights(1), bigram_weights(2), preference_batch()
    margins = np.zeros(8)
    for sign, side in ((1, "chosen_"), (-1, "rejected_")):
        one = {name.removeprefix(side): v for name, v in batch.items() if side in name}
        for row, t, y in predicted(one):
            for ratio, weights in ((1, policy), (-1, reference)):
                value = log_probs(weights, one["tokens"])[row, t, y]
                margins[row] += sign * ratio * 0.2 * value
    loss_fn = step_lib.make_loss_fn(stage, BigramBlueprint(), BigramBlueprint())
    counts = step_lib._whole_counts(batch, "answers")
    loss, metrics = jax.jit(loss_fn)(policy, reference, batch, counts)
    assert_close(loss, np.mean(np.log1p(np.exp(-margins))), atol=1e-4)
    assert float(metrics["accuracy"]) == np.mean(margins > 0)
    assert_close(metrics["margin"], margins.mean(), atol=1e-4)


def one_step(stage, accumulate, batch):
    """Returns the gradient step of plain descent and the metrics."""
    optimizer = optax.sgd(1.0)
    trainable = jax.tree.map(jax.numpy.asarray, bigram_weights(1))
    state = TrainState(jax.numpy.int32(0), trainable, optimizer.init(trainable))
    needs_teacher = stage.name == "dpo" or stage.kl_weight
    train_step = step_lib.make_train_step(
        step_lib.make_loss_fn(
            stage, BigramBlueprint(), BigramBlueprint() if needs_teacher else None
        ),
        optimizer,
        lambda step: 1.0,
        loss_on=stage.loss_on,
        accumulate=accumulate,
    )
    state, metrics = train_step(
        state, {}, bigram_weights(2) if needs_teacher else None, batch
    )
    start = bigram_weights(1)
    return {n: start[n] - np.asarray(w) for n, w in state.trainable.items()}, metrics


def check_accumulation(**stage):
    """Micro-batches with unequal numbers of answer tokens make the whole batch's step."""
    stage = StageConfig(**({"name": "distill", "kl_weight": 0.5} | stage))
    batch = preference_batch() if stage.name == "dpo" else uneven_batch()
    whole, metrics = one_step(stage, 1, batch)
    for accumulate in (2, 4):
        parts, part_metrics = one_step(stage, accumulate, batch)
        assert_trees_close(parts, whole, rtol=1e-5)
        assert set(part_metrics) == set(metrics)
        for name, value in metrics.items():
            np.testing.assert_allclose(
                part_metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name
            )


def check_schedule():
    """Four warm-up steps of twelve: the first has a quarter of the peak."""
    config = OptimizerConfig(lr=8.0, warmup_steps=4, end_fraction=0.1)
    schedule = state_lib.make_schedule(config, 12)
    # Half a cosine from 8 to 0.8 over the eight steps that are left.
    expected = [2, 4, 6, 8] + [
        0.8 + 7.2 * (1 + np.cos(np.pi * i / 8)) / 2 for i in range(9)
    ]
    assert_close([float(schedule(i)) for i in range(13)], expected, atol=1e-5)


def check_only_trained(before, state, frozen, is_trained):
    """Weights outside `is_trained` keep every bit, those inside have all moved."""
    after = {
        name: np.asarray(value) for name, value in (frozen | state.trainable).items()
    }
    assert set(after) == set(before)
    for name, value in before.items():
        if is_trained(name):
            assert (after[name] != value).any(), f"{name} did not move"
            assert np.isfinite(after[name]).all(), f"{name} is not finite"
        else:
            np.testing.assert_array_equal(after[name], value, err_msg=name)
