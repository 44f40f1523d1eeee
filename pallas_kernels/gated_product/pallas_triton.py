"""Norm, product and gate of a few tokens as one Triton kernel, for CUDA GPUs.

The weights are read once and take all the time. A program owns some columns of both
projections, so that it can gate its own results; the norm's factor belongs to a row and is
applied to the sums, by when each program has seen the whole row.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import gpu
from pallas_kernels.dispatch import UnsupportedError

# Rows of the smallest product on tensor cores.
MAX_TOKENS = 16
COLUMNS, DEPTH = 128, 64
WARPS, STAGES = 4, 4
# Blocks that are on their way wait in shared memory; these have less of it.
SMALL_MEMORY = ("8.6", "8.9", "12.0")


def gated_product(h, scale, kernel, *, eps):
    """Returns the output; see `api.gated_product` for the arguments."""
    gpu.check_platform()
    batch, length, width = h.shape
    tokens, outputs = batch * length, kernel.shape[1] // 2
    if tokens > MAX_TOKENS:
        raise UnsupportedError(f"{tokens} tokens are more than {MAX_TOKENS}")
    if width % DEPTH or outputs % COLUMNS:
        raise UnsupportedError(
            f"[{width}, {outputs}] is not in blocks of [{DEPTH}, {COLUMNS}]"
        )
    if h.dtype not in (jnp.bfloat16, jnp.float16) or kernel.dtype != h.dtype:
        raise UnsupportedError(f"products of {h.dtype} with {kernel.dtype}")
    small = getattr(jax.devices()[0], "compute_capability", "") in SMALL_MEMORY
    stages = STAGES - 1 if small else STAGES
    out = pl.pallas_call(
        functools.partial(_kernel, tokens=tokens, width=width, eps=eps),
        grid=(outputs // COLUMNS,),
        out_shape=jax.ShapeDtypeStruct((tokens, outputs), h.dtype),
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=stages),
        interpret=gpu.INTERPRET,
        name="gated_product",
    )(h.reshape(tokens, width), scale, kernel)
    return out.reshape(batch, length, outputs)


def _kernel(h_ref, scale_ref, kernel_ref, out_ref, *, tokens, width, eps):
    f32 = jnp.float32
    outputs = out_ref.shape[1]
    row = jnp.arange(MAX_TOKENS, dtype=jnp.int32)
    # Rows beyond the last are copies of it: every load is inside, every store the same.
    row = jnp.minimum(row, tokens - 1)
    column = pl.program_id(0) * COLUMNS + jnp.arange(COLUMNS, dtype=jnp.int32)

    def tile(rows, columns):
        shape = (rows.shape[0], columns.shape[0])
        return (
            jnp.broadcast_to(rows[:, None], shape),
            jnp.broadcast_to(columns[None, :], shape),
        )

    def body(i, carry):
        gate, up, squares = carry
        depth = i * DEPTH + jnp.arange(DEPTH, dtype=jnp.int32)
        h = plt.load(h_ref.at[tile(row, depth)]).astype(f32)
        scale = plt.load(scale_ref.at[depth]).astype(f32)
        scaled = (h * scale[None, :]).astype(out_ref.dtype)
        gate += _dot(scaled, plt.load(kernel_ref.at[tile(depth, column)]))
        up += _dot(scaled, plt.load(kernel_ref.at[tile(depth, outputs + column)]))
        return gate, up, squares + jnp.sum(h * h, axis=1)

    zeros = jnp.zeros((MAX_TOKENS, COLUMNS), f32)
    init = (zeros, zeros, jnp.zeros((MAX_TOKENS,), f32))
    gate, up, squares = jax.lax.fori_loop(0, width // DEPTH, body, init)
    factor = jax.lax.rsqrt(squares * (1.0 / width) + eps)[:, None]
    gate, up = gate * factor, up * factor
    value = (gate * gpu.sigmoid(gate) * up).astype(out_ref.dtype)
    plt.store(out_ref.at[tile(row, column)], value)


def _dot(a, b):
    return jax.lax.dot_general(
        a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
