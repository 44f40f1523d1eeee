"""Products of a few tokens as one Triton kernel, for CUDA GPUs.

Reading the weights takes all the time there is in a large product, and starting a kernel
most of it in a small one: so the norm before and the sum after the product are part of it.

A warp owns some outputs. Its lanes go along their weights side by side, 16 bytes at a time,
and multiply them with every token without tensor cores, which have rows to spare here. All
tiles have one shape, so that no value ever changes its thread; the lanes' sums meet once,
at the end. The norm's factor belongs to a token and is applied to the sums, by when each
warp has seen the whole token.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import gpu
from pallas_kernels.dispatch import UnsupportedError

# Above, multiplying without tensor cores takes longer than reading.
MAX_TOKENS = 2
# Where both sides are this large, reading takes so long that starting does not count: the
# compiler's own product is faster.
LARGE_SIDE = 4096
# Warps that keep the memory of a large GPU busy.
BUSY_WARPS = 2048
# Outputs of a warp, at most.
MAX_COLUMNS = 4
LANES, LOAD_BYTES = 32, 16
# Fewest weights that lie side by side in a tile.
MIN_DEPTH = 32
# Loads that a thread issues before it uses the first, 4 registers each.
LOADS = 12


class Blocks(NamedTuple):
    """How the work is cut.

    Attributes:
        columns: Outputs of a warp.
        warps: Of a program.
        split: How many of them share the same outputs.
        unroll: Tiles along the weights that are loaded at once.
    """

    columns: int
    warps: int
    split: int
    unroll: int


def is_large(outputs: int, width: int) -> bool:
    """Whether a product is left to the compiler."""
    return min(outputs, width) >= LARGE_SIDE


def narrow_product(x, kernel, *, scale, residual, eps, blocks=None):
    """Returns the output; see `api.narrow_product` for the arguments.

    `blocks` are chosen by size if None.
    """
    gpu.check_platform()
    batch, length, width = x.shape
    tokens, outputs = batch * length, kernel.shape[0]
    _check(x, kernel, tokens)
    if blocks is None:
        blocks = _blocks(kernel)
    inputs = {"x": x.reshape(tokens, width), "kernel": kernel}
    if scale is not None:
        inputs["scale"] = scale
    if residual is not None:
        inputs["residual"] = residual.reshape(tokens, outputs)
    out = pl.pallas_call(
        functools.partial(_kernel, names=(*inputs, "out"), blocks=blocks, eps=eps),
        grid=(pl.cdiv(outputs, blocks.columns * blocks.warps // blocks.split),),
        out_shape=jax.ShapeDtypeStruct((tokens, outputs), x.dtype),
        compiler_params=plt.CompilerParams(num_warps=blocks.warps, num_stages=1),
        interpret=gpu.INTERPRET,
        name="narrow_product",
    )(*inputs.values())
    return out.reshape(batch, length, outputs)


def _check(x, kernel, tokens):
    if tokens > MAX_TOKENS:
        raise UnsupportedError(f"{tokens} tokens are more than {MAX_TOKENS}")
    if is_large(*kernel.shape):
        raise UnsupportedError(f"both sides are {LARGE_SIDE} or more")
    for dtype in (x.dtype, kernel.dtype):
        if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise UnsupportedError(f"products of {dtype}")
    if _divisor(kernel.shape[1]) < MIN_DEPTH:
        raise UnsupportedError(
            f"a width of {kernel.shape[1]} is no multiple of {MIN_DEPTH}"
        )


def _divisor(size: int) -> int:
    """The largest power of two that divides a size."""
    return size & -size


def _vector(kernel) -> int:
    """Weights that a thread loads at once."""
    return LOAD_BYTES // kernel.dtype.itemsize


def _depth(kernel, split: int) -> int:
    """Weights of an output that a tile holds."""
    return min(split * LANES * _vector(kernel), _divisor(kernel.shape[1]))


def _blocks(kernel) -> Blocks:
    """The blocks for a size.

    Where there are outputs enough for all warps, a warp takes several, so that it loads
    and scales a token for all of them; where there are too few, warps share one.
    """
    outputs, width = kernel.shape
    columns, split, warps = 1, 1, 4
    while columns < MAX_COLUMNS and outputs // (2 * columns) >= BUSY_WARPS:
        columns *= 2
    while split < warps and outputs * split * 2 <= BUSY_WARPS:
        if width % (2 * split * LANES * _vector(kernel)):
            break
        split *= 2
    tiles = width // _depth(kernel, split)
    loads = max(1, LOADS // columns)
    unroll = max(n for n in range(1, loads + 1) if tiles % n == 0)
    return Blocks(columns, warps, split, unroll)


class _Tile:
    """The shape of a program's tiles, [lanes, groups, vector], and of their sums."""

    def __init__(self, lanes, groups, vector):
        self.shape = (lanes, groups, vector)
        self.sums = self.shape[:2]
        self.lane = self._along(lanes, 0)
        self.group = self._along(groups, 1)

    def _along(self, count, axis):
        return self.spread(jnp.arange(count, dtype=jnp.int32), axis)

    def spread(self, value, axis):
        """One value per lane or group, for each of the sums."""
        return jax.lax.broadcast_in_dim(value, self.sums, (axis,))

    def deep(self, value):
        """One value per sum, for each of the tile."""
        return jax.lax.broadcast_in_dim(value, self.shape, (0, 1))

    def along(self, first):
        """Where a tile's values lie along the weights of an output."""
        vector = self.shape[2]
        step = jnp.arange(vector, dtype=jnp.int32)
        step = jax.lax.broadcast_in_dim(step, self.shape, (2,))
        return self.deep(first + self.lane * vector) + step

    def total(self, value):
        """The sum over all lanes, for each of them."""
        return self.spread(jnp.sum(value, axis=0), 1)


