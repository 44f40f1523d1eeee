"""Weights laid out for decoding give what the training layout gives."""

import jax
import numpy as np
import pytest
from checks import generation, stepping, tiny
from checks.compare import assert_close

from mil_jax.config import ComputeConfig
from mil_jax.errors import UserError
from mil_jax.generate import decode
from mil_jax.models import decoder

pytestmark = pytest.mark.usefixtures("strict_jax")
DECODE = ComputeConfig(layout="decode")


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_both_layouts_give_the_same(kind):
    model = decoder.build(tiny.CONFIGS[kind], tiny.params(kind), DECODE)
    assert not hasattr(model.layers.blocks[0].mixer, "x_proj")
    tokens = tiny.tokens(2, 9)
    assert_close(tiny.forward(model, tokens), tiny.forward(tiny.model(kind), tokens))


@pytest.mark.parametrize("kind", ["rich", "mamba", "mamba2", "pure"])
def test_decoding_in_the_decode_layout(kind):
    model = decoder.build(tiny.CONFIGS[kind], tiny.params(kind), DECODE)
    session = stepping.Session(kind, model=model)
    session.prefill([6, 3, 1], 6)
    session.decode(4, [4, 0, 2])
    session.decode(1, [1, 1, 1])


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_names_are_those_of_training(kind):
    params = tiny.params(kind)
    plan = decoder.Blueprint.create(tiny.CONFIGS[kind], DECODE)
    placed = plan.place(params)
    assert any("+" in key for key in placed)
    assert {k: v.shape for k, v in plan.abstract().items()} == {
        k: v.shape for k, v in placed.items()
    }
    assert {k: len(v) for k, v in plan.logical_axes().items()} == {
        k: v.ndim for k, v in placed.items()
    }
    apart = plan.unstack(placed)
    assert set(apart) == set(params)
    for name, value in params.items():
        np.testing.assert_array_equal(apart[name], value, err_msg=name)
    some = {key: value for key, value in placed.items() if "mlp" in key}
    again = plan.stack(plan.unstack(some))
    assert set(again) == set(some)
    for name, value in some.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


def test_a_part_of_another_shape_is_named():
    params = dict(tiny.params("mamba"))
    params["layers.1.attn.k_proj.kernel"] = np.zeros((32, 33), np.float32)
    with pytest.raises(UserError, match=r"k_proj.kernel has shape \(32, 33\).*32, 32"):
        decoder.build(tiny.CONFIGS["mamba"], params, DECODE)


def test_layers_are_unrolled():
    assert not DECODE.is_scanned
    plan = decoder.Blueprint.create(tiny.CONFIGS["attention"], DECODE)
    assert plan.repeats == 1


def test_a_frozen_model_is_the_model():
    model = tiny.model("mamba")
    frozen = decoder.freeze(model)
    assert decoder.freeze(frozen) is frozen
    assert frozen.structure is decoder.freeze(model).structure
    assert (frozen.config, frozen.compute) == (model.config, model.compute)
    tokens = tiny.tokens(1, 5)
    run = jax.jit(lambda frozen, tokens: decoder.thaw(frozen)(tokens))
    np.testing.assert_array_equal(run(frozen, tokens), tiny.forward(model, tokens))


@pytest.mark.parametrize("kind", ["rich", "mamba", "mamba2", "pure"])
def test_prefill_in_chunks(kind):
    """A ragged batch of which some rows have no token in the last chunk."""
    model = tiny.model(kind)
    prompts = [tiny.tokens(1, n, seed=n)[0] for n in (3, 21, 16, 8)]
    batch = decode.pad_prompts(prompts, model.config)
    from mil_jax.models.cache import init_cache

    def read(chunk, width):
        cache = init_cache(
            model.config, model.compute, batch=4, max_length=40, max_step=2
        )
        run = jax.jit(lambda *args: model.prefill(*args, chunk=chunk))
        return run(batch.tokens[:, :width], batch.lengths, cache)

    logits, cache = read(None, 21)
    for chunk in (8, 5):
        parts, other = read(chunk, 21)
        assert_close(parts, logits)
        np.testing.assert_array_equal(other.lengths, cache.lengths)
    again = jax.tree.leaves(
        [layer.state for layer in cache.layers if hasattr(layer, "state")]
    )
    parts = jax.tree.leaves(
        [layer.state for layer in other.layers if hasattr(layer, "state")]
    )
    for a, b in zip(again, parts, strict=True):
        assert_close(b, a)


def test_answers_to_prompts_read_in_chunks():
    prompts = [tiny.tokens(1, n, seed=n)[0] for n in (3, 21, 33)]
    model, kwargs = tiny.model("mamba"), {"max_new_tokens": 6, "eos_ids": ()}
    expected = [tiny.reference("mamba").greedy(p, 6) for p in prompts]
    answers = decode.generate(model, prompts, chunk=8, **kwargs)
    generation.assert_answers(answers, expected, 6)
    with pytest.raises(UserError, match="chunk is 0"):
        decode.generate(model, prompts, chunk=0, **kwargs)


@pytest.mark.parametrize(
    "ids", [[], [1, 1], [-1, 2], [tiny.CONFIGS["mamba"].vocab_size]]
)
def test_a_reduced_head_needs_known_tokens_once(ids):
    with pytest.raises(UserError, match="a reduced head needs tokens below"):
        tiny.model("mamba").with_vocab(ids)


def test_a_reduced_head_only_drafts():
    small = tiny.model("mamba").with_vocab([3, 4])
    with pytest.raises(UserError, match="was reduced before"):
        small.with_vocab([0, 1])
    with pytest.raises(UserError, match="can only draft"):
        decode.generate(small, [[1, 2]], max_new_tokens=3)
