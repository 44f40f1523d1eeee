"""SSD's kernels for CUDA GPUs lower without one, and decline what they cannot run."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch
from pallas_kernels.ssd import pallas_triton, shapes, ssd

scan = functools.partial(ssd, implementation="pallas_triton")


def arguments(shape, dtype=jnp.bfloat16, *, options=True):
    """Shapes of the inputs by name."""
    b, length, k, h, p, n = shape[:6]
    array, f32 = jax.ShapeDtypeStruct, jnp.float32
    inputs = {
        "x": array((b, length, k, p), dtype),
        "dt": array((b, length, h), dtype),
        "A": array((h,), f32),
        "B": array((b, length, k, n), dtype),
        "C": array((b, length, h, n), dtype),
    }
    if options:
        inputs |= {"D": array((h,), f32), "dt_bias": array((h,), f32)}
        inputs |= {"initial_state": array((b, h, n, p), f32)}
    return inputs


def pull_back(inputs, segment_ids):
    outputs, vjp = jax.vjp(lambda i: scan(**i, segment_ids=segment_ids), inputs)
    return outputs, vjp(outputs)


# With the number of kernels of a forward and a backward pass.
CASES = {
    "paper_8b": (shapes.LARGE["paper_8b"], jnp.bfloat16, 7),
    "paper_8b_32k": (shapes.LARGE["paper_8b_32k"], jnp.bfloat16, 9),
    "odd_sizes": (shapes.SMALL["gqa_packed"], jnp.float32, 7),
}


@pytest.mark.parametrize("name", CASES)
def test_lowers_for_cuda(name, lower_for_cuda):
    shape, dtype, both = CASES[name]
    inputs = arguments(shape, dtype, options=name != "paper_8b_32k")
    if name == "paper_8b":
        text = lower_for_cuda(lambda i: scan(**i), inputs)
        assert text.count("xla.gpu.triton") == 2
    ids = jax.ShapeDtypeStruct(shape[:2], jnp.int32)
    text = lower_for_cuda(pull_back, inputs, ids)
    assert text.count("xla.gpu.triton") == both
    if name == "paper_8b_32k":
        # One row alone is cut in time: no multiprocessor of an H200 is without work.
        grids = re.findall(r"grid_x = (\d+) : i32, grid_y = (\d+)", text)
        assert len(grids) == both
        assert min(int(x) * int(y) for x, y in grids) >= 132


@pytest.mark.parametrize("change", ["platform", "x", "width"])
def test_declines_what_it_cannot_run(change, monkeypatch):
    inputs = arguments(shapes.SMALL["batch_1"])
    if change != "platform":
        monkeypatch.setattr(pallas_triton, "INTERPRET", True)
    elif jax.default_backend() == "gpu":
        pytest.skip("this is a GPU")
    if change == "x":
        inputs["x"] = jax.ShapeDtypeStruct(inputs["x"].shape, jnp.int32)
    if change == "width":
        inputs = arguments((1, 7, 3, 3, 256, 16))
    with pytest.raises(dispatch.UnsupportedError):
        jax.eval_shape(lambda i: scan(**i), inputs)
    if change != "x":
        jax.eval_shape(lambda i: ssd(**i), inputs)
