"""Whole sequences: logits and gradients, also of packed and padded rows."""

import numpy as np

from mil_jax.config import ComputeConfig

from . import oracle, tiny
from .compare import assert_close, assert_trees_close

LENGTH = 14
# Lengths of documents in rows of LENGTH tokens; negative is padding.
PACKED = [[5, 1, 6, 2], [9, 5]]
PADDED = [[-4, 10], [11, -3]]
GRADIENT_ROWS = [[5, 1, 6, -2], [9, 5]]


def layout(rows, seed=0):
    """Returns tokens and segment ids [R, LENGTH], and each document's row and slice.

    A negative length is padding, which has segment 0.
    """
    tokens = tiny.tokens(len(rows), LENGTH, seed)
    ids = np.zeros((len(rows), LENGTH), np.int32)
    places = []
    for r, lengths in enumerate(rows):
        start = 0
        for number, length in enumerate(lengths, start=1):
            part = slice(start, start + abs(length))
            start += abs(length)
            if length > 0:
                ids[r, part] = number
                places.append((r, part))
        assert start == LENGTH
    return tokens, ids, places


def check_forward(kind):
    tokens = tiny.tokens(2, LENGTH)
    expected = [tiny.reference(kind)(row) for row in tokens]
    assert_close(tiny.forward(tiny.model(kind), tokens), expected)


def check_documents(kind, rows):
    """Every document in its row equals the document alone."""
    tokens, ids, places = layout(rows)
    logits = np.asarray(tiny.forward(tiny.model(kind), tokens, ids))
    for r, part in places:
        expected = tiny.reference(kind)(tokens[r, part])
        assert_close(logits[r, part], expected, name=f"row {r} {part}")


def check_packed(kind):
    check_documents(kind, PACKED)


def check_padded(kind):
    check_documents(kind, PADDED)


def gradients(config, params, tokens, ids, cotangent, **compute):
    """Returns sum(logits * cotangent) and its gradients, per layer."""
    plan, function = tiny.gradient_function(config, ComputeConfig(**compute))
    value, grads = function(plan.place(params), tokens, ids, cotangent)
    return value, plan.unstack(grads)


def document_cotangents(places, seed=3):
    """Returns one [length, V] array per document."""
    rng = np.random.default_rng(seed)
    return [
        rng.standard_normal((part.stop - part.start, tiny.VOCAB)) for _, part in places
    ]


def packed_problem(rows):
    """Returns tokens, ids and cotangents of `rows`, once packed and once a row each.

    Both have as many rows as there are documents, so that one program runs them.
    """
    tokens, ids, places = layout(rows)
    cotangents = document_cotangents(places)
    shape = (len(places), LENGTH)
    packed = [np.zeros(shape, np.int32), np.zeros(shape, np.int32)]
    packed.append(np.zeros((*shape, tiny.VOCAB), np.float32))
    single = [np.zeros_like(a) for a in packed]
    packed[0][: len(rows)], packed[1][: len(rows)] = tokens, ids
    for i, ((r, part), cotangent) in enumerate(zip(places, cotangents, strict=True)):
        packed[2][r, part] = cotangent
        length = part.stop - part.start
        single[0][i, :length] = tokens[r, part]
        single[1][i, :length] = 1
        single[2][i, :length] = cotangent
    return packed, single


def check_packed_gradients(kind):
    """Gradients of packed rows are the sum of the documents' own."""
    packed, single = packed_problem(GRADIENT_ROWS)
    config, params = tiny.CONFIGS[kind], tiny.params(kind)
    value, grads = gradients(config, params, *packed, scan_layers=False)
    expected_value, expected = gradients(config, params, *single, scan_layers=False)
    assert_close(value, expected_value, atol=1e-3)
    assert_trees_close(grads, expected, rtol=1e-4)


def check_gradient_direction(kind):
    """The gradient along a random direction is the oracle's central difference."""
    packed, single = packed_problem(GRADIENT_ROWS)
    config, params = tiny.CONFIGS[kind], tiny.params(kind)
    _, grads = gradients(config, params, *packed, scan_layers=False)
    rng = np.random.default_rng(5)
    direction = {n: v.std() * rng.standard_normal(v.shape) for n, v in params.items()}

    def objective(eps):
        moved = {
            n: v.astype(np.float64) + eps * direction[n] for n, v in params.items()
        }
        model = oracle.Model(config, moved)
        total = 0.0
        for tokens, ids, cotangent in zip(*single, strict=True):
            length = int(ids.sum())
            total += np.sum(model(tokens[:length]) * cotangent[:length])
        return total

    eps = 1e-5
    measured = (objective(eps) - objective(-eps)) / (2 * eps)
    along = sum(np.sum(np.asarray(grads[n], np.float64) * direction[n]) for n in params)
    assert abs(measured) > 1
    assert abs(along - measured) <= 1e-4 * abs(measured) + 1e-3
