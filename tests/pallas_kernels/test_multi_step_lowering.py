"""MultiStep's kernels lower for CUDA without a GPU, at true sizes; on one they run."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import bench_cases
from pallas_kernels.multi_step import Columns, conv_multi_step

# One pending token and one new, drafts to verify, and the largest batch.
SELECTIVE = ("mamba_2_8b_k1", "mamba_2_8b_k8", "paper_8b_k4")
SSD = ("ssd_paper_8b_k4",)


def abstract_inputs(name):
    case = bench_cases.multi_step_case(name)
    return case, jax.eval_shape(case.make, jax.random.key(0))


@pytest.mark.parametrize("name", [*SELECTIVE, *SSD])
def test_lowers_to_one_kernel(name, lower_for_cuda):
    case, inputs = abstract_inputs(name)
    text = lower_for_cuda(
        functools.partial(case.call, implementation="pallas_triton"), inputs
    )
    assert text.count("__gpu$xla.gpu.triton") == 1


def in_columns(inputs):
    """The inputs as a fused product and a model's weights hold them."""
    wide = {"A": jnp.log(-inputs["A"]), "A_is_log": True}
    for names in (("old_dt", "old_B"), ("z", "B", "C", "dt")):
        names = [name for name in names if name in inputs]
        flat = [inputs[n].reshape(*inputs[n].shape[:2], -1) for n in names]
        starts = [sum(v.shape[2] for v in flat[:i]) for i in range(len(flat))]
        whole = jnp.concatenate(flat, axis=-1)
        for name, start in zip(names, starts, strict=True):
            wide[name] = Columns(whole, start, inputs[name].shape[2:])
    return inputs | wide


@pytest.mark.parametrize("name", ["paper_8b_k4", "ssd_paper_8b_k4"])
def test_lowers_with_columns(name, lower_for_cuda):
    case, inputs = abstract_inputs(name)
    text = lower_for_cuda(lambda i: case.call(in_columns(i), "pallas_triton"), inputs)
    assert text.count("__gpu$xla.gpu.triton") == 1


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("name", ["paper_8b_k4", "ssd_paper_8b_k4"])
def test_compiled_columns_match_arrays(name, tokens, assert_tree_close):
    case = bench_cases.multi_step_case(name)
    inputs = case.make(jax.random.key(1))
    for key in ("old_x", "old_dt", "old_B", "x", "dt", "B", "C", "z"):
        if key in inputs:
            inputs[key] = inputs[key][:, :tokens]
    inputs["num_pending"] = jnp.full_like(inputs["num_pending"], tokens)
    found = jax.jit(lambda i: case.call(in_columns(i), "pallas_triton"))(inputs)
    expected = jax.jit(lambda i: case.call(i, "reference"))(inputs)
    assert_tree_close(found, expected, 1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("batch", [1, 64])
def test_compiled_conv_in_parts(batch, assert_tree_close):
    splits = (1024, 1024, 4096)
    specs = conv_inputs(batch, 3, 6144, 6144)
    keys = jax.random.split(jax.random.key(0), len(specs))
    inputs = {
        name: jnp.full(v.shape, 2, v.dtype)
        if v.dtype == jnp.int32
        else jax.random.normal(key, v.shape, v.dtype)
        for key, (name, v) in zip(keys, specs.items(), strict=True)
    }
    noise = jnp.ones((batch, 3, 32), jnp.bfloat16)
    wide = {
        name: Columns(
            jnp.concatenate([inputs[name], noise], axis=-1), 0, inputs[name].shape[2:]
        )
        for name in ("x", "pending")
    }
    step = functools.partial(conv_multi_step, splits=splits)
    found = jax.jit(functools.partial(step, implementation="pallas_triton"))(
        **(inputs | wide)
    )
    expected = jax.jit(functools.partial(step, implementation="reference"))(**inputs)
    assert_tree_close(found, expected, 1e-2)


@pytest.mark.parametrize("name", ["mamba_2_8b_k1", "ssd_paper_8b_k4"])
def test_lowers_with_rows_left_out(name, lower_for_cuda):
    case, inputs = abstract_inputs(name)
    inputs["is_active"] = jax.ShapeDtypeStruct(inputs["num_pending"].shape, bool)

    def call(inputs):
        return case.call(inputs | {"commit": False}, "pallas_triton")

    assert lower_for_cuda(call, inputs).count("__gpu$xla.gpu.triton") == 1


def conv_inputs(batch, tokens, channels, outputs):
    bf16, f32 = jnp.bfloat16, jnp.float32
    return {
        "window": jax.ShapeDtypeStruct((batch, 3, channels), bf16),
        "pending": jax.ShapeDtypeStruct((batch, tokens, channels), bf16),
        "num_pending": jax.ShapeDtypeStruct((batch,), jnp.int32),
        "x": jax.ShapeDtypeStruct((batch, tokens, channels), bf16),
        "kernel": jax.ShapeDtypeStruct((4, outputs), f32),
        "bias": jax.ShapeDtypeStruct((outputs,), f32),
    }


# Mamba with its groups repeated, Mamba-2, pure Mamba.
CONV = [(1, 5, 1024, 4096, 16), (8, 9, 6144, 6144, None), (1, 1, 5120, 5120, None)]


@pytest.mark.parametrize("size", CONV)
def test_conv_lowers_to_one_kernel(size, lower_for_cuda):
    *size, group = size
    step = functools.partial(
        conv_multi_step, group=group, implementation="pallas_triton"
    )
    text = lower_for_cuda(lambda inputs: step(**inputs), conv_inputs(*size))
    assert text.count("__gpu$xla.gpu.triton") == 1


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("size", CONV)
def test_compiled_conv_matches_the_reference(size, assert_tree_close):
    *size, group = size
    leaves, tree = jax.tree.flatten(conv_inputs(*size))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    inputs = tree.unflatten(
        [
            jnp.ones(v.shape, v.dtype)
            if v.dtype == jnp.int32
            else jax.random.normal(k, v.shape, v.dtype)
            for k, v in zip(keys, leaves, strict=True)
        ]
    )
    found, expected = (
        jax.jit(functools.partial(conv_multi_step, group=group, implementation=name))(
            **inputs
        )
        for name in ("pallas_triton", "reference")
    )
    assert_tree_close(found, expected, 1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", [*SELECTIVE, *SSD])
def test_compiled_kernel_matches_the_reference(name, dtype, assert_tree_close):
    case = bench_cases.multi_step_case(name)
    inputs = case.make(jax.random.key(1))
    slots = inputs["old_x"].shape[1]
    low = {
        k: v.astype(dtype) if v.dtype == jnp.bfloat16 else v for k, v in inputs.items()
    }
    exact = {
        k: v.astype(jnp.float32) if v.dtype == jnp.bfloat16 else v
        for k, v in low.items()
    }
    found = jax.jit(functools.partial(case.call, implementation="pallas_triton"))
    expected = jax.jit(functools.partial(case.call, implementation="reference"))
    bound = 1e-2 if dtype == "bfloat16" else 1e-5
    for count in range(slots + 1):
        counts = {"num_pending": jnp.full_like(inputs["num_pending"], count)}
        with jax.default_matmul_precision("highest"):
            wanted = expected(exact | counts)
        assert_tree_close(found(low | counts), wanted, bound)
