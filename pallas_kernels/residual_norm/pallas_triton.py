"""The residual sum, its norm and their gradients as Triton kernels, for CUDA GPUs.

A program owns whole tokens: it reads a row once, keeps it in registers for the statistic,
and writes what is asked of it. The backward kernel computes the statistic again, which
costs no traffic, and adds the gradient that the sum itself receives. Where the scale is
trained, a program walks over tokens and sums the scale's gradient in registers.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import gpu
from pallas_kernels.dispatch import UnsupportedError


class Blocks(NamedTuple):
    """How the work is cut.

    Attributes:
        rows: Tokens at once.
        warps: Of a program.
        turns: How often a program goes on to the next tokens.
    """

    rows: int
    warps: int
    turns: int = 1


FORWARD = Blocks(rows=2, warps=16)
BACKWARD = Blocks(rows=1, warps=16)
# With the gradient of the scale. Every program writes a row of sums, so there are only as
# many as two a multiprocessor of an H100 or H200.
BACKWARD_SCALE = Blocks(rows=1, warps=16)
PROGRAMS = 256
MAX_CHANNELS = 16384


def residual_norm(x, delta, scale, *, eps):
    """Returns (sum, norm); see `api.residual_norm` for the arguments."""
    gpu.check_platform()
    if x.shape[2] > MAX_CHANNELS:
        raise UnsupportedError(f"{x.shape[2]} channels are more than {MAX_CHANNELS}")
    return _residual_norm(eps, x, delta, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _residual_norm(eps, x, delta, scale):
    rows = _rows(x)
    inputs = {"x": rows, "scale": scale}
    outputs = {"out": jax.ShapeDtypeStruct(rows.shape, x.dtype)}
    if delta is not None:
        inputs["delta"] = _rows(delta)
        outputs["sum"] = jax.ShapeDtypeStruct(rows.shape, x.dtype)
    found = _call(_forward_kernel, FORWARD, eps, inputs, outputs)
    total = x if delta is None else found["sum"].reshape(x.shape)
    return total, found["out"].reshape(x.shape)


def _forward(eps, x, delta, scale):
    total, out = _residual_norm(
        eps, x.value, None if delta is None else delta.value, scale.value
    )
    # What is static has to be told by the tree's structure.
    has_delta = None if delta is None else ()
    is_trained = () if scale.perturbed else None
    return (total, out), (total, scale.value, has_delta, is_trained)


def _backward(eps, saved, cotangents):
    total, scale, has_delta, is_trained = saved
    inputs = {"x": _rows(total), "scale": scale}
    # There is no array of zeros for a result that nobody used.
    for name, cotangent in zip(("dsum", "dout"), cotangents, strict=True):
        if not isinstance(cotangent, SymbolicZero):
            inputs[name] = _rows(cotangent)
    like = inputs["x"]
    outputs = {"dx": jax.ShapeDtypeStruct(like.shape, total.dtype)}
    blocks = BACKWARD
    if is_trained is not None:
        tiles = pl.cdiv(like.shape[0], BACKWARD_SCALE.rows)
        blocks = BACKWARD_SCALE._replace(turns=pl.cdiv(tiles, PROGRAMS))
        programs = pl.cdiv(tiles, blocks.turns)
        partial = (programs, blocks.rows, like.shape[1])
        outputs["dscale"] = jax.ShapeDtypeStruct(partial, jnp.float32)
    found = _call(_backward_kernel, blocks, eps, inputs, outputs)
    dx, dscale = found["dx"].reshape(total.shape), None
    if is_trained is not None:
        dscale = jnp.sum(found["dscale"], axis=(0, 1)).astype(scale.dtype)
    return dx, None if has_delta is None else dx, dscale


_residual_norm.defvjp(_forward, _backward, symbolic_zeros=True)


def _rows(x):
    return x.reshape(-1, x.shape[2])


def _call(kernel, blocks, eps, inputs, outputs):
    tokens = blocks.rows * blocks.turns
    found = pl.pallas_call(
        functools.partial(kernel, names=(*inputs, *outputs), blocks=blocks, eps=eps),
        grid=(pl.cdiv(inputs["x"].shape[0], tokens),),
        out_shape=list(outputs.values()),
        compiler_params=plt.CompilerParams(num_warps=blocks.warps, num_stages=1),
        interpret=gpu.INTERPRET,
        name="residual_norm" + kernel.__name__.removesuffix("_kernel"),
    )(*inputs.values())
    return dict(zip(outputs, found, strict=True))


class _Tile:
    """A program's tokens, and how it reads and writes them as [tokens, channels]."""

    def __init__(self, refs, blocks):
        self.refs, self.blocks, self.program = refs, blocks, pl.program_id(0)
        self.tokens, self.channels = refs["x"].shape
        self.shape = (blocks.rows, pl.next_power_of_2(self.channels))
        channel = jnp.arange(self.shape[1], dtype=jnp.int32)
        self.channel = jnp.broadcast_to(channel[None, :], self.shape)

    def load(self, name, turn=0):
        """Values of `name`, zeros outside."""
        mask = self.inside(turn)
        other = None if mask is None else 0.0
        ref = self.refs[name].at[self._row(turn), self.channel]
        return plt.load(ref, mask=mask, other=other)

    def scale(self):
        """Float32 values of the scale, rounded as the norm is, for every token."""
        inside = self._channel_inside()
        other = None if inside is None else 0.0
        value = plt.load(self.refs["scale"].at[self.channel], mask=inside, other=other)
        return value.astype(self.refs["x"].dtype).astype(jnp.float32)

    def store(self, name, value, turn=0):
        """Writes values inside."""
        ref = self.refs[name]
        at = ref.at[self._row(turn), self.channel]
        plt.store(at, value.astype(ref.dtype), mask=self.inside(turn))

    def store_partial(self, name, value):
        """Writes the program's own sums over its turns."""
        row = jnp.arange(self.shape[0], dtype=jnp.int32)
        row = jnp.broadcast_to(row[:, None], self.shape)
        at = self.refs[name].at[self.program, row, self.channel]
        plt.store(at, value, mask=self._channel_inside())

    def factor(self, x, eps):
        """1 / root mean square of each token."""
        total = jnp.sum(x * x, axis=1, keepdims=True)
        return jax.lax.rsqrt(total * (1.0 / self.channels) + eps)

    def _row(self, turn):
        first = (self.program * self.blocks.turns + turn) * self.blocks.rows
        row = first + jnp.arange(self.shape[0], dtype=jnp.int32)
        return jnp.broadcast_to(row[:, None], self.shape)

    def _channel_inside(self):
        if self.shape[1] == self.channels:
            return None
        return self.channel < self.channels

    def inside(self, turn):
        inside = self._channel_inside()
        if self.tokens % (self.blocks.rows * self.blocks.turns) == 0:
            return inside
        is_token = self._row(turn) < self.tokens
        return is_token if inside is None else is_token & inside


