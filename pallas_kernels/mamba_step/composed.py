"""A pure Mamba layer's step as a row of this package's operations."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.mamba_step.arrays import Cache
from pallas_kernels.multi_step.api import (
    Pending,
    conv_multi_step,
    selective_multi_step,
)
from pallas_kernels.multi_step.columns import Columns
from pallas_kernels.narrow_product import narrow_product


def mamba_step(xz, cache, num_pending, weights, *, commit, implementation=None):
    """Returns (y, cache); see `api.mamba_step` for the arguments."""
    e, n = cache.state.shape[1:]
    rank = weights.dt_up.shape[1]
    run = {"implementation": implementation}
    # Many tokens, or weights that a mesh splits: no products for a kernel.
    product = functools.partial(narrow_product, implementation=implementation or "xla")

    def columns(values, start, *sizes):
        return Columns(values, start, sizes)

    x, window = conv_multi_step(
        cache.window,
        columns(cache.xz, 0, e),
        num_pending,
        columns(xz, 0, e),
        weights.conv_kernel,
        weights.conv_bias,
        commit=commit,
        **run,
    )
    maps = product(x, weights.maps)
    dt = product(maps[:, :, :rank], weights.dt_up)
    y, state = selective_multi_step(
        cache.state,
        Pending(cache.x, cache.dt, columns(cache.maps, rank, 1, n)),
        num_pending,
        x,
        dt,
        weights.A_log,
        columns(maps, rank, 1, n),
        columns(maps, rank + n, 1, n),
        D=weights.D,
        z=columns(xz, e, e),
        dt_bias=weights.dt_bias,
        A_is_log=True,
        commit=commit,
        **run,
    )
    new = {"xz": xz, "x": x, "dt": dt, "maps": maps}
    new = {name: v.astype(getattr(cache, name).dtype) for name, v in new.items()}
    if not (commit and xz.shape[1] == cache.xz.shape[1]):
        # Otherwise every slot is written: the new tokens are the pending ones, uncopied.
        start = jnp.zeros_like(num_pending) if commit else num_pending
        new = {name: _write(getattr(cache, name), v, start) for name, v in new.items()}
    return y, Cache(state, window, **new)


def _write(slots, values, start):
    """Writes tokens into each row's slots from `start` on."""
    write = jax.vmap(
        lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, axis=0)
    )
    return write(slots, values, start)