def _kernel(*refs, names, blocks, eps):
    refs = dict(zip(names, refs, strict=True))
    tokens, width = refs["x"].shape
    outputs, vector = refs["out"].shape[1], _vector(refs["kernel"])
    depth, columns = _depth(refs["kernel"], blocks.split), blocks.columns
    tile = _Tile(depth // vector, blocks.warps // blocks.split, vector)
    first = (pl.program_id(0) * tile.shape[1] + tile.group) * columns
    # Warps beyond the last output compute it again, and write nothing.
    own = [tile.deep(jnp.minimum(first + j, outputs - 1)) for j in range(columns)]

    def body(i, carry):
        sums, squares = map(list, carry)
        start = i * (blocks.unroll * depth)
        ks = [tile.along(start + u * depth) for u in range(blocks.unroll)]
        # Volatile, or they are moved to where they are used, and waited for one by one.
        weights = [
            [plt.load(refs["kernel"].at[o, k], volatile=True) for o in own] for k in ks
        ]
        for k, of_tile in zip(ks, weights, strict=True):
            xs = [
                plt.load(refs["x"].at[jnp.full(tile.shape, t, jnp.int32), k])
                for t in range(tokens)
            ]
            xs = [x.astype(jnp.float32) for x in xs]
            if "scale" in refs:
                scale = plt.load(refs["scale"].at[k]).astype(jnp.float32)
                squares = [
                    s + jnp.sum(x * x, axis=2) for s, x in zip(squares, xs, strict=True)
                ]
                xs = [x * scale for x in xs]
            pairs = [(x, w.astype(jnp.float32)) for x in xs for w in of_tile]
            sums = [
                s + jnp.sum(x * w, axis=2)
                for s, (x, w) in zip(sums, pairs, strict=True)
            ]
        return sums, squares

    zeros = jnp.zeros(tile.sums, jnp.float32)
    init = ([zeros] * (tokens * columns), [zeros] * (tokens * ("scale" in refs)))
    steps = width // (depth * blocks.unroll)
    if steps == 1:
        sums, squares = body(0, init)
    else:
        sums, squares = jax.lax.fori_loop(0, steps, body, init)
    sums = [tile.total(s) for s in sums]
    if squares:
        means = [tile.total(s) * (1.0 / width) for s in squares]
        factors = [jax.lax.rsqrt(mean + eps) for mean in means]
        sums = [s * factors[i // columns] for i, s in enumerate(sums)]
    for start in range(0, len(sums), tile.shape[0]):
        _store(refs, tile, sums, start, first, columns)


def _store(refs, tile, sums, start, first, columns):
    """Writes sums from `start` on, each by its own lane, in one instruction."""
    tokens, outputs = refs["out"].shape
    place = start + tile.lane
    value = jnp.zeros(tile.sums, jnp.float32)
    for i in range(start, min(start + tile.shape[0], len(sums))):
        value = jnp.where(place == i, sums[i], value)
    token, output = place // columns, first + place % columns
    mask, at = (token < tokens) & (output < outputs), (token, output)
    dtype = refs["out"].dtype
    if "residual" in refs:
        residual = plt.load(refs["residual"].at[at], mask=mask, other=0.0)
        value = value.astype(dtype).astype(jnp.float32) + residual.astype(jnp.float32)
    plt.store(refs["out"].at[at], value.astype(dtype), mask=mask)
