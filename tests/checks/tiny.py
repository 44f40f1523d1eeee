"""Tiny models of every kind with weights that hide nothing, and jitted calls to them."""

import contextlib
import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from mil_jax.config import ComputeConfig, ModelConfig, RopeScaling, SSMConfig
from mil_jax.generate import decode as plain
from mil_jax.generate import speculative
from mil_jax.models import decoder

from . import oracle

VOCAB = 61
ATTENTION = ModelConfig(
    vocab_size=VOCAB,
    d_model=32,
    layer_types=("attention",) * 2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    d_ff=48,
    rms_norm_eps=1e-2,
    rope_theta=300.0,
)
# N = 8 < P = 16: two blocks a head, so that the order of channels matters.
MAMBA_SSM = SSMConfig(d_state=8, dt_rank=3, d_inner=64, d_xb=32)
MAMBA2_SSM = SSMConfig(d_state=16, dt_rank=2, d_inner=64, d_xb=32)
CONFIGS = {
    "attention": ATTENTION,
    "rich": dataclasses.replace(
        ATTENTION,
        sliding_window=5,
        attention_bias=True,
        qk_norm=True,
        tie_embeddings=True,
        rope_scaling=RopeScaling(4.0, 1.0, 4.0, 12),
    ),
    "mamba": dataclasses.replace(
        ATTENTION, layer_types=("mamba", "attention"), ssm=MAMBA_SSM
    ),
    "mamba2": dataclasses.replace(
        ATTENTION, layer_types=("attention", "mamba2"), ssm=MAMBA2_SSM
    ),
    "pure": ModelConfig(
        vocab_size=VOCAB,
        d_model=32,
        layer_types=("mamba",) * 2,
        tie_embeddings=True,
        ssm=SSMConfig(d_state=8, dt_rank=3, d_inner=64, d_xb=64, inputs_from="conv"),
    ),
}


def random_params(config, seed=0):
    """Returns weights drawn by name: models of one seed share what they both have."""
    blueprint = decoder.Blueprint.create(config, ComputeConfig(scan_layers=False))
    params = {}
    for name, leaf in blueprint.abstract().items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        params[name] = _draw(name, leaf.shape, rng).astype(np.float32)
    if config.tie_embeddings:
        # Else every token would predict itself.
        params["embed.embedding"] *= np.float32(0.25)
    return params


def _draw(name, shape, rng):
    normal = rng.standard_normal(shape)
    if name == "embed.embedding":
        return normal
    if name.endswith("A_log"):
        return np.log(rng.uniform(0.2, 3.0, shape))
    if name.endswith("dt_bias"):
        return normal - 1.0
    if name.endswith("scale"):
        return 1 + 0.3 * normal
    if name.endswith("conv_kernel"):
        return 0.6 * normal
    if name.endswith(".kernel"):
        # Sharp attention, so that one position more or less is seen.
        gain = 2.0 if "q_proj" in name else 1.0
        return gain * normal / np.sqrt(shape[0])
    return 0.5 * normal


@functools.cache
def params(kind, seed=0):
    return random_params(CONFIGS[kind], seed)


@functools.cache
def reference(kind, seed=0):
    """Returns the oracle with the same weights."""
    return oracle.Model(CONFIGS[kind], params(kind, seed))


def build(config, params, **compute):
    """Returns the model, with unrolled layers in float32 unless told otherwise."""
    compute = ComputeConfig(**({"scan_layers": False} | compute))
    return decoder.build(config, params, compute)


@functools.cache
def model(kind, seed=0):
    return build(CONFIGS[kind], params(kind, seed))


# Which roundings to bfloat16 XLA skips hangs on what it fuses, so it skips none here.
EXACT = {"xla_allow_excess_precision": False}

forward = jax.jit(
    lambda model, tokens, segment_ids=None: model(tokens, segment_ids),
    compiler_options=EXACT,
)
prefill = jax.jit(lambda model, *args: model.prefill(*args), compiler_options=EXACT)
decode = jax.jit(
    lambda model, tokens, cache, commit: model.decode(tokens, cache, commit=commit),
    static_argnames="commit",
    compiler_options=EXACT,
)


@functools.cache
def gradient_function(config, compute):
    """Returns a blueprint and jitted value and gradients of sum(logits * cotangent)."""
    plan = decoder.Blueprint.create(config, compute)

    def weighted_sum(weights, tokens, ids, cotangent):
        return jnp.sum(plan.model(weights)(tokens, ids) * cotangent)

    return plan, jax.jit(jax.value_and_grad(weighted_sum))


@contextlib.contextmanager
def fresh_traces():
    """Forgets compiled programs before and after, so that a patched function is used."""
    programs = (forward, prefill, decode)
    programs += (plain._start, plain.advance)
    programs += (decoder._prefill_layer, decoder._decode_layer)
    programs += (speculative._start, speculative._advance)
    programs += (speculative._commit, speculative._catch_up)

    def forget():
        gradient_function.cache_clear()
        for program in programs:
            program.clear_cache()

    forget()
    try:
        yield
    finally:
        forget()


def tokens(rows, length, seed=0):
    """Returns random token ids [rows, length]."""
    rng = np.random.default_rng([seed, 7])
    return rng.integers(0, VOCAB, (rows, length)).astype(np.int32)


def perturbed(params, amount, seed=1):
    """Returns weights near `params`: a draft that agrees now and then."""
    rng = np.random.default_rng(seed)
    return {
        name: value + np.float32(amount * value.std()) * _like(rng, value)
        for name, value in params.items()
    }


def _like(rng, value):
    return rng.standard_normal(value.shape).astype(np.float32)
