"""The selective scan as its equation reads: one step at a time, float32."""

import jax
import jax.numpy as jnp

from pallas_kernels import segments


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

    `checkpoint_every` changes nothing: JAX keeps every state for the backward pass.
    """
    del checkpoint_every
    batch, length, channels = x.shape
    f32 = jnp.float32
    A = A.astype(f32)
    dt = dt.astype(f32)
    if dt_bias is not None:
        dt = dt + dt_bias.astype(f32)[None, None, :]
    dt = jax.nn.softplus(dt)
    B, C = (jnp.repeat(v.astype(f32), channels // v.shape[2], axis=2) for v in (B, C))
    if initial_state is None:
        initial_state = jnp.zeros((batch, channels, A.shape[1]), f32)
    if segment_ids is None:
        segment_ids = jnp.zeros((batch, length), jnp.int32)

    def step(h, inputs):
        x, dt, B, C, keep = inputs
        h = jnp.where(keep[:, None, None], h, 0.0)
        decay = jnp.exp(dt[:, :, None] * A[None, :, :])
        h = decay * h + (dt * x)[:, :, None] * B
        return h, jnp.sum(h * C, axis=-1)

    inputs = (x.astype(f32), dt, B, C, segments.continues(segment_ids))
    inputs = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), inputs)
    h, y = jax.lax.scan(step, initial_state.astype(f32), inputs)
    y = jnp.moveaxis(y, 0, 1)
    if D is not None:
        y = y + D.astype(f32)[None, None, :] * x.astype(f32)
    if z is not None:
        y = y * jax.nn.silu(z.astype(f32))
    return y.astype(x.dtype), h
