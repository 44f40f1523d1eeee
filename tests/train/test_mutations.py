"""Known slips of training, put in one at a time: the named check must fail on each."""

import dataclasses

import jax.numpy as jnp
import pytest
from checks import tiny, training

from mil_jax import losses
from mil_jax.train import loop, state, step

from .test_step import check_frozen
from .toy_run import check_killed_run


def kl_direction_swapped(patch):
    original = losses.token_kl
    patch.setattr(
        losses, "token_kl", lambda teacher, student: original(student, teacher)
    )


def kl_of_questions_too(patch):
    patch.setattr(
        losses,
        "word_kd_loss",
        lambda kl, mask, reduction, counts: jnp.sum(kl) / counts.tokens,
    )


def original_kl_without_padding(patch):
    patch.setattr(
        losses,
        "word_kd_loss",
        lambda kl, mask, reduction, counts: jnp.sum(kl * mask) / counts.rows,
    )


def mask_off_by_one(patch):
    """The loss counts where the answer's token is, not where it is predicted."""
    original = step.next_token_targets

    def targets(batch, loss_on="answers"):
        labels, _ = original(batch, loss_on)
        return labels, batch["loss_mask"]

    patch.setattr(step, "next_token_targets", targets)


def labels_are_the_inputs(patch):
    original = step.next_token_targets

    def targets(batch, loss_on="answers"):
        return batch["tokens"], original(batch, loss_on)[1]

    patch.setattr(step, "next_token_targets", targets)


def document_predicts_the_next_one(patch):
    original = step.next_token_targets

    def targets(batch, loss_on="answers"):
        one = batch | {"segment_ids": jnp.minimum(batch["segment_ids"], 1)}
        return original(one, loss_on)

    patch.setattr(step, "next_token_targets", targets)


def last_position_wraps_around(patch):
    original = step.next_token_targets

    def targets(batch, loss_on="answers"):
        labels, mask = original(batch, loss_on)
        return labels, mask.at[:, -1].set(batch["segment_ids"][:, -1] > 0)

    patch.setattr(step, "next_token_targets", targets)


def frozen_leaf_is_trained(patch):
    patch.setitem(
        state.TRAINABLE,
        "mamba",
        lambda name: ".mamba." in name or name.endswith("input_norm.scale"),
    )


def mixer_leaf_is_frozen(patch):
    patch.setitem(
        state.TRAINABLE,
        "mamba",
        lambda name: ".mamba." in name and not name.endswith("A_log"),
    )


def mean_of_micro_batches(patch):
    """Each micro-batch divides by its own tokens; then the mean of eight rows' parts."""
    original = losses.seq_kd_loss

    def per_micro_batch(nll, mask, counts):
        return original(nll, mask) * nll.shape[0] / 8

    patch.setattr(losses, "seq_kd_loss", per_micro_batch)


def sum_of_micro_batches(patch):
    original = losses.seq_kd_loss
    patch.setattr(losses, "seq_kd_loss", lambda nll, mask, counts: original(nll, mask))


def rows_of_the_micro_batch(patch):
    original = losses.dpo_loss

    def per_micro_batch(*args, beta, rows):
        return original(*args, beta=beta)

    patch.setattr(losses, "dpo_loss", per_micro_batch)


def preference_sign_swapped(patch):
    original = losses.dpo_loss

    def swapped(chosen, rejected, *args, **kwargs):
        return original(rejected, chosen, *args, **kwargs)

    patch.setattr(losses, "dpo_loss", swapped)


def reference_sign_swapped(patch):
    original = losses.dpo_loss

    def swapped(policy_c, policy_r, reference_c, reference_r, **kwargs):
        return original(policy_c, policy_r, reference_r, reference_c, **kwargs)

    patch.setattr(losses, "dpo_loss", swapped)


def pairs_interleaved(patch):
    """Chosen and rejected rows are split where they were not joined."""
    original = step.join_pairs

    def joined(batch):
        return {name: value[::-1] for name, value in original(batch).items()}

    patch.setattr(step, "join_pairs", joined)


def warm_up_off_by_one(patch):
    """The first step has rate zero."""
    original = state.make_schedule

    def late(config, num_steps):
        schedule = original(config, num_steps)

        def shifted(i):
            return schedule(i - 1) if i else 0.0

        return shifted

    patch.setattr(state, "make_schedule", late)


def cosine_over_the_warm_up_too(patch):
    original = state.make_schedule

    def whole(config, num_steps):
        return original(config, num_steps + config.warmup_steps)

    patch.setattr(state, "make_schedule", whole)


def moments_are_not_restored(patch):
    original = state.from_disk

    def restored(blueprint, on_disk, like):
        found = original(blueprint, on_disk, like)
        return dataclasses.replace(found, opt_state=like.opt_state)

    patch.setattr(loop.state_lib, "from_disk", restored)


def data_starts_over(patch):
    original = loop.Loop._batches
    patch.setattr(
        loop.Loop,
        "_batches",
        lambda self, start: list(original(self, 0))[: self.num_steps - start],
    )


def continues_one_step_late(patch):
    original = loop.Loop._resume

    def resume(self, checkpoints, state):
        state, start = original(self, checkpoints, state)
        return state, start + (start > 0)

    patch.setattr(loop.Loop, "_resume", resume)


def check_frozen_in_one_layer():
    config = dataclasses.replace(tiny.CONFIGS["mamba"], layer_types=("mamba",))
    check_frozen("mamba", config, kl_weight=0.0)


CASES = [
    (kl_direction_swapped, training.check_token_kl),
    (kl_direction_swapped, training.check_distill_loss),
    (kl_of_questions_too, training.check_distill_loss),
    (original_kl_without_padding, lambda: training.check_distill_loss("original")),
    (mask_off_by_one, training.check_targets),
    (mask_off_by_one, training.check_distill_loss),
    (mask_off_by_one, training.check_dpo_step),
    (labels_are_the_inputs, training.check_targets),
    (document_predicts_the_next_one, training.check_targets),
    (last_position_wraps_around, training.check_targets),
    (frozen_leaf_is_trained, check_frozen_in_one_layer),
    (mixer_leaf_is_frozen, check_frozen_in_one_layer),
    (mean_of_micro_batches, training.check_accumulation),
    (sum_of_micro_batches, training.check_accumulation),
    (rows_of_the_micro_batch, lambda: training.check_accumulation(name="dpo")),
    (preference_sign_swapped, training.check_dpo_numbers),
    (preference_sign_swapped, training.check_dpo_step),
    (reference_sign_swapped, training.check_dpo_numbers),
    (pairs_interleaved, training.check_dpo_step),
    (warm_up_off_by_one, training.check_schedule),
    (cosine_over_the_warm_up_too, training.check_schedule),
]
RESUME = [moments_are_not_restored, data_starts_over, continues_one_step_late]


@pytest.mark.parametrize(
    ("mutate", "check"), CASES, ids=[mutate.__name__ for mutate, _ in CASES]
)
def test_is_caught(monkeypatch, mutate, check):
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("mutate", RESUME, ids=lambda mutate: mutate.__name__)
def test_is_caught_by_a_killed_run(monkeypatch, tmp_path, one_device, mutate):
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check_killed_run(tmp_path, one_device)


def test_checks_pass_without_a_slip(tmp_path, one_device):
    """Those that no other test calls."""
    check_frozen_in_one_layer()
    check_killed_run(tmp_path, one_device)
