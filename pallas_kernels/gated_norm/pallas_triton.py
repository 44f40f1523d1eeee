"""The gated norm and its gradients as Triton kernels, for CUDA GPUs.

A group's channels lie side by side and its statistic needs nothing else, so a program owns
whole groups of a token: every value is read once and written once. In the backward pass a
program stays with its groups and walks over tokens, summing the gradient of the scale in
registers.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import gpu
from pallas_kernels.dispatch import UnsupportedError


class Blocks(NamedTuple):
    """How the work is cut: values of a tile, warps, tokens a program, loaded at once."""

    values: int
    warps: int
    tokens: int
    steps: int


FORWARD = Blocks(values=1024, warps=4, tokens=1, steps=1)
BACKWARD = Blocks(values=512, warps=4, tokens=16, steps=4)
MAX_WIDTH = 1024


def gated_norm(y, z, scale, *, groups, eps):
    """Returns the output; see `api.gated_norm` for the arguments."""
    gpu.check_platform()
    width = y.shape[2] // groups
    if width & (width - 1) or not 1 < width <= MAX_WIDTH:
        raise UnsupportedError(
            f"groups of {width} channels; it takes powers of two up to {MAX_WIDTH}"
        )
    return _gated_norm(groups, eps, y, z, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gated_norm(groups, eps, y, z, scale):
    [out] = _call(_forward_kernel, FORWARD, groups, eps, y, z, scale)
    return out.reshape(y.shape)


def _forward(groups, eps, y, z, scale):
    return _gated_norm(groups, eps, y, z, scale), (y, z, scale)


def _backward(groups, eps, inputs, dout):
    y, z, scale = inputs
    dy, dz, dscale = _call(_backward_kernel, BACKWARD, groups, eps, y, z, scale, dout)
    dscale = jnp.sum(dscale, axis=0).reshape(scale.shape).astype(scale.dtype)
    return dy.reshape(y.shape), dz.reshape(z.shape), dscale


_gated_norm.defvjp(_forward, _backward)


def _call(kernel, blocks, groups, eps, y, z, scale, *dout):
    tokens, width = y.shape[0] * y.shape[1], y.shape[2] // groups
    rows = max(1, blocks.values // width)
    while rows > 1 and rows // 2 >= groups:
        rows //= 2
    chunks = pl.cdiv(tokens, blocks.tokens)
    split = (tokens, groups, width)
    outputs = [jax.ShapeDtypeStruct(split, y.dtype)]
    if dout:
        outputs += [
            jax.ShapeDtypeStruct(split, z.dtype),
            jax.ShapeDtypeStruct((chunks, groups, width), jnp.float32),
        ]
    return pl.pallas_call(
        functools.partial(kernel, blocks=blocks, rows=rows, eps=eps),
        grid=(pl.cdiv(groups, rows), chunks),
        out_shape=outputs,
        compiler_params=plt.CompilerParams(num_warps=blocks.warps, num_stages=1),
        interpret=gpu.INTERPRET,
        name="gated_norm" + kernel.__name__.removesuffix("_kernel"),
    )(
        y.reshape(split),
        z.reshape(split),
        scale.reshape(groups, width),
        *(v.reshape(split) for v in dout),
    )


class _Tile:
    """A program's groups, and how it reads and writes them as [groups, channels]."""

    def __init__(self, shape, rows):
        self.tokens, groups, width = shape
        group = pl.program_id(0) * rows + jnp.arange(rows, dtype=jnp.int32)
        channel = jnp.arange(width, dtype=jnp.int32)
        self.group = jnp.broadcast_to(group[:, None], (rows, width))
        self.channel = jnp.broadcast_to(channel[None, :], (rows, width))
        self.inside = None if groups % rows == 0 else self.group < groups

    def load(self, ref, *index, where=None):
        """Float32 values; zeros outside and unless the scalar `where`."""
        mask = self._mask(where)
        ref = ref.at[(*index, self.group, self.channel)]
        other = None if mask is None else 0.0
        return plt.load(ref, mask=mask, other=other).astype(jnp.float32)

    def store(self, ref, *index, value, where=None):
        """Writes values inside, nothing unless the scalar `where`."""
        at = ref.at[(*index, self.group, self.channel)]
        plt.store(at, value.astype(ref.dtype), mask=self._mask(where))

    def _mask(self, where):
        if where is None:
            return self.inside
        where = jnp.broadcast_to(where, self.group.shape)
        return where if self.inside is None else where & self.inside


def _normalise(gated, eps):
    """The normalised value and the factor that made it."""
    width = gated.shape[1]
    mean_square = jnp.sum(gated * gated, axis=1, keepdims=True) * (1.0 / width)
    factor = jax.lax.rsqrt(mean_square + eps)
    return gated * factor, factor


def _forward_kernel(y_ref, z_ref, scale_ref, out_ref, *, blocks, rows, eps):
    tile = _Tile(y_ref.shape, rows)
    scale = tile.load(scale_ref)
    first = pl.program_id(1) * blocks.tokens
    is_even = tile.tokens % blocks.tokens == 0
    for u in range(blocks.tokens):
        t = first + u
        where = None if is_even else t < tile.tokens
        y, z = tile.load(y_ref, t, where=where), tile.load(z_ref, t, where=where)
        normed, _ = _normalise(y * z * gpu.sigmoid(z), eps)
        tile.store(out_ref, t, value=normed * scale, where=where)


def _backward_kernel(
    y_ref, z_ref, scale_ref, dout_ref, dy_ref, dz_ref, dscale_ref, *, blocks, rows, eps
):
    tile = _Tile(y_ref.shape, rows)
    scale = tile.load(scale_ref)
    first = pl.program_id(1) * blocks.tokens
    is_even = tile.tokens % blocks.tokens == 0

    def body(i, dscale):
        steps = [first + i * blocks.steps + u for u in range(blocks.steps)]
        wheres = [None if is_even else t < tile.tokens for t in steps]
        loaded = [
            [tile.load(ref, t, where=where) for ref in (y_ref, z_ref, dout_ref)]
            for t, where in zip(steps, wheres, strict=True)
        ]
        for (y, z, dout), t, where in zip(loaded, steps, wheres, strict=True):
            gate = gpu.sigmoid(z)
            opened = z * gate
            normed, factor = _normalise(y * opened, eps)
            dscale = dscale + dout * normed
            dnormed = dout * scale
            along = jnp.sum(dnormed * normed, axis=1, keepdims=True)
            dgated = factor * (dnormed - normed * (along * (1.0 / y.shape[1])))
            tile.store(dy_ref, t, value=dgated * opened, where=where)
            dz = dgated * y * (gate + opened * (1.0 - gate))
            tile.store(dz_ref, t, value=dz, where=where)
        return dscale

    zeros = jnp.zeros(scale.shape, jnp.float32)
    turns = blocks.tokens // blocks.steps
    dscale = jax.lax.fori_loop(0, turns, body, zeros)
    tile.store(dscale_ref, pl.program_id(1), value=dscale)
