"""The selective scan's GPU kernel: lowering without a GPU, refusals, real shapes on one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.selective_scan import chunked, pallas_triton, selective_scan, shapes

H200_MULTIPROCESSORS = 132
ONE_WARP = shapes.Shape(1, 130, 40, 16, 1, 5)


def abstract_inputs(shape, dtype, *, options=True):
    b, length, e, n = shape[:4]
    float32 = jnp.float32
    sizes = {
        "x": ((b, length, e), dtype),
        "dt": ((b, length, e), dtype),
        "A": ((e, n), float32),
        "B": ((b, length, shape.B_groups, n), dtype),
        "C": ((b, length, shape.C_groups, n), dtype),
    }
    if options:
        sizes |= {
            "D": ((e,), float32),
            "z": ((b, length, e), dtype),
            "dt_bias": ((e,), float32),
            "initial_state": ((b, e, n), float32),
        }
    return {k: jax.ShapeDtypeStruct(*v) for k, v in sizes.items()}


def scan(inputs, ids=None, every=64):
    absent = dict.fromkeys(("D", "z", "dt_bias", "initial_state"))
    return pallas_triton.scan(
        **(absent | inputs), segment_ids=ids, checkpoint_every=every, interpret=False
    )


def gradients(inputs, ids=None, every=64):
    def loss(inputs):
        y, h = scan(inputs, ids, every)
        return jnp.sum(y.astype(jnp.float32)) + jnp.sum(h)

    return jax.grad(loss)(inputs)


@pytest.mark.parametrize("name", ["paper_8b", "mamba_2_8b"])
def test_lowers_for_cuda_without_a_gpu(name, lower_for_cuda):
    inputs = abstract_inputs(shapes.LARGE[name], jnp.bfloat16)
    text = lower_for_cuda(gradients, inputs)
    assert text.count("__gpu$xla.gpu.triton") == 2
    assert "selective_scan_forward_kernel" in text
    assert "selective_scan_backward_kernel" in text


@pytest.mark.parametrize(
    ("every", "kept"),
    [(64, "1x2x64x16xf32"), (4, "1x32x64x16xbf16"), (2, "1x64x64x16xbf16")],
)
def test_lowers_with_kept_states(every, kept, lower_for_cuda):
    """One state for every so many steps, in bfloat16 where the walk back starts there."""
    inputs = abstract_inputs(shapes.Shape(1, 128, 64, 16, 1, 4), jnp.bfloat16)
    text = lower_for_cuda(functools.partial(gradients, every=every), inputs)
    assert f"tensor<{kept}>" in text
    assert "selective_scan_backward_kernel" in text
    # The states of a first walk, in pairs of bfloat16.
    assert ("x4xi32" in text) == (every == 64)


def test_other_calls_keep_every_64th_state(lower_for_cuda):
    inputs = abstract_inputs(shapes.Shape(1, 128, 64, 16, 1, 4), jnp.float32)
    text = lower_for_cuda(functools.partial(gradients, every=2), inputs)
    assert "tensor<1x2x64x16xf32>" in text


def test_lowers_packed_ragged_and_float32(lower_for_cuda):
    inputs = abstract_inputs(ONE_WARP, jnp.float32, options=False)
    ids = jax.ShapeDtypeStruct((1, 130), jnp.int32)
    assert "selective_scan_backward_kernel" in lower_for_cuda(gradients, inputs, ids)


@pytest.mark.parametrize("groups", [3, 6])
def test_lowers_packed_ragged_tiles(groups, lower_for_cuda):
    """Tiles of 16 and of 8 channels, for lengths no multiple of their steps."""
    shape = shapes.Shape(1, 130, 48, 16, 1, groups)
    inputs = abstract_inputs(shape, jnp.bfloat16, options=False)
    ids = jax.ShapeDtypeStruct((1, 130), jnp.int32)
    text = lower_for_cuda(scan, inputs, ids)
    assert text.count("__gpu$xla.gpu.triton") == 1


def test_one_long_row_fills_the_gpu(lower_for_cuda):
    """It is cut in time: several programs, in two passes each way.

    A program of 16 warps has a multiprocessor to itself. One more chunk would be more
    programs than the 132 of an H200 and so a second round, for which all others wait.
    """
    inputs = abstract_inputs(shapes.LARGE["paper_8b_32k"], jnp.bfloat16)
    text = lower_for_cuda(gradients, inputs)
    for kernel in ("local_state", "forward", "local_adjoint", "backward"):
        assert f"selective_scan_{kernel}_kernel" in text
    programs = [int(count) for count in re.findall(r"grid_x = (\d+)", text)]
    assert len(programs) == 4
    assert 0.95 * H200_MULTIPROCESSORS <= min(programs)


def test_vmap_lowers(lower_for_cuda):
    inputs = {
        k: jax.ShapeDtypeStruct((2, 3, *v.shape), v.dtype)
        for k, v in abstract_inputs(ONE_WARP, jnp.bfloat16, options=False).items()
    }
    text = lower_for_cuda(jax.vmap(jax.vmap(scan)), inputs)
    assert text.count("__gpu$xla.gpu.triton") == 1


def test_chunks_fill_the_gpu():
    length = pallas_triton._chunk_length
    full = pallas_triton.ENOUGH_WARPS
    assert length(2048, full) == 2048
    assert length(2000, full // 2) == 2048
    for programs in (8, 40, 128, 200):
        chunk = length(32768, programs)
        assert chunk % pallas_triton.kernels.BLOCK == 0
        assert full / 2 <= programs * -(-32768 // chunk) <= 2 * full


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there it runs")
def test_refuses_without_a_gpu():
    inputs = {
        k: jnp.zeros(v.shape, v.dtype)
        for k, v in abstract_inputs(ONE_WARP, jnp.float32).items()
    }
    with pytest.raises(NotImplementedError, match="needs a CUDA GPU, not cpu"):
        selective_scan(**inputs, implementation="pallas_triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (1, 7, 4), "dtype": jnp.float64}, "x is float64"),
        ({"A": (4, 64)}, "64 states a channel, more than 32"),
    ],
)
def test_refuses_what_it_does_not_compute(change, message):
    dtype = change.pop("dtype", jnp.float32)
    n = change.get("A", (4, 16))[1]
    sizes = {"x": (1, 7, 4), "dt": (1, 7, 4), "A": (4, n)}
    sizes |= {"B": (1, 7, 1, n), "C": (1, 7, 1, n)}
    inputs = {k: jax.ShapeDtypeStruct(v, dtype) for k, v in sizes.items()}
    absent = dict.fromkeys(("D", "z", "dt_bias", "initial_state", "segment_ids"))
    with pytest.raises(dispatch.UnsupportedError, match=message):
        pallas_triton.selective_scan(**inputs, **absent, interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", shapes.LARGE)
def test_real_shapes_on_a_gpu(name, make_segments, assert_tree_close):
    """bfloat16, against the chunked implementation on the same values in float32."""
    shape = shapes.LARGE[name]._replace(batch=1)
    rng = np.random.default_rng(0)

    def draw(spec):
        return jnp.asarray(rng.standard_normal(spec.shape), spec.dtype)

    inputs = jax.tree.map(draw, abstract_inputs(shape, jnp.bfloat16))
    inputs["A"] = -jnp.exp(inputs["A"])
    ids = make_segments(rng, shape.batch, shape.length, shape.segments)

    @functools.partial(jax.jit, static_argnums=0)
    def pull_back(function, inputs, cotangents):
        outputs, vjp = jax.vjp(lambda i: function(**i, segment_ids=ids), inputs)
        return outputs, vjp(cotangents)[0]

    wide = jax.tree.map(lambda v: v.astype(jnp.float32), inputs)
    y = draw(inputs["x"])
    h = jnp.asarray(rng.standard_normal(inputs["initial_state"].shape), jnp.float32)
    scan = functools.partial(
        pallas_triton.selective_scan, checkpoint_every=shape.checkpoint_every
    )
    found = pull_back(scan, inputs, (y, h))
    expected = pull_back(chunked.selective_scan, wide, (y.astype(jnp.float32), h))
    assert_tree_close(found, expected, 1e-2)
