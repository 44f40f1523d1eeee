"""MultiStep as single steps of the two recurrences, float32."""

import jax.numpy as jnp

from pallas_kernels.selective_scan import reference as selective_reference
from pallas_kernels.ssd import reference as ssd_reference


def _row_where(chosen, a, b):
    return jnp.where(chosen.reshape(-1, *[1] * (a.ndim - 1)), a, b)


def _multi_step(scan, state, pending, num_pending, x, dt, B, C):
    """Replays the pending tokens a row has, one by one, then scans the new ones."""
    slots = pending.x.shape[1]
    for s in range(slots):
        px, pdt, pB = (v[:, s : s + 1] for v in pending)
        no_C = jnp.zeros((*C.shape[:1], 1, *C.shape[2:]), C.dtype)
        _, after = scan(px, pdt, pB, no_C, state)
        state = _row_where(s < jnp.clip(num_pending, 0, slots), after, state)
    y, _ = scan(x, dt, B, C, state)
    return y, state


def selective_multi_step(state, pending, num_pending, x, dt, A, B, C, *, D, z, dt_bias):
    """Returns (y, state_j); see `api.selective_multi_step` for the arguments."""

    def scan(x_, dt, B, C, state):
        options = {"dt_bias": dt_bias, "initial_state": state, "segment_ids": None}
        gate = z if x_ is x else None
        return selective_reference.selective_scan(
            x_, dt, A, B, C, D=D, z=gate, **options
        )

    state = state.astype(jnp.float32)
    return _multi_step(scan, state, pending, num_pending, x, dt, B, C)


def ssd_multi_step(state, pending, num_pending, x, dt, A, B, C, *, D, dt_bias):
    """Returns (y, state_j); see `api.ssd_multi_step` for the arguments."""

    def scan(x, dt, B, C, state):
        options = {"dt_bias": dt_bias, "initial_state": state, "segment_ids": None}
        return ssd_reference.ssd(x, dt, A, B, C, D=D, **options)

    state = state.astype(jnp.float32)
    return _multi_step(scan, state, pending, num_pending, x, dt, B, C)
