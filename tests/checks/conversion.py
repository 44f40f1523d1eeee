"""Attention to Mamba: what lands where, and what the order of channels means."""

import contextlib
import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from mil_jax import surgery
from mil_jax.models import mamba, mamba2, ssm

from . import tiny
from .compare import assert_close

D_STATE = 8
TEACHER = dataclasses.replace(tiny.ATTENTION, layer_types=("attention",) * 4)


def teacher(**changes):
    """Returns params and config."""
    config = dataclasses.replace(TEACHER, **changes)
    return {name: value.copy() for name, value in _drawn(config).items()}, config


@functools.cache
def _drawn(config):
    return tiny.random_params(config)


def convert(params, config, layers, **kwargs):
    return surgery.attention_to_mamba(
        params, config, layers, **({"d_state": D_STATE} | kwargs)
    )


def aligned_order(config, n):
    """Attention channel of every Mamba channel: (kv head, block, repeat, i)."""
    repeats, p = config.n_heads // config.n_kv_heads, config.head_dim
    return [
        (j * repeats + r) * p + m * n + i
        for j in range(config.n_kv_heads)
        for m in range(p // n)
        for r in range(repeats)
        for i in range(n)
    ]


def check_copies(mixer, channel_order):
    """Every copied weight, bit for bit; the others as they were."""
    params, config = teacher()
    result, hybrid = convert(
        params, config, (0, 2), mixer=mixer, channel_order=channel_order
    )
    assert hybrid.layer_types == (mixer, "attention") * 2
    order = list(range(64))
    if mixer == "mamba" and channel_order == "aligned":
        order = aligned_order(config, D_STATE)
        assert order != sorted(order)
    equal = np.testing.assert_array_equal
    for i in (0, 2):
        new, old = f"layers.{i}.{mixer}", f"layers.{i}.attn"
        equal(result[f"{new}.x_proj.kernel"], params[f"{old}.v_proj.kernel"])
        equal(result[f"{new}.B_proj.kernel"], params[f"{old}.k_proj.kernel"])
        q, o = params[f"{old}.q_proj.kernel"], params[f"{old}.o_proj.kernel"]
        equal(result[f"{new}.C_proj.kernel"], q[:, order])
        equal(result[f"{new}.out_proj.kernel"], o[order])
    kept = {
        name: value
        for name, value in params.items()
        if not name.startswith(("layers.0.attn", "layers.2.attn"))
    }
    for name, value in kept.items():
        equal(result[name], value)
    expected = {n: v.shape for n, v in tiny.random_params(hybrid).items()}
    assert {n: v.shape for n, v in result.items()} == expected


def linear_attention(u, params, config, n):
    """Causal sums of (q_t k_s) v_s without softmax, over blocks of n channels."""
    q, k, v = (
        u @ params[f"layers.0.attn.{name}_proj.kernel"].astype(np.float64)
        for name in "qkv"
    )
    length, p = len(u), config.head_dim
    out = np.zeros_like(q)
    for h in range(config.n_heads):
        j = h // (config.n_heads // config.n_kv_heads)
        for start in range(0, p, n):
            query = slice(h * p + start, h * p + start + n)
            key = slice(j * p + start, j * p + start + n)
            scores = np.tril(q[:, query] @ k[:, key].T)
            assert scores.shape == (length, length)
            out[:, query] = scores @ v[:, key]
    return out @ params["layers.0.attn.o_proj.kernel"].astype(np.float64)


@contextlib.contextmanager
def plain_sums():
    """Takes away the convolution, the gate and the gated norm."""
    scan = mamba.selective_scan

    def ungated(*args, **kwargs):
        return scan(*args, **(kwargs | {"z": None}))

    def only_split(x, kernel, *args, splits=None, group=None, **kwargs):
        if group is not None:
            groups = x.reshape(*x.shape[:2], -1, 1, group)
            repeats = kernel.shape[1] // x.shape[2]
            x = jnp.repeat(groups, repeats, axis=3).reshape(*x.shape[:2], -1)
        return x if splits is None else jnp.split(x, np.cumsum(splits)[:-1], axis=-1)

    with (
        mock.patch.object(ssm, "causal_conv", only_split),
        mock.patch.object(mamba, "selective_scan", ungated),
        mock.patch.object(mamba2.GatedNorm, "__call__", lambda self, y, z: y),
    ):
        yield


def alignment_error(mixer="mamba", channel_order="aligned", d_state=D_STATE, **changes):
    """Returns the largest difference from linear attention, A = 0 and dt = 1."""
    params, config = teacher(layer_types=("attention",), **changes)
    result, hybrid = convert(
        params,
        config,
        (0,),
        mixer=mixer,
        channel_order=channel_order,
        d_state=d_state,
    )
    prefix = f"layers.0.{mixer}"
    one = np.log(np.expm1(1.0))  # softplus of this is 1
    for name, value in {
        "A_log": -np.inf,
        "D": 0.0,
        "dt_bias": one,
        "dt_up.kernel": 0.0,
        "dt_proj.kernel": 0.0,
    }.items():
        if f"{prefix}.{name}" in result:
            result[f"{prefix}.{name}"] = np.full_like(result[f"{prefix}.{name}"], value)
    layer = tiny.build(hybrid, result).layers.blocks[0]
    u = np.random.default_rng(0).standard_normal((11, config.d_model))
    with plain_sums():
        mix = jax.jit(lambda layer, u: layer.mixer(u))
        actual = np.asarray(mix(layer, u[None].astype(np.float32)))[0]
    block = config.head_dim if mixer == "mamba2" else d_state
    expected = linear_attention(u, params, config, block)
    assert_close(expected, expected, name="the reference")
    return np.abs(actual - expected).max() / np.abs(expected).max()


def check_aligned(mixer="mamba"):
    assert alignment_error(mixer) < 1e-5


def check_stepwise():
    """A second step leaves the first one's layers alone, bit for bit."""
    params, config = teacher()
    first, config_1 = convert(params, config, (0,))
    trained = {
        n: v + np.float32(0.25) if ".mamba." in n else v for n, v in first.items()
    }
    second, config_2 = convert(trained, config_1, (2, 0))
    assert config_2.layer_types == ("mamba", "attention") * 2
    for name, value in trained.items():
        if not name.startswith("layers.2.attn"):
            np.testing.assert_array_equal(second[name], value, err_msg=name)
    at_once, _ = convert(params, config, (0, 2))
    for name, value in at_once.items():
        if name.startswith("layers.2."):
            np.testing.assert_array_equal(second[name], value, err_msg=name)


def check_dt_init():
    """The published start is twice Mamba's, and nothing else differs."""
    params, config = teacher()
    for mixer, factor in (("mamba", 2), ("mamba2", 1)):
        ours, _ = convert(params, config, (1,), mixer=mixer)
        published, _ = convert(params, config, (1,), mixer=mixer, dt_init="original")
        for name, value in ours.items():
            times = factor if name.endswith("dt_bias") else 1
            np.testing.assert_array_equal(published[name], times * value, err_msg=name)
    # Mamba's own: step sizes between 1e-3 and 1e-1.
    steps = np.log1p(np.exp(ours["layers.1.mamba2.dt_bias"].astype(np.float64)))
    assert 0.99e-3 < steps.min() < steps.max() < 0.101


def check_keep_layers():
    params, config = teacher()
    hybrid_params, hybrid = convert(params, config, (0, 2))
    kept, small = surgery.keep_layers(hybrid_params, hybrid, (3, 0))
    assert small.layer_types == ("attention", "mamba")
    equal = np.testing.assert_array_equal
    expected = {n: v.shape for n, v in tiny.random_params(small).items()}
    assert {n: v.shape for n, v in kept.items()} == expected
    for name, value in kept.items():
        source = name
        if name.startswith("layers."):
            _, index, rest = name.split(".", 2)
            source = f"layers.{(3, 0)[int(index)]}.{rest}"
        equal(value, hybrid_params[source], err_msg=name)
