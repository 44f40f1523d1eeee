"""Losses of the three stages: pure functions, float32, each with its normalisation.

Logits are made and consumed in chunks of positions, so that `[B, L, V]` in float32 never
exists; the backward pass makes each chunk's logits again.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

KLReduction = Literal["token_mean", "original"]

Head = Callable[[Float[Array, "B C D"]], Float[Array, "B C V"]]


def token_cross_entropy(
    logits: Float[Array, "*B V"], labels: Int[Array, "*B"]
) -> Float[Array, "*B"]:
    """Returns `-log softmax(logits)[label]` per token, in nats."""
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def token_kl(
    teacher_logits: Float[Array, "*B V"], student_logits: Float[Array, "*B V"]
) -> Float[Array, "*B"]:
    """Returns KL[p_teacher || p_student] per token, in nats."""
    log_p = jax.nn.log_softmax(teacher_logits, axis=-1)
    log_q = jax.nn.log_softmax(student_logits, axis=-1)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def over_chunks(
    per_token: Callable[..., tuple[Float[Array, "B C"], ...]],
    arrays: tuple[Float[Array, "B L ..."], ...],
    *,
    chunk: int,
) -> tuple[Float[Array, "B L"], ...]:
    """Applies `per_token` to slices of `chunk` positions and joins the results.

    Each slice is rematerialised in the backward pass, so what `per_token` makes in between
    (logits) lives for one slice at a time.

    Args:
        per_token: Maps slices [B, C, ...] of all `arrays` to per-token values [B, C].
        arrays: Share B and L.
        chunk: C; the last slice is padded with zeros, whose values are dropped.
    """
    batch, length = arrays[0].shape[:2]
    chunk = min(chunk, length)
    count = -(-length // chunk)

    def split(a: jax.Array) -> jax.Array:
        pad = [(0, 0), (0, count * chunk - length)] + [(0, 0)] * (a.ndim - 2)
        parts = jnp.pad(a, pad).reshape(batch, count, chunk, *a.shape[2:])
        return jnp.moveaxis(parts, 1, 0)

    body = jax.checkpoint(lambda slices: per_token(*slices))
    parts = jax.lax.map(body, tuple(split(a) for a in arrays))
    return tuple(
        jnp.moveaxis(part, 0, 1).reshape(batch, count * chunk)[:, :length]
        for part in parts
    )


def token_nll(
    head: Head,
    hidden: Float[Array, "B L D"],
    labels: Int[Array, "B L"],
    *,
    chunk: int = 512,
) -> Float[Array, "B L"]:
    """Returns the cross-entropy of every token, in nats, from hidden states."""

    def per_token(h: jax.Array, y: jax.Array) -> tuple[jax.Array]:
        return (token_cross_entropy(head(h), y),)

    return over_chunks(per_token, (hidden, labels), chunk=chunk)[0]


def token_nll_and_kl(
    student_head: Head,
    student_hidden: Float[Array, "B L D"],
    teacher_head: Head,
    teacher_hidden: Float[Array, "B L F"],
    labels: Int[Array, "B L"],
    *,
    chunk: int = 512,
) -> tuple[Float[Array, "B L"], Float[Array, "B L"]]:
    """Returns each token's cross-entropy and its KL from the teacher, in nats."""

    def per_token(
        s: jax.Array, t: jax.Array, y: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        student, teacher = student_head(s), jax.lax.stop_gradient(teacher_head(t))
        return token_cross_entropy(student, y), token_kl(teacher, student)

    return over_chunks(per_token, (student_hidden, teacher_hidden, labels), chunk=chunk)


class Counts(NamedTuple):
    """What sums are divided by.

    A step that accumulates micro-batches passes the whole batch's counts, so that the sum
    over micro-batches is the mean over the batch.
    """

    tokens: Float[Array, ""]  # unmasked tokens
    rows: Float[Array, ""]


def count(loss_mask: Bool[Array, "B L"]) -> Counts:
    """Returns the counts of one batch; a batch without answer tokens counts as one."""
    tokens = jnp.sum(loss_mask, dtype=jnp.float32)
    return Counts(jnp.maximum(tokens, 1.0), jnp.float32(loss_mask.shape[0]))


def seq_kd_loss(
    nll: Float[Array, "B L"],
    loss_mask: Bool[Array, "B L"],
    counts: Counts | None = None,
) -> Float[Array, ""]:
    """Returns the mean cross-entropy on the teacher's answers: nats per unmasked token.

    Source: Sec. 3, sequence-level distillation on pseudo-labels.
    """
    counts = counts or count(loss_mask)
    return jnp.sum(jnp.where(loss_mask, nll, 0.0)) / counts.tokens


def word_kd_loss(
    kl: Float[Array, "B L"],
    loss_mask: Bool[Array, "B L"],
    reduction: KLReduction = "token_mean",
    counts: Counts | None = None,
) -> Float[Array, ""]:
    """Returns the KL between teacher and student.

    Source: Sec. 3, word-level distillation.

    Args:
        kl: Per token, nats.
        loss_mask: Tokens of the answers.
        reduction: "token_mean": mean over unmasked tokens. "original": sum over all
            positions, padding included, divided by the batch, as the published
            implementation does; about L times larger.
        counts: Of the whole batch, where `kl` is a part of it.
    """
    counts = counts or count(loss_mask)
    if reduction == "original":
        return jnp.sum(kl) / counts.rows
    return jnp.sum(jnp.where(loss_mask, kl, 0.0)) / counts.tokens


def distill_loss(
    nll: Float[Array, "B L"],
    kl: Float[Array, "B L"] | None,
    loss_mask: Bool[Array, "B L"],
    *,
    ce_weight: float,
    kl_weight: float,
    kl_reduction: KLReduction = "token_mean",
    counts: Counts | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns `alpha * CE + beta * KL` (Eq. 2) and its parts.

    Args:
        nll: Student's cross-entropy on the pseudo-labels, per token.
        kl: KL[p_teacher || p_student], per token; None without a teacher.
        loss_mask: Answer tokens.
        ce_weight: alpha.
        kl_weight: beta.
        kl_reduction: See `word_kd_loss`.
        counts: Of the whole batch, where this is a part of it.
    """
    ce = seq_kd_loss(nll, loss_mask, counts)
    if kl is None:
        loss = ce_weight * ce
        return loss, {"loss": loss, "ce": ce}
    divergence = word_kd_loss(kl, loss_mask, kl_reduction, counts)
    loss = ce_weight * ce + kl_weight * divergence
    return loss, {"loss": loss, "ce": ce, "kl": divergence}


def dpo_loss(
    policy_chosen: Float[Array, "B"],
    policy_rejected: Float[Array, "B"],
    reference_chosen: Float[Array, "B"],
    reference_rejected: Float[Array, "B"],
    *,
    beta: float,
    rows: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the direct preference loss (Eq. 4; 2305.18290, Eq. 7), mean over pairs.

    Args:
        policy_chosen: Sum of log-probabilities of the chosen answer's tokens, nats.
        policy_rejected: The same of the rejected answer.
        reference_chosen: Under the reference model (the teacher).
        reference_rejected: Likewise.
        beta: Strength of the pull towards the reference.
        rows: Pairs of the whole batch, where this is a part of it.
    """
    rows = rows if rows is not None else jnp.float32(policy_chosen.shape[0])
    chosen = beta * (policy_chosen - reference_chosen)
    rejected = beta * (policy_rejected - reference_rejected)
    margin = chosen - rejected
    loss = jnp.sum(-jax.nn.log_sigmoid(margin)) / rows
    metrics = {
        "loss": loss,
        "accuracy": jnp.sum((margin > 0).astype(jnp.float32)) / rows,
        "margin": jnp.sum(margin) / rows,
        "reward_chosen": jnp.sum(chosen) / rows,
        "reward_rejected": jnp.sum(rejected) / rows,
    }
    return loss, metrics
