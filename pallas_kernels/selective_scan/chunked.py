"""The selective scan in plain JAX, chunk by chunk, with bounded memory.

An outer scan goes over chunks and keeps only the state at each chunk's border for the
backward pass, which runs a chunk again before it differentiates it.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import segments

CHUNK = 16
# softplus of this is exactly zero, so that a step with it leaves the state alone.
NO_STEP = -1e4


def _per_channel(groups, channels):
    """[B, G, N] -> [B, N, E]: channels last, so that sums over n add whole vectors."""
    return jnp.swapaxes(jnp.repeat(groups, channels // groups.shape[1], axis=1), 1, 2)


def _step(A_t, h, inputs):
    """One token: state [B, N, E] -> (state, y [B, E])."""
    x, dt, B, C, keep = inputs
    decay = jnp.exp(dt[:, None, :] * A_t[None, :, :])
    if keep is not None:
        decay = jnp.where(keep[:, None, None], decay, 0.0)
    h = decay * h + (dt * x)[:, None, :] * _per_channel(B, x.shape[1])
    return h, jnp.sum(h * _per_channel(C, x.shape[1]), axis=1)


def _chunk(A_t, D, dt_bias, h, inputs):
    """One chunk: inputs are [Q, B, ...], Q tokens; returns (state, y [Q, B, E])."""
    x, dt, B, C, z, keep = inputs
    out_dtype = x.dtype
    x, dt, B, C = (v.astype(jnp.float32) for v in (x, dt, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias[None, None, :]
    dt = jax.nn.softplus(dt)
    step = functools.partial(_step, A_t)
    # A loop costs a GPU more than its step does; a CPU gains from the smaller program and
    # from not storing the decays.
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu:
        step = jax.checkpoint(step, prevent_cse=False)
    h, y = lax.scan(step, h, (x, dt, B, C, keep), unroll=1 if on_cpu else True)
    if D is not None:
        y = y + D[None, None, :] * x
    if z is not None:
        y = y * jax.nn.silu(z.astype(jnp.float32))
    return h, y.astype(out_dtype)


def _split(value, chunk, **pad):
    """[B, L, ...] -> [number of chunks, chunk, B, ...], padded at the end."""
    if value is None:
        return None
    padding = [(0, 0)] * value.ndim
    padding[1] = (0, -value.shape[1] % chunk)
    value = jnp.moveaxis(jnp.pad(value, padding, **pad), 1, 0)
    return value.reshape(-1, chunk, *value.shape[1:])


def selective_scan(
    x,
    dt,
    A,
    B,
    C,
    *,
    D,
    z,
    dt_bias,
    initial_state,
    segment_ids,
    checkpoint_every=None,
):
    """Returns (y, final_state); see `api.selective_scan` for the arguments.

    Whatever `checkpoint_every` is, a state is kept for each chunk of time.
    """
    del checkpoint_every
    batch, length, channels = x.shape
    f32 = jnp.float32
    chunk = min(CHUNK, length)
    keep = None if segment_ids is None else segments.continues(segment_ids)
    inputs = (
        _split(x, chunk),
        _split(dt, chunk, constant_values=NO_STEP),
        _split(B, chunk),
        _split(C, chunk),
        _split(z, chunk),
        _split(keep, chunk, constant_values=True),
    )
    if initial_state is None:
        h = jnp.zeros((batch, A.shape[1], channels), f32)
    else:
        h = jnp.swapaxes(initial_state.astype(f32), 1, 2)
    D, dt_bias = (None if v is None else v.astype(f32) for v in (D, dt_bias))
    body = functools.partial(_chunk, A.astype(f32).T, D, dt_bias)
    h, y = lax.scan(jax.checkpoint(body, prevent_cse=False), h, inputs)
    y = jnp.moveaxis(y.reshape(-1, batch, channels)[:length], 0, 1)
    return y, jnp.swapaxes(h, 1, 2)
