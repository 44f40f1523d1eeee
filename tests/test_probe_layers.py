"""The probe silences one layer's attention and nothing else."""

import math

import jax.numpy as jnp
import numpy as np

from mil_jax import probe_layers
from mil_jax.checkpoint import models
from mil_jax.config import ComputeConfig
from mil_jax.data import sources
from mil_jax.data.chat import encode_chat, load_tokenizer
from mil_jax.models import decoder


def test_loss_is_that_of_a_model_without_the_layers_attention():
    teacher = models.load("demo_teacher")
    tokenizer = load_tokenizer(teacher.source)
    chats = [sources.conversations("demo:test:0:3")[i] for i in range(3)]
    found = {
        layer: probe_layers.silence(teacher, layer, ComputeConfig(), tokenizer, chats)
        for layer in (None, 0)
    }
    model = decoder.build(teacher.config, teacher.params, ComputeConfig())
    silent = _without_attention(teacher, 0)
    for layer, other in ((None, model), (0, silent)):
        nll, count = 0.0, 0
        for chat in chats:
            example = encode_chat(tokenizer, chat)
            logits = np.float64(other(jnp.asarray(example.tokens)[None]))[0, :-1]
            logits -= logits.max(-1, keepdims=True)
            logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
            scores = logits[np.arange(len(logits)), example.tokens[1:]]
            nll -= scores[example.loss_mask[1:]].sum()
            count += example.loss_mask[1:].sum()
        assert abs(found[layer]["loss"] - nll / count) < 1e-4
        assert abs(found[layer]["ppl"] - math.exp(nll / count)) < 1e-3
    assert found[0]["loss"] > found[None]["loss"] + 0.1


def _without_attention(teacher, layer):
    """A model whose layer adds values of zero instead of silencing its output."""
    params = dict(teacher.params)
    name = f"layers.{layer}.attn.v_proj.kernel"
    params[name] = np.zeros_like(params[name])
    return decoder.build(teacher.config, params, ComputeConfig())