def _forward_kernel(*refs, names, blocks, eps):
    refs = dict(zip(names, refs, strict=True))
    tile = _Tile(refs, blocks)
    f32, dtype = jnp.float32, refs["x"].dtype
    x = tile.load("x").astype(f32)
    if "delta" in refs:
        x = (x + tile.load("delta").astype(f32)).astype(dtype)
        tile.store("sum", x)
        x = x.astype(f32)
    normed = (x * tile.factor(x, eps)).astype(dtype).astype(f32)
    tile.store("out", normed * tile.scale())


def _backward_kernel(*refs, names, blocks, eps):
    refs = dict(zip(names, refs, strict=True))
    tile = _Tile(refs, blocks)
    read = [name for name in ("x", "dout", "dsum") if name in refs]
    scale = tile.scale()

    def take(turn, dscale):
        """Writes a turn's dx; returns the sums with the turn's terms."""
        value = {name: tile.load(name, turn).astype(jnp.float32) for name in read}
        x = value["x"]
        zeros = jnp.zeros(tile.shape, jnp.float32)
        dout, dx = value.get("dout", zeros), value.get("dsum", zeros)
        factor = tile.factor(x, eps)
        dnormed = dout * scale
        along = jnp.sum(dnormed * x, axis=1, keepdims=True) * (1.0 / tile.channels)
        dx = dx + factor * (dnormed - x * (factor * factor * along))
        tile.store("dx", dx, turn)
        if dscale is None:
            return None
        normed = (x * factor).astype(refs["x"].dtype).astype(jnp.float32)
        terms = dout * normed
        inside = tile.inside(turn)
        # What a token past the end divides by may be zero.
        return dscale + (terms if inside is None else jnp.where(inside, terms, 0.0))

    if "dscale" not in refs:
        take(0, None)
        return
    zeros = jnp.zeros(tile.shape, jnp.float32)
    dscale = jax.lax.fori_loop(0, blocks.turns, take, zeros)
    tile.store_partial("dscale", dscale)
