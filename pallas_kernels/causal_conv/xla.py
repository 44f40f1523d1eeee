"""The causal convolution as W shifted multiply-adds over the whole sequence."""

import jax
import jax.numpy as jnp

from pallas_kernels.causal_conv import parts


def causal_conv(
    x,
    kernel,
    bias,
    *,
    initial_window,
    segment_ids,
    activation,
    splits=None,
    group=None,
):
    """Returns y, or its parts; see `api.causal_conv` for the arguments."""
    x = parts.repeat(x, kernel.shape[1], group)
    initial_window = parts.repeat(initial_window, kernel.shape[1], group)
    batch, length, channels = x.shape
    f32 = jnp.float32
    past = kernel.shape[0] - 1
    if initial_window is None:
        padded = jnp.pad(x, ((0, 0), (past, 0), (0, 0)))
    else:
        dtype = jnp.promote_types(initial_window.dtype, x.dtype)
        padded = jnp.concatenate(
            [initial_window.astype(dtype), x.astype(dtype)], axis=1
        )
    kernel = kernel.astype(f32)
    if segment_ids is not None:
        ids = jnp.pad(segment_ids, ((0, 0), (past, 0)), mode="edge")
    y = kernel[past][None, None, :] * x.astype(f32)
    for w in range(past):
        tap = kernel[w][None, None, :] * padded[:, w : w + length].astype(f32)
        if segment_ids is not None:
            same = ids[:, w : w + length] == segment_ids
            tap = jnp.where(same[:, :, None], tap, 0.0)
        y = y + tap
    if bias is not None:
        y = y + bias.astype(f32)[None, None, :]
    if activation == "silu":
        y = jax.nn.silu(y)
    y = y.astype(x.dtype)
    return y if splits is None else parts.split(y, splits)
