"""Mamba-2's recurrence as its equation reads: one step at a time, float32."""

import jax
import jax.numpy as jnp

from pallas_kernels import segments


def ssd(x, dt, A, B, C, *, D, dt_bias, initial_state, segment_ids):
    """Returns (y, final_state); see `api.ssd` for the arguments."""
    batch, length, groups, width = x.shape
    heads, state = C.shape[2:]
    f32 = jnp.float32
    out_dtype = x.dtype
    dt, A, C = (v.astype(f32) for v in (dt, A, C))
    if dt_bias is not None:
        dt = dt + dt_bias.astype(f32)[None, None, :]
    dt = jax.nn.softplus(dt)
    x, B = (jnp.repeat(v.astype(f32), heads // groups, axis=2) for v in (x, B))
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, state, width), f32)
    if segment_ids is None:
        segment_ids = jnp.zeros((batch, length), jnp.int32)

    def step(S, inputs):
        x, dt, B, C, keep = inputs
        S = jnp.where(keep[:, None, None, None], S, 0.0)
        decay = jnp.exp(dt * A[None, :])[:, :, None, None]
        S = decay * S + (dt[:, :, None] * B)[:, :, :, None] * x[:, :, None, :]
        return S, jnp.sum(C[:, :, :, None] * S, axis=2)

    inputs = (x, dt, B, C, segments.continues(segment_ids))
    inputs = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), inputs)
    S, y = jax.lax.scan(step, initial_state.astype(f32), inputs)
    y = jnp.moveaxis(y, 0, 1)
    if D is not None:
        y = y + D.astype(f32)[None, None, :, None] * x
    return y.astype(out_dtype), S
