"""The causal convolution one token at a time, with its window as the state, float32."""

import jax
import jax.numpy as jnp

from pallas_kernels import segments
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
    kernel = kernel.astype(f32)
    if initial_window is None:
        initial_window = jnp.zeros((batch, kernel.shape[0] - 1, channels), f32)
    if segment_ids is None:
        segment_ids = jnp.zeros((batch, length), jnp.int32)

    def step(window, inputs):
        x, keep = inputs
        window = jnp.where(keep[:, None, None], window, 0.0)
        window = jnp.concatenate([window, x[:, None, :]], axis=1)
        return window[:, 1:], jnp.sum(window * kernel[None, :, :], axis=1)

    inputs = (x.astype(f32), segments.continues(segment_ids))
    inputs = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), inputs)
    _, y = jax.lax.scan(step, initial_window.astype(f32), inputs)
    y = jnp.moveaxis(y, 0, 1)
    if bias is not None:
        y = y + bias.astype(f32)[None, None, :]
    if activation == "silu":
        y = jax.nn.silu(y)
    y = y.astype(x.dtype)
    return y if splits is None else parts.split(y, splits)
