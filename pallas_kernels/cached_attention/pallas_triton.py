"""Attention to a cache as Triton kernels, for CUDA GPUs (Ampere and Hopper).

Flash decoding: a program takes the queries of one kv head (all heads of its group and all
new tokens, as rows of one matrix) through a part of the slots, which it finds from
`lengths`; a second kernel merges the parts. What it costs therefore depends on the tokens
that are there, not on the size of the cache.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import gpu
from pallas_kernels.cached_attention.rotation import cos_and_sin, next_positions
from pallas_kernels.dispatch import UnsupportedError

# The smallest side of a matrix product, and the step in which slots are shared out.
MIN_DOT = 16
MAX_WIDTH = 256
# Below every score, but finite: what is subtracted from a row that has seen none.
LOWEST = -1e30
TINY = 1e-30
# Programs that keep a device of about a hundred multiprocessors busy.
PROGRAMS = 256
# Queries of a program from which on masks cost more than a second loop without them.
MANY_ROWS = 64


class Tiling(NamedTuple):
    """How the work is cut.

    Attributes:
      rows: Queries (heads of a group times tokens) of one program.
      slots: Slots that it multiplies at once.
      splits: Parts of a row's slots, each with programs of its own.
      num_warps: Warps of a program.
      num_stages: Blocks of slots that are loaded ahead, the present one included.
    """

    rows: int
    slots: int
    splits: int
    num_warps: int
    num_stages: int


def choose_tiling(q, k) -> Tiling:
    """Returns the cut for these shapes."""
    batch, tokens, heads, width = q.shape
    slots, groups = k.shape[1:3]
    queries = tokens * (heads // groups)
    # Float32 is multiplied without matrix units, from registers: small tiles.
    is_exact = k.dtype == jnp.float32
    rows, block = gpu.power_of_two(queries, MIN_DOT), 64
    if is_exact or rows > 128:
        rows = MIN_DOT if is_exact else 64
    elif slots <= 8192:
        block = 32
    # Blocks of slots that wait in shared memory are this many times the usual size.
    size = gpu.power_of_two(width, 128) * k.dtype.itemsize // 256
    # Parts small enough to fill the device, large enough to be worth a program; at least a
    # few where there are few queries, because rows of a batch differ in length.
    blocks = math.ceil(queries / rows)
    splits = max(4 if blocks == 1 else 1, PROGRAMS // (batch * groups * blocks))
    splits = max(1, min(splits, slots // 80))
    return Tiling(rows, max(MIN_DOT, block // size), splits, 4, 3)


def _tile(rows, columns):
    """Row and column numbers of a tile."""
    shape = (rows.shape[0], columns.shape[0])
    return (
        jnp.broadcast_to(rows[:, None], shape),
        jnp.broadcast_to(columns[None, :], shape),
    )


def _range(start, size: int):
    return start + jnp.arange(size, dtype=jnp.int32)


def _dot(a, b, b_axis):
    """A product with float32 sums; float32 inputs are multiplied in float32."""
    exact = a.dtype == jnp.float32
    return lax.dot_general(
        a,
        b,
        (((1,), (b_axis,)), ((), ())),
        precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _part_kernel(*refs, names, tiling, window):
    """The queries of one kv head over one part of the slots they see."""
    refs = dict(zip(names, refs, strict=True))
    _, tokens, heads, width = refs["q"].shape
    groups = refs["k"].shape[2]
    per_group = heads // groups
    # Heads of one slot lie side by side in memory: their programs run side by side.
    group, block = pl.program_id(0) % groups, pl.program_id(0) // groups
    part, b = pl.program_id(1), pl.program_id(2)
    row = _range(block * tiling.rows, tiling.rows)
    column = _range(0, gpu.power_of_two(width, MIN_DOT))
    i, p = _tile(row, column)
    inside = jnp.logical_and(i < tokens * per_group, p < width)
    at = (b, i // per_group, group * per_group + i % per_group, p)
    position = refs["lengths"][b] + row // per_group
    start, stop = _bounds(refs, b, block, part, tiling, window)
    q = plt.load(refs["q"].at[at], mask=inside, other=0.0)
    scale = width**-0.5 * gpu.LOG2_E

    def step(n, carry, is_whole):
        high, total, y = carry
        slot = start + _range(n * tiling.slots, tiling.slots)
        s, p = _tile(slot, column)
        mask = None if width == column.shape[0] else p < width
        if not is_whole:
            mask = s < stop if mask is None else jnp.logical_and(mask, s < stop)
        keys, values = (
            plt.load(
                refs[name].at[b, s, group, p],
                mask=mask,
                other=None if mask is None else 0.0,
            )
            for name in ("k", "v")
        )
        scores = _dot(q, keys, 1) * scale
        if not is_whole:
            ahead = position[:, None] - slot[None, :]
            seen = jnp.logical_and(ahead >= 0, (slot < stop)[None, :])
            if window is not None:
                seen = jnp.logical_and(seen, ahead < window)
            scores = jnp.where(seen, scores, -jnp.inf)
        new = jnp.maximum(high, jnp.max(scores, axis=1))
        weights = gpu.exp2(scores - new[:, None])
        shrink = gpu.exp2(high - new)
        y = y * shrink[:, None] + _dot(weights.astype(values.dtype), values, 0)
        return new, total * shrink + jnp.sum(weights, axis=1), y

    carry = (
        jnp.full(row.shape, LOWEST, jnp.float32),
        jnp.zeros(row.shape, jnp.float32),
        jnp.zeros(i.shape, jnp.float32),
    )
    whole = 0
    if tiling.rows >= MANY_ROWS and tiling.splits == 1 and window is None:
        # Slots that all the queries see, and the last ones, of which they see a part.
        common = refs["lengths"][b] + block * tiling.rows // per_group + 1
        whole = jnp.maximum(jnp.minimum(stop, common) - start, 0) // tiling.slots
        step_whole = functools.partial(step, is_whole=True)
        carry = lax.fori_loop(0, whole, step_whole, carry)
    blocks = pl.cdiv(stop - start, tiling.slots)
    step_rest = functools.partial(step, is_whole=False)
    high, total, y = lax.fori_loop(whole, blocks, step_rest, carry)
    total = jnp.maximum(total, TINY)
    y = y / total[:, None]
    if "y" in refs:
        plt.store(refs["y"].at[at], y.astype(refs["y"].dtype), mask=inside)
        return
    plt.store(refs["parts"].at[b, part, *at[1:]], y, mask=inside)
    weight = (b, part, row // per_group, group * per_group + row % per_group)
    value = high + jnp.log2(total)
    plt.store(refs["log_sums"].at[weight], value, mask=row < tokens * per_group)


def _bounds(refs, b, block, part, tiling, window):
    """First slot of a program and the one after its last."""
    _, tokens, heads, _ = refs["q"].shape
    per_group = heads // refs["k"].shape[2]
    length = refs["lengths"][b]
    # The first and, excluded, the last token of the program's queries.
    low = block * tiling.rows // per_group
    high = jnp.minimum(((block + 1) * tiling.rows - 1) // per_group + 1, tokens)
    stop = jnp.minimum(length + high, refs["k"].shape[1])
    start = jnp.int32(0)
    if window is not None:
        start = jnp.maximum(length + low - window + 1, 0)
    if tiling.splits == 1:
        return start, stop
    size = pl.cdiv(pl.cdiv(stop - start, tiling.splits), MIN_DOT) * MIN_DOT
    start = start + part * size
    return start, jnp.minimum(start + size, stop)


def _merge_kernel(parts_ref, log_sums_ref, y_ref, *, splits):
    """One query's parts: their mean, weighted by their sums of exponentials."""
    _, _, heads, width = y_ref.shape
    b, t, head = pl.program_id(1), pl.program_id(0) // heads, pl.program_id(0) % heads
    part = _range(0, gpu.power_of_two(splits))
    column = _range(0, gpu.power_of_two(width))
    i, p = _tile(part, column)
    inside = jnp.logical_and(i < splits, p < width)
    value = plt.load(
        log_sums_ref.at[b, part, t, head], mask=part < splits, other=LOWEST
    )
    y = plt.load(parts_ref.at[b, i, t, head, p], mask=inside, other=0.0)
    weight = gpu.exp2(value - jnp.max(value))
    y = jnp.sum(y * (weight / jnp.sum(weight))[:, None], axis=0)
    plt.store(y_ref.at[b, t, head, column], y.astype(y_ref.dtype), mask=column < width)


