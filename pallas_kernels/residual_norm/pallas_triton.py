"""The residual sum, its norm and their gradients as Triton kernels, for CUDA GPUs.

A program owns whole tokens: it reads a row once, keeps it in registers for the statistic,
and writes what is asked of it. The backward kernel computes the statistic again, which
costs no traffic, and adds the gradient that the sum itself receives.
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
    """How the work is cut: tokens of a program, and its warps."""

    rows: int
    warps: int


FORWARD = Blocks(rows=2, warps=16)
BACKWARD = Blocks(rows=1, warps=16)
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
    total, out = _residual_norm(eps, x, delta, scale)
    return (total, out), (total, scale, None if delta is None else ())


def _backward(eps, saved, cotangents):
    total, scale, has_delta = saved
    dtotal, dout = cotangents
    inputs = {"x": total, "dsum": dtotal, "dout": dout}
    inputs = {name: _rows(value) for name, value in inputs.items()} | {"scale": scale}
    outputs = {"dx": jax.ShapeDtypeStruct(inputs["x"].shape, total.dtype)}
    dx = _call(_backward_kernel, BACKWARD, eps, inputs, outputs)["dx"]
    dx = dx.reshape(total.shape)
    # Left to XLA, which drops it where the scale is not trained.
    wide = total.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normed = (wide * jax.lax.rsqrt(mean_square + eps)).astype(total.dtype)
    terms = dout.astype(jnp.float32) * normed.astype(jnp.float32)
    dscale = jnp.sum(terms, axis=(0, 1)).astype(scale.dtype)
    return dx, None if has_delta is None else dx, dscale


_residual_norm.defvjp(_forward, _backward)


def _rows(x):
    return x.reshape(-1, x.shape[2])


def _call(kernel, blocks, eps, inputs, outputs):
    found = pl.pallas_call(
        functools.partial(kernel, names=(*inputs, *outputs), rows=blocks.rows, eps=eps),
        grid=(pl.cdiv(inputs["x"].shape[0], blocks.rows),),
        out_shape=list(outputs.values()),
        compiler_params=plt.CompilerParams(num_warps=blocks.warps, num_stages=1),
        interpret=gpu.INTERPRET,
        name="residual_norm" + kernel.__name__.removesuffix("_kernel"),
    )(*inputs.values())
    return dict(zip(outputs, found, strict=True))


class _Tile:
    """A program's tokens, and how it reads and writes them as [tokens, channels]."""

    def __init__(self, refs, rows):
        self.refs = refs
        tokens, self.channels = refs["x"].shape
        width = pl.next_power_of_2(self.channels)
        row = pl.program_id(0) * rows + jnp.arange(rows, dtype=jnp.int32)
        channel = jnp.arange(width, dtype=jnp.int32)
        self.row = jnp.broadcast_to(row[:, None], (rows, width))
        self.channel = jnp.broadcast_to(channel[None, :], (rows, width))
        self.inside = None
        if tokens % rows or width != self.channels:
            self.inside = (self.row < tokens) & (self.channel < self.channels)

    def load(self, name):
        """Float32 values of `name`, zeros outside."""
        at = (self.row, self.channel)
        if name == "scale":
            at = (self.channel,)
        other = None if self.inside is None else 0.0
        value = plt.load(self.refs[name].at[at], mask=self.inside, other=other)
        return value.astype(jnp.float32)

    def store(self, name, value):
        """Writes values inside."""
        ref = self.refs[name]
        at = ref.at[(self.row, self.channel)]
        plt.store(at, value.astype(ref.dtype), mask=self.inside)

    def factor(self, x, eps):
        """1 / root mean square of each token."""
        total = jnp.sum(x * x, axis=1, keepdims=True)
        return jax.lax.rsqrt(total * (1.0 / self.channels) + eps)


def _forward_kernel(*refs, names, rows, eps):
    refs = dict(zip(names, refs, strict=True))
    tile = _Tile(refs, rows)
    x, dtype = tile.load("x"), refs["x"].dtype
    if "delta" in refs:
        x = (x + tile.load("delta")).astype(dtype)
        tile.store("sum", x)
        x = x.astype(jnp.float32)
    normed = (x * tile.factor(x, eps)).astype(dtype).astype(jnp.float32)
    scale = tile.load("scale").astype(dtype).astype(jnp.float32)
    tile.store("out", normed * scale)


def _backward_kernel(*refs, names, rows, eps):
    refs = dict(zip(names, refs, strict=True))
    tile = _Tile(refs, rows)
    x = tile.load("x")
    scale = tile.load("scale").astype(refs["x"].dtype).astype(jnp.float32)
    dnormed = tile.load("dout") * scale
    factor = tile.factor(x, eps)
    along = jnp.sum(dnormed * x, axis=1, keepdims=True) * (1.0 / tile.channels)
    dx = factor * (dnormed - x * (factor * factor * along))
    tile.store("dx", dx + tile.load("dsum"))
