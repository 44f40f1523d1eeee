"""MultiStep in plain JAX, for a few tokens.

Mamba-1's steps are unrolled, so that XLA fuses over the state; Mamba-2's are matrix
products over all the tokens at once.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.causal_conv import parts
from pallas_kernels.causal_conv import xla as xla_conv
from pallas_kernels.multi_step.rows import settle
from pallas_kernels.ssd import chunked as ssd_chunked


def _step_sizes(dt, dt_bias):
    dt = dt.astype(jnp.float32)
    if dt_bias is not None:
        dt = dt + dt_bias.astype(jnp.float32)[None, None, :]
    return jax.nn.softplus(dt)


def _is_replayed(slots, num_pending):
    """Which pending tokens a row takes, [B, S]."""
    slot = jnp.arange(slots, dtype=jnp.int32)
    return slot[None, :] < num_pending.astype(jnp.int32)[:, None]


def selective_multi_step(
    state, pending, num_pending, x, dt, A, B, C, *, D, z, dt_bias, is_active, commit
):
    """Returns (y, state_j); see `api.selective_multi_step` for the arguments."""
    f32 = jnp.float32
    channels = x.shape[2]
    A = A.astype(f32)

    def advance(h, x, dt, B):
        B = jnp.repeat(B.astype(f32), channels // B.shape[1], axis=1)
        decay = jnp.exp(dt[:, :, None] * A[None, :, :])
        return decay * h + (dt * x.astype(f32))[:, :, None] * B

    slots = pending.dt.shape[1]
    replayed = _is_replayed(slots, num_pending)[:, :, None]
    # A step size of zero leaves the state as it is.
    old_dt = jnp.where(replayed, _step_sizes(pending.dt, dt_bias), 0.0)
    before = state = state.astype(f32)
    for s in range(slots):
        state = advance(state, pending.x[:, s], old_dt[:, s], pending.B[:, s])
    dt = _step_sizes(dt, dt_bias)
    h, ys = state, []
    for t in range(x.shape[1]):
        h = advance(h, x[:, t], dt[:, t], B[:, t])
        out = jnp.repeat(C[:, t].astype(f32), channels // C.shape[2], axis=1)
        ys.append(jnp.sum(h * out, axis=-1))
    y = jnp.stack(ys, axis=1)
    if D is not None:
        y = y + D.astype(f32)[None, None, :] * x.astype(f32)
    if z is not None:
        y = y * jax.nn.silu(z.astype(f32))
    return settle(y.astype(x.dtype), state, before, is_active, commit)


def ssd_multi_step(
    state, pending, num_pending, x, dt, A, B, C, *, D, dt_bias, is_active, commit
):
    """Returns (y, state_j); see `api.ssd_multi_step` for the arguments.

    The pending tokens and the new ones are one chunk each, so the state is read twice
    however many tokens there are.
    """
    f32 = jnp.float32
    batch, tokens, groups, width = x.shape
    heads, n = C.shape[2:]
    by_group = (groups, heads // groups)
    A, D, dt_bias = (
        None if v is None else v.astype(f32).reshape(by_group) for v in (A, D, dt_bias)
    )

    def one_chunk(value, *shape):
        return value.astype(f32).reshape(batch, 1, value.shape[1], *shape)

    def one_segment(length):
        return jnp.zeros((batch, 1, length), jnp.int32), jnp.zeros(
            (batch, 1), jnp.int32
        )

    before = state.astype(f32)
    h = before.reshape(batch, 1, *by_group, n, width)
    slots = pending.x.shape[1]
    if slots:
        old_x, old_dt, old_B = pending
        replayed = _is_replayed(slots, num_pending)[:, :, None]
        old_dt = jnp.where(replayed, old_dt.astype(f32), ssd_chunked.NO_STEP)
        added, decay = ssd_chunked.chunk_states(
            one_chunk(old_x, groups, width),
            one_chunk(old_dt, *by_group),
            one_chunk(old_B, groups, n),
            *one_segment(slots),
            A,
            dt_bias,
        )
        h = decay[..., None, None] * h + added
    y = ssd_chunked.chunk_outputs(
        one_chunk(x, groups, width),
        one_chunk(dt, *by_group),
        one_chunk(B, groups, n),
        one_chunk(C, *by_group, n),
        *one_segment(tokens),
        h,
        A,
        D,
        dt_bias,
    )
    y = y.reshape(batch, tokens, heads, width).astype(x.dtype)
    return settle(y, h.reshape(before.shape), before, is_active, commit)


def conv_multi_step(
    window, pending, num_pending, x, kernel, bias, *, group, splits, is_active, commit
):
    """Returns (y, window_j); see `api.conv_multi_step` for the arguments."""
    y, after = convolve(
        xla_conv.causal_conv, window, pending, num_pending, x, kernel, bias, group
    )
    if splits is not None:
        y = parts.split(y, splits)
    return settle(y, after, window, is_active, commit)


def convolve(conv, window, pending, num_pending, x, kernel, bias, group):
    """Moves the windows on and runs a convolution from there on repeated channels."""
    slots, size = pending.shape[1], window.shape[1]
    seen = jnp.concatenate([window, pending.astype(window.dtype)], axis=1)
    start = jnp.clip(num_pending, 0, slots).astype(jnp.int32)
    take = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, size))
    after = take(seen, start)
    y = conv(
        x,
        kernel,
        bias,
        initial_window=after,
        segment_ids=None,
        activation="silu",
        group=group,
    )
    return y, after
