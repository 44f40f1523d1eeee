"""What only a GPU shows: cuDNN's attention, compiled kernels, generation (`-m gpu`)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import meshes

from mil_jax import surgery
from mil_jax.config import ComputeConfig
from mil_jax.generate import decode, speculative
from mil_jax.models import decoder
from mil_jax.shapes import SHAPES
from pallas_kernels.selective_scan.api import selective_scan
from pallas_kernels.ssd.api import ssd

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA GPU"),
]


def relative_error(found, expected):
    found, expected = np.float64(found), np.float64(expected)
    assert np.isfinite(found).all()
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def hybrid(mixer):
    config = dataclasses.replace(SHAPES["tiny"], sliding_window=24)
    params = decoder.init_params(config, jax.random.key(0))
    return surgery.attention_to_mamba(params, config, (0, 2), mixer=mixer)


@pytest.mark.parametrize("packed", [False, True])
def test_cudnn_attention_gives_what_xla_gives(packed):
    params, config = hybrid("mamba")
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (2, 128), np.int32)
    segments = np.repeat([[1, 2]], 64, axis=1).repeat(2, axis=0) if packed else None
    out = {}
    for name in ("xla", "cudnn"):
        compute = ComputeConfig(dtype="bfloat16", attention=name)
        model = decoder.build(config, params, compute)
        out[name] = model.hidden(tokens, segments).astype(jnp.float32)
    assert relative_error(out["cudnn"], out["xla"]) < 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_selective_scan_matches_the_reference(dtype):
    keys = jax.random.split(jax.random.key(1), 5)
    x, z, dt = (jax.random.normal(k, (2, 500, 256), dtype) for k in keys[:3])
    B, C = (
        jax.random.normal(k, (2, 500, g, 16), dtype)
        for k, g in zip(keys[3:], (4, 16), strict=True)
    )
    A = -jnp.exp(jax.random.normal(keys[0], (256, 16)))

    def loss(args, implementation=None):
        x, z, dt, B, C = args
        more = {"D": jnp.ones(256), "z": z, "dt_bias": jnp.zeros(256)}
        y, state = selective_scan(x, dt, A, B, C, **more, implementation=implementation)
        return jnp.sum(y.astype(jnp.float32) ** 2) + jnp.sum(state**2)

    args = (x, z, dt, B, C)
    exact = jax.tree.map(lambda a: a.astype(jnp.float32), args)
    with jax.default_matmul_precision("highest"):
        found = jax.grad(loss)(args)
        expected = jax.grad(loss)(exact, "reference")
    bound = 1e-5 if dtype == "float32" else 1e-2
    for f, e in zip(found, expected, strict=True):
        assert relative_error(f.astype(jnp.float32), e) < bound


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_ssd_matches_the_reference(dtype):
    keys = jax.random.split(jax.random.key(2), 4)
    x = jax.random.normal(keys[0], (2, 500, 2, 64), dtype)
    dt = jax.random.normal(keys[1], (2, 500, 4), dtype)
    B = jax.random.normal(keys[2], (2, 500, 2, 64), dtype)
    C = jax.random.normal(keys[3], (2, 500, 4, 64), dtype)
    A = -jnp.linspace(0.5, 8.0, 4)
    args = (x, dt, B, C)
    exact = jax.tree.map(lambda a: a.astype(jnp.float32), args)
    with jax.default_matmul_precision("highest"):
        found, state = ssd(x, dt, A, B, C)
        expected, last = ssd(
            exact[0], exact[1], A, *exact[2:], implementation="reference"
        )
    bound = 1e-5 if dtype == "float32" else 1e-2
    assert relative_error(found.astype(jnp.float32), expected) < bound
    assert relative_error(state, last) < bound


@pytest.mark.parametrize("layout", ["train", "decode"])
@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_greedy_speculation_is_plain_decoding(mixer, layout):
    params, config = hybrid(mixer)
    compute = ComputeConfig(scan_layers=False, layout=layout)
    target = decoder.build(config, params, compute)
    shrunk, small = surgery.keep_layers(params, config, (0, 1))
    draft = decoder.build(small, shrunk, compute)
    prompts = [np.arange(3, 9), np.arange(40, 51)]
    with jax.default_matmul_precision("highest"):
        plain = decode.generate(target, prompts, max_new_tokens=24, eos_ids=())
        fast, stats = speculative.generate(
            target, draft, prompts, k=3, max_new_tokens=24, eos_ids=()
        )
    np.testing.assert_array_equal(plain.tokens, fast.tokens)
    assert stats.tokens_per_step >= 1


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_no_cache_is_copied_while_decoding(mixer):
    """Keys, values and states are updated where they are."""
    params, config = hybrid(mixer)
    model = decoder.build(config, params, ComputeConfig(layout="decode"))
    state = decode.start(model, [np.arange(3, 9)], max_new_tokens=99, eos_ids=())
    text = decode.advance.lower(model, state, 8).compile().as_text()
    large = {
        f"f32[{','.join(map(str, leaf.shape))}]"
        for layer in state.cache.layers
        for leaf in jax.tree.leaves(layer)
        if leaf.size >= 2048
    }
    assert len(large) == 2
    copies = [line for line in text.splitlines() if " copy(" in line]
    assert not [line for line in copies if any(name in line for name in large)]


@pytest.mark.skipif(jax.device_count() < 2, reason="needs several GPUs")
@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor"])
@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_several_devices_train_as_one(mixer, axis):
    """Every device runs the kernels on its own rows; gradients are those of one."""
    with jax.default_matmul_precision("highest"):
        meshes.check_mesh(
            mixer, **({"data": 1, "fsdp": 1, "tensor": 1} | {axis: jax.device_count()})
        )
