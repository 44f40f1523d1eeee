"""Attention to a cache lowers for CUDA without a GPU, at true sizes; on one it runs."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import bench_cases
from pallas_kernels.cached_attention import (
    api,
    cached_attention,
    rotate_and_append,
    shapes,
)


def abstract_inputs(name):
    case = bench_cases.cached_attention_case(name)
    return case, jax.eval_shape(case.make, jax.random.key(0))


@pytest.mark.parametrize("name", shapes.LARGE)
def test_lowers_to_one_kernel_and_a_merge(name, lower_for_cuda):
    case, inputs = abstract_inputs(name)
    text = lower_for_cuda(
        functools.partial(case.call, implementation="pallas_triton"), inputs
    )
    kernels = 1 if name == "llama3_8b_chunk" else 2
    assert text.count("__gpu$xla.gpu.triton") == kernels


# Tokens, heads, kv heads, width, window.
SIZES = [
    (1, 32, 8, 128, None),
    (5, 32, 8, 128, 300),
    (17, 32, 8, 64, None),
    (1, 12, 12, 64, None),
    (17, 8, 1, 128, None),
    (300, 32, 8, 128, None),
    (300, 8, 8, 64, 400),
]


@pytest.mark.parametrize("size", SIZES)
def test_sizes_lower(size, lower_for_cuda):
    tokens, heads, groups, width, window = size
    q = jax.ShapeDtypeStruct((3, tokens, heads, width), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((3, 1100, groups, width), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((3,), jnp.int32)
    attention = functools.partial(
        cached_attention, sliding_window=window, implementation="pallas_triton"
    )
    assert "__gpu$xla.gpu.triton" in lower_for_cuda(attention, q, k, k, lengths)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("implementation", list(api.IMPLEMENTATIONS)[:-1])
@pytest.mark.parametrize("size", SIZES)
def test_compiled_matches_the_reference(size, implementation, dtype, assert_close):
    tokens, heads, groups, width, window = size
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(3, tokens, heads, width), *[(3, 1100, groups, width)] * 2]
    inputs = [
        jax.random.normal(key, shape, dtype)
        for key, shape in zip(keys, shapes, strict=True)
    ]
    # An empty row, one in between, a full one.
    lengths = jnp.array([0, 517, 1100 - tokens], jnp.int32)
    attention = functools.partial(cached_attention, sliding_window=window)
    exact = [v.astype(jnp.float32) for v in inputs]
    with jax.default_matmul_precision("highest"):
        expected = attention(*exact, lengths, implementation="reference")
        try:
            y = jax.jit(functools.partial(attention, implementation=implementation))(
                *inputs, lengths
            )
        except NotImplementedError as reason:
            pytest.skip(str(reason))
    bound = 1e-2 if dtype == "bfloat16" else 1e-5
    for row in range(3):
        assert_close(y[row].astype(jnp.float32), expected[row], bound)


def append_inputs(batch, tokens, heads, groups, width):
    kept = jax.ShapeDtypeStruct((batch, 1280, groups, width), jnp.bfloat16)
    columns = (heads + 2 * groups) * width
    return {
        "qkv": jax.ShapeDtypeStruct((batch, tokens, columns), jnp.bfloat16),
        "k": kept,
        "v": kept,
        "lengths": jax.ShapeDtypeStruct((batch,), jnp.int32),
        "frequencies": jax.ShapeDtypeStruct((width // 2,), jnp.float32),
    }


APPENDS = [(1, 5, 32, 8, 128), (64, 1, 32, 8, 128), (2, 300, 12, 12, 64)]


@pytest.mark.parametrize("size", APPENDS)
def test_append_lowers_to_one_kernel(size, lower_for_cuda):
    append = functools.partial(rotate_and_append, implementation="pallas_triton")
    text = lower_for_cuda(lambda inputs: append(**inputs), append_inputs(*size))
    assert text.count("__gpu$xla.gpu.triton") == 1


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("size", APPENDS)
def test_compiled_append_matches_the_reference(size, assert_tree_close):
    leaves, tree = jax.tree.flatten(append_inputs(*size))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    inputs = tree.unflatten(
        [
            jnp.arange(v.shape[0], dtype=v.dtype) * 9
            if v.dtype == jnp.int32
            else jax.random.normal(k, v.shape, v.dtype)
            for k, v in zip(keys, leaves, strict=True)
        ]
    )
    found, expected = (
        jax.jit(functools.partial(rotate_and_append, implementation=name))(**inputs)
        for name in ("pallas_triton", "reference")
    )
    assert_tree_close(found, expected, 1e-2)
