"""Losses of the three stages: pure functions, float32, each with its normalisation.

Logits are made and consumed in chunks of positions, so that `[B, L, V]` in float32 never
exists; the backward pass makes each chunk's logits again.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

KLReduction = Literal["token_mean", "original"]

Head = Callable[[Float[Array, "B C D"]], Float[Array, "B C V"]]
Metrics = dict[str, Float[Array, ""]]


def token_cross_entropy(
    logits: Float[Array, "*B V"], labels: Int[Array, "*B"]
) -> Float[Array, "*B"]:
    """Returns `-log softmax(logits)[label]` per token, in nats."""
    # Not a gather, whose gradient would be a scatter into an array of all logits.
    axis = logits.ndim - 1
    token = jax.lax.broadcasted_iota(labels.dtype, logits.shape, axis)
    is_label = token == jnp.expand_dims(labels, axis)
    picked = jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - picked


def token_kl(
    teacher_logits: Float[Array, "*B V"], student_logits: Float[Array, "*B V"]
) -> Float[Array, "*B"]:
    """Returns KL[p_teacher || p_student] per token, in nats."""
    # With the same normaliser as the cross-entropy, which the compiler then shares.
    teacher = jax.nn.logsumexp(teacher_logits, axis=-1)
    student = jax.nn.logsumexp(student_logits, axis=-1)
    p = jnp.exp(teacher_logits - jnp.expand_dims(teacher, -1))
    return jnp.sum(p * (teacher_logits - student_logits), axis=-1) + student - teacher


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
    length = arrays[0].shape[1]
    body = jax.checkpoint(lambda slices: per_token(*slices))
    parts = jax.lax.map(body, tuple(_split(a, chunk) for a in arrays))
    return tuple(_join(part, length) for part in parts)


def _split(a: Float[Array, "B L ..."], chunk: int) -> Float[Array, "K B C ..."]:
    """Cuts positions into chunks, the last one padded with zeros."""
    batch, length = a.shape[:2]
    chunk = min(chunk, length)
    count = -(-length // chunk)
    pad = [(0, 0), (0, count * chunk - length)] + [(0, 0)] * (a.ndim - 2)
    parts = jnp.pad(a, pad).reshape(batch, count, chunk, *a.shape[2:])
    return jnp.moveaxis(parts, 1, 0)


def _join(parts: Float[Array, "K B C ..."], length: int) -> Float[Array, "B L ..."]:
    """Inverse of `_split`."""
    count, batch, chunk = parts.shape[:3]
    whole = jnp.moveaxis(parts, 0, 1).reshape(batch, count * chunk, *parts.shape[3:])
    return whole[:, :length]


def reduce_over_chunks(
    per_token: Callable[..., tuple[Float[Array, "B C"], ...]],
    reduce: Callable[..., tuple[Float[Array, ""], Metrics]],
    arrays: tuple[Float[Array, "B L ..."], ...],
    *,
    chunk: int,
) -> tuple[Float[Array, ""], Metrics]:
    """Returns `reduce(*over_chunks(per_token, arrays))` with a cheaper gradient.

    Since `reduce` is linear, what it will send back to every token is known before any
    logit is: the forward pass takes each slice's gradient while its logits are there, and
    nothing is computed twice. Tokens that do not count are left out, slice by slice.

    Args:
        per_token: As in `over_chunks`.
        reduce: Linear in the per-token values [B, L]; returns the loss and metrics, through
            which nothing is differentiated.
        arrays: As in `over_chunks`.
        chunk: As in `over_chunks`.
    """
    slices = [jax.eval_shape(lambda a: _split(a, chunk)[0], a) for a in arrays]
    pure, weights = jax.closure_convert(per_token, *slices)

    @jax.custom_vjp
    def reduced(arrays, weights):
        values = over_chunks(lambda *s: pure(*s, *weights), arrays, chunk=chunk)
        return reduce(*values)

    def forward(arrays, weights):
        # Frozen weights (and the teacher) would cost a product each: take no gradient.
        given = jax.tree.leaves((arrays, weights), is_leaf=_is_primal)
        moved = [leaf.perturbed for leaf in given]
        arrays, weights = jax.tree.map(
            lambda leaf: leaf.value, (arrays, weights), is_leaf=_is_primal
        )
        values, gradients = _values_and_gradients(
            pure, reduce, arrays, weights, moved, chunk
        )
        return reduce(*values), gradients

    def backward(gradients, cotangents):
        scale = cotangents[0]
        return jax.tree.map(
            lambda g: (g.astype(scale.dtype) * scale).astype(g.dtype), gradients
        )

    reduced.defvjp(forward, backward, symbolic_zeros=True)
    return reduced(tuple(arrays), weights)


def _is_primal(node: object) -> bool:
    return isinstance(node, jax.custom_derivatives.CustomVJPPrimal)


def _values_and_gradients(pure, reduce, arrays, weights, moved, chunk):
    """Returns per-token values and the reduced value's gradients; None where not moved."""
    length, num_arrays = arrays[0].shape[1], len(arrays)
    slices = [jax.eval_shape(lambda a: _split(a, chunk)[0], a) for a in arrays]
    shapes = jax.eval_shape(pure, *slices, *weights)
    zeros = [jnp.zeros(arrays[0].shape[:2], shape.dtype) for shape in shapes]
    sent_back = jax.grad(lambda values: reduce(*values)[0])(zeros)
    # Prompts and padding need no logits: tokens that count come first in every row, and
    # slices without any are left out.
    counts = functools.reduce(jnp.logical_or, [value != 0.0 for value in sent_back])
    order = jnp.argsort(jnp.logical_not(counts), axis=1, stable=True)
    back = jnp.argsort(order, axis=1)
    parts = [_split(_take(a, order), chunk) for a in arrays]
    sent_back = [_split(_take(value, order), chunk) for value in sent_back]

    def turn(sums, inputs):
        needed = [jnp.any(value != 0.0) for value in inputs[1]]
        return jax.lax.cond(jnp.any(jnp.stack(needed)), run, skip, sums, inputs)

    def skip(sums, inputs):
        slices, sent_back = inputs
        of_slices = [
            jnp.zeros_like(s) for s, m in zip(slices, moved, strict=False) if m
        ]
        return sums, ([jnp.zeros_like(value) for value in sent_back], of_slices)

    def run(sums, inputs):
        slices, sent_back = inputs
        leaves = [*slices, *weights]
        floats = [leaf for leaf, m in zip(leaves, moved, strict=True) if m]

        def of_moved(floats):
            it = iter(floats)
            return pure(
                *(next(it) if m else v for v, m in zip(leaves, moved, strict=True))
            )

        values, pull = jax.vjp(of_moved, floats)
        [gradients] = pull(tuple(sent_back))
        of_slices = list(gradients[: sum(moved[:num_arrays])])
        of_weights = gradients[len(of_slices) :]
        sums = [a + b for a, b in zip(sums, of_weights, strict=True)]
        return sums, (list(values), of_slices)

    moved_weights = [w for w, m in zip(weights, moved[num_arrays:], strict=True) if m]
    # In float32: sums of many slices would lose what a single one adds.
    start = [jnp.zeros(w.shape, jnp.float32) for w in moved_weights]
    sums, (values, of_slices) = jax.lax.scan(turn, start, (parts, sent_back))
    of_arrays = [_take(_join(part, length), back) for part in of_slices]
    of_weights = [a.astype(w.dtype) for a, w in zip(sums, moved_weights, strict=True)]
    found = iter([*of_arrays, *of_weights])
    gradients = [next(found) if m else None for m in moved]
    values = tuple(_take(_join(value, length), back) for value in values)
    return values, (tuple(gradients[:num_arrays]), gradients[num_arrays:])


