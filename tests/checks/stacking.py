"""One model run in several ways: scanned, rematerialised, in bfloat16."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mil_jax.config import ComputeConfig
from mil_jax.models import decoder
from mil_jax.models.cache import init_cache

from . import oracle, sequences, tiny
from .compare import assert_close, assert_trees_close


def config(kind, layer_types=None):
    """Returns four layers that repeat with a period of two."""
    layer_types = layer_types or (kind, "attention") * 2
    return dataclasses.replace(tiny.CONFIGS[kind], layer_types=layer_types)


@functools.cache
def params(kind, layer_types=None):
    return tiny.random_params(config(kind, layer_types))


def check_scanned_forward(layer_types):
    kind = layer_types[0]
    model_config, weights = config(kind, layer_types), params(kind, layer_types)
    model = tiny.build(model_config, weights, scan_layers=True)
    tokens = tiny.tokens(1, 9)
    expected = oracle.Model(model_config, weights)(tokens[0])[None]
    assert_close(tiny.forward(model, tokens), expected)


def check_scan_and_remat(kind, first, second):
    """Value and gradients are the same, whichever of two ways the layers are run."""
    tokens, ids, places = sequences.layout(sequences.PACKED)
    cotangent = np.zeros((*tokens.shape, tiny.VOCAB), np.float32)
    documents = sequences.document_cotangents(places)
    expected = 0.0
    reference = oracle.Model(config(kind), params(kind))
    for (r, part), document in zip(places, documents, strict=True):
        cotangent[r, part] = document
        expected += np.sum(reference(tokens[r, part]) * document)
    results = [
        sequences.gradients(
            config(kind), params(kind), tokens, ids, cotangent, **compute
        )
        for compute in (first, second)
    ]
    for value, grads in results:
        assert_close(value, expected, atol=1e-3)
        assert_trees_close(grads, results[0][1], rtol=1e-3)


def check_products_are_kept(kind):
    """Remat that keeps products repeats fewer of them than one that keeps nothing."""

    def count(keeps):
        compute = {"remat": True, "remat_keeps": keeps}
        model = tiny.build(config(kind), params(kind), **compute)
        positions = jnp.arange(8, dtype=jnp.int32)[None]

        def loss(hidden):
            return jnp.sum(model.layers(hidden, positions, None))

        jaxpr = jax.make_jaxpr(jax.grad(loss))(model.embed(tiny.tokens(1, 8)))
        return str(jaxpr).count(" dot_general[")

    # Of each layer at least the feed-forward's two.
    assert count("products") <= count("nothing") - 2 * 2


def check_unstack(scan):
    """Placed weights come apart into the params they were, and go together again."""
    weights = params("mamba")
    plan = decoder.Blueprint.create(config("mamba"), ComputeConfig(scan_layers=scan))
    placed = plan.place(weights)
    assert any("::" in key for key in placed) == scan
    apart = plan.unstack(placed)
    assert set(apart) == set(weights)
    for name, value in weights.items():
        np.testing.assert_array_equal(apart[name], value, err_msg=name)
    some = {k: v for k, v in placed.items() if "mamba" in k}
    again = plan.stack(plan.unstack(some))
    assert set(again) == set(some)
    for name, value in some.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


def check_bfloat16(kind):
    """Training, prefill and decoding run in bfloat16 and are about right."""
    compute = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
    model_config, weights = tiny.CONFIGS[kind], tiny.params(kind)
    model = tiny.build(model_config, weights, **compute)
    tokens = tiny.tokens(2, sequences.LENGTH)
    expected = np.stack([tiny.reference(kind)(row) for row in tokens])

    cache = init_cache(model_config, model.compute, batch=2, max_length=16, max_step=2)
    split = sequences.LENGTH - 2
    counts = np.full((2,), split, np.int32)
    last, cache = tiny.prefill(model, tokens[:, :split], counts, cache)
    steps, _ = tiny.decode(model, tokens[:, split:], cache, commit=True)
    whole = tiny.forward(model, tokens)
    for name, actual, want in (
        ("forward", whole, expected),
        ("prefill", last, expected[:, split - 1]),
        ("decode", steps, expected[:, split:]),
    ):
        assert actual.dtype == np.float32
        error = np.linalg.norm(actual - want) / np.linalg.norm(want)
        assert 1e-3 < error < 0.05, f"{name}: {error}"


def check_bfloat16_gradients(kind):
    """Weights are in float32, as a stage trains them; products are in bfloat16."""
    problem, _ = sequences.packed_problem(sequences.GRADIENT_ROWS)
    arguments = (tiny.CONFIGS[kind], tiny.params(kind), *problem)
    _, exact = sequences.gradients(*arguments, scan_layers=False)
    _, grads = sequences.gradients(*arguments, scan_layers=False, dtype="bfloat16")
    assert_trees_close(grads, exact, rtol=0.2)
