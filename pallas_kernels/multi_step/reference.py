"""MultiStep as single steps of the two recurrences, float32."""

import jax.numpy as jnp

from pallas_kernels.causal_conv import parts
from pallas_kernels.causal_conv import reference as conv_reference
from pallas_kernels.multi_step.rows import row_where, settle
from pallas_kernels.selective_scan import reference as selective_reference
from pallas_kernels.ssd import reference as ssd_reference


def _multi_step(scan, state, pending, num_pending, x, dt, B, C, is_active, commit):
    """Replays the pending tokens a row has, one by one, then scans the new ones."""
    slots, before = pending.x.shape[1], state
    for s in range(slots):
        px, pdt, pB = (v[:, s : s + 1] for v in pending)
        no_C = jnp.zeros((*C.shape[:1], 1, *C.shape[2:]), C.dtype)
        _, after = scan(px, pdt, pB, no_C, state)
        state = row_where(s < jnp.clip(num_pending, 0, slots), after, state)
    y, _ = scan(x, dt, B, C, state)
    return settle(y, state, before, is_active, commit)


def selective_multi_step(
    state, pending, num_pending, x, dt, A, B, C, *, D, z, dt_bias, is_active, commit
):
    """Returns (y, state_j); see `api.selective_multi_step` for the arguments."""

    def scan(x_, dt, B, C, state):
        options = {"dt_bias": dt_bias, "initial_state": state, "segment_ids": None}
        gate = z if x_ is x else None
        return selective_reference.selective_scan(
            x_, dt, A, B, C, D=D, z=gate, **options
        )

    state = state.astype(jnp.float32)
    return _multi_step(
        scan, state, pending, num_pending, x, dt, B, C, is_active, commit
    )


def ssd_multi_step(
    state, pending, num_pending, x, dt, A, B, C, *, D, dt_bias, is_active, commit
):
    """Returns (y, state_j); see `api.ssd_multi_step` for the arguments."""

    def scan(x, dt, B, C, state):
        options = {"dt_bias": dt_bias, "initial_state": state, "segment_ids": None}
        return ssd_reference.ssd(x, dt, A, B, C, D=D, **options)

    state = state.astype(jnp.float32)
    return _multi_step(
        scan, state, pending, num_pending, x, dt, B, C, is_active, commit
    )


def conv_multi_step(
    window, pending, num_pending, x, kernel, bias, *, group, splits, is_active, commit
):
    """Returns (y, window_j); see `api.conv_multi_step` for the arguments."""
    before, width = window, window.shape[1]
    for s in range(pending.shape[1]):
        token = pending[:, s : s + 1].astype(window.dtype)
        after = jnp.concatenate([window, token], axis=1)[:, -width:]
        window = row_where(s < num_pending, after, window)
    channel = jnp.arange(kernel.shape[1])
    repeats = kernel.shape[1] // x.shape[2]
    source = channel // (group * repeats) * group + channel % group
    y = conv_reference.causal_conv(
        x[:, :, source],
        kernel,
        bias,
        initial_window=window[:, :, source],
        segment_ids=None,
        activation="silu",
    )
    if splits is not None:
        y = parts.split(y, splits)
    return settle(y, window, before, is_active, commit)