def _take(a: Float[Array, "B L ..."], order: Int[Array, "B L"]) -> jax.Array:
    """Returns the positions of every row in the order given."""
    order = order.reshape(order.shape + (1,) * (a.ndim - 2))
    return jnp.take_along_axis(a, order, axis=1)


def nll_of_slice(head: Head) -> Callable[..., tuple[Float[Array, "B C"]]]:
    """Returns a function of hidden states and labels to each token's cross-entropy."""

    def per_token(h: jax.Array, y: jax.Array) -> tuple[jax.Array]:
        return (token_cross_entropy(head(h), y),)

    return per_token


def nll_and_kl_of_slice(
    student_head: Head, teacher_head: Head
) -> Callable[..., tuple[Float[Array, "B C"], Float[Array, "B C"]]]:
    """Returns a function of both models' hidden states and labels to losses per token.

    These are the student's cross-entropy and its KL from the teacher, in nats.
    """

    def per_token(
        s: jax.Array, t: jax.Array, y: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        student, teacher = student_head(s), jax.lax.stop_gradient(teacher_head(t))
        return token_cross_entropy(student, y), token_kl(teacher, student)

    return per_token


def token_nll(
    head: Head,
    hidden: Float[Array, "B L D"],
    labels: Int[Array, "B L"],
    *,
    chunk: int = 512,
) -> Float[Array, "B L"]:
    """Returns the cross-entropy of every token, in nats, from hidden states."""
    return over_chunks(nll_of_slice(head), (hidden, labels), chunk=chunk)[0]


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