def cached_attention(q, k, v, lengths, *, sliding_window):
    """Returns the outputs; see `api.cached_attention` for the arguments."""
    gpu.check_platform()
    for dtype in {a.dtype for a in (q, k, v)}:
        if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise UnsupportedError(f"cached_attention does not take {dtype}")
    if q.shape[3] > MAX_WIDTH:
        raise UnsupportedError(f"heads of {q.shape[3]} are wider than {MAX_WIDTH}")
    return _call(choose_tiling(q, k), q, k, v, lengths, sliding_window)


def _call(tiling, q, k, v, lengths, sliding_window):
    i32, f32 = jnp.int32, jnp.float32
    batch, tokens, heads, width = q.shape
    inputs = {"q": q.astype(k.dtype), "k": k, "v": v, "lengths": lengths.astype(i32)}
    y = jax.ShapeDtypeStruct(q.shape, q.dtype)
    shape = (batch, tiling.splits, tokens, heads)
    outputs = {
        "parts": jax.ShapeDtypeStruct((*shape, width), f32),
        "log_sums": jax.ShapeDtypeStruct(shape, f32),
    }
    if tiling.splits == 1:
        outputs = {"y": y}
    queries = tokens * (heads // k.shape[2])
    blocks = math.ceil(queries / tiling.rows)
    kernel = functools.partial(
        _part_kernel, names=(*inputs, *outputs), tiling=tiling, window=sliding_window
    )
    found = pl.pallas_call(
        kernel,
        grid=(blocks * k.shape[2], tiling.splits, batch),
        out_shape=list(outputs.values()),
        compiler_params=plt.CompilerParams(
            num_warps=tiling.num_warps, num_stages=tiling.num_stages
        ),
        interpret=gpu.INTERPRET,
        name="cached_attention",
    )(*inputs.values())
    if tiling.splits == 1:
        return found[0]
    return pl.pallas_call(
        functools.partial(_merge_kernel, splits=tiling.splits),
        grid=(tokens * heads, batch),
        out_shape=y,
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=gpu.INTERPRET,
        name="cached_attention_merge",
    )(*found)


def _append_kernel(*refs, names, groups):
    """One token's heads of one kv head: queries and key turned, key and value written."""
    refs = dict(zip(names, refs, strict=True))
    b, t, group = pl.program_id(2), pl.program_id(1), pl.program_id(0)
    _, _, heads, width = refs["q"].shape
    slots = refs["new_k"].shape[1]
    per_group = heads // groups
    slot = refs["lengths"][b] + t
    half = _range(0, gpu.power_of_two(width // 2))
    inside = half < width // 2
    angle = (b, t, half)
    cos, sin = (
        plt.load(refs[name].at[angle], mask=inside, other=0.0)
        for name in ("cos", "sin")
    )

    def turned(head):
        first = head * width + half
        a, c = (
            plt.load(refs["qkv"].at[b, t, at], mask=inside, other=0.0)
            for at in (first, first + width // 2)
        )
        dtype, a, c = a.dtype, a.astype(jnp.float32), c.astype(jnp.float32)
        return (a * cos - c * sin).astype(dtype), (c * cos + a * sin).astype(dtype)

    def put(name, row, head, values, mask):
        for start, value in zip((0, width // 2), values, strict=True):
            ref = refs[name]
            at = ref.at[b, row, head, start + half]
            plt.store(at, value.astype(ref.dtype), mask=mask)

    for head in range(per_group):
        head = group * per_group + head
        put("q", t, head, turned(head), inside)
    written = jnp.logical_and(inside, slot < slots)
    put("new_k", slot, group, turned(heads + group), written)
    first = (heads + groups + group) * width + half
    value = [
        plt.load(refs["qkv"].at[b, t, at], mask=inside, other=0.0)
        for at in (first, first + width // 2)
    ]
    put("new_v", slot, group, value, written)


def rotate_and_append(qkv, k, v, lengths, frequencies):
    """Returns (q, k, v); see `api.rotate_and_append` for the arguments."""
    gpu.check_platform()
    for dtype in {a.dtype for a in (qkv, k, v)}:
        if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise UnsupportedError(f"rotate_and_append does not take {dtype}")
    batch, tokens, _ = qkv.shape
    groups, width = k.shape[2:]
    heads = qkv.shape[2] // width - 2 * groups
    # The same in every layer, so the compiler computes them once a step.
    cos, sin = cos_and_sin(next_positions(lengths, tokens), frequencies)
    inputs = {
        "k": k,
        "v": v,
        "qkv": qkv,
        "lengths": lengths.astype(jnp.int32),
        "cos": cos,
        "sin": sin,
    }
    outputs = {
        "new_k": jax.ShapeDtypeStruct(k.shape, k.dtype),
        "new_v": jax.ShapeDtypeStruct(v.shape, v.dtype),
        "q": jax.ShapeDtypeStruct((batch, tokens, heads, width), qkv.dtype),
    }
    new_k, new_v, q = pl.pallas_call(
        functools.partial(_append_kernel, names=(*inputs, *outputs), groups=groups),
        grid=(groups, tokens, batch),
        out_shape=list(outputs.values()),
        input_output_aliases={0: 0, 1: 1},
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=gpu.INTERPRET,
        name="rotate_and_append",
    )(*inputs.values())
    return q, new_k, new_v
