"""The SSD scan as matrix multiplications over chunks, in plain JAX.

Inside a chunk the tokens meet as in masked attention; between chunks only states
travel.
Axes: b batch, c chunk, q i j tokens of a chunk, k kv group, r head within its group,
n state, p head width.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import segments

# softplus of this is exactly zero, so that a step with it leaves the state alone.
NO_STEP = -1e4


def _einsum(spec, a, b):
    """A product accumulated in float32, of float32 factors at full precision."""
    product = functools.partial(jnp.einsum, spec, preferred_element_type=jnp.float32)
    exact = functools.partial(product, precision=lax.Precision.HIGHEST)
    if a.dtype == jnp.float32:
        return exact(a, b)
    # XLA:CPU has no product of bfloat16 factors with a float32 result.
    return lax.platform_dependent(
        a,
        b,
        cpu=lambda a, b: exact(a.astype(jnp.float32), b.astype(jnp.float32)),
        default=product,
    )


def _step_sizes(dt, A, dt_bias):
    """Step sizes and log-decays, both [b c k r q], from raw dt [b c q k r]."""
    dt = dt.astype(jnp.float32)
    if dt_bias is not None:
        dt = dt + dt_bias[None, None, None]
    dt = jnp.moveaxis(jax.nn.softplus(dt), 2, -1)
    return dt, dt * A[None, None, :, :, None]


def _between(log_decay):
    """Sums over j < q <= i, [... i j], from [... q].

    Summed directly: a difference of two cumulated sums would lose its accuracy, and its
    gradient's, after a few large steps.
    """
    size = log_decay.shape[-1]
    upto = jnp.tril(jnp.ones((size, size), jnp.float32))
    after = jnp.where(
        jnp.tril(jnp.ones((size, size), bool), -1), log_decay[..., None], 0.0
    )
    return _einsum("iq,bckrqj->bckrij", upto, after)


def chunk_states(x, dt, B, run, run_before, A, dt_bias):
    """What each chunk adds, [b c k r n p], and its own decay, [b c k r]."""
    dt, log_decay = _step_sizes(dt, A, dt_bias)
    to_end = lax.cumsum(log_decay, axis=4, reverse=True)
    decay = jnp.exp(to_end[..., 0])
    to_end = jnp.pad(to_end[..., 1:], [(0, 0)] * 4 + [(0, 1)])
    last = run[:, :, -1]
    weight = jnp.where((run == last[:, :, None])[:, :, None, None, :], dt, 0.0)
    weight = jnp.moveaxis(weight * jnp.exp(to_end), -1, 2)
    weighted = weight[..., None] * x.astype(jnp.float32)[:, :, :, :, None, :]
    added = _einsum("bcqkn,bcqkrp->bckrnp", B, weighted.astype(B.dtype))
    return added, jnp.where((last == run_before)[:, :, None, None], decay, 0.0)


def chunk_outputs(x, dt, B, C, run, run_before, states, A, D, dt_bias):
    """Outputs [b c q k r p] from the states [b c k r n p] before each chunk."""
    dt, log_decay = _step_sizes(dt, A, dt_bias)
    size = x.shape[2]
    seen = jnp.tril(jnp.ones((size, size), bool))[None, None]
    seen = seen & (run[:, :, :, None] == run[:, :, None, :])
    decay = jnp.where(seen[:, :, None, None], jnp.exp(_between(log_decay)), 0.0)
    scores = _einsum("bcikrn,bcjkn->bckrij", C, B)
    scores = scores * decay * dt[..., None, :]
    y = _einsum("bckrij,bcjkp->bcikrp", scores.astype(x.dtype), x)
    from_before = jnp.exp(lax.cumsum(log_decay, axis=4))
    here = (run == run_before[:, :, None])[:, :, None, None, :]
    from_before = jnp.moveaxis(jnp.where(here, from_before, 0.0), -1, 2)
    carried = _einsum("bcikrn,bckrnp->bcikrp", C, states.astype(C.dtype))
    y = y + from_before[..., None] * carried
    if D is not None:
        skip = D[None, None, None, :, :, None]
        y = y + skip * x.astype(jnp.float32)[:, :, :, :, None]
    return y


def _split(value, chunk, **pad):
    """[B, L, ...] -> [B, number of chunks, chunk, ...], padded at the end."""
    padding = [(0, 0)] * value.ndim
    padding[1] = (0, -value.shape[1] % chunk)
    value = jnp.pad(value, padding, **pad)
    return value.reshape(value.shape[0], -1, chunk, *value.shape[2:])


def ssd(x, dt, A, B, C, *, D, dt_bias, initial_state, segment_ids, chunk_size=None):
    """Returns (y, final_state); see `api.ssd` for the arguments.

    A token costs about chunk_size * (N + P) + N * P products, so by default a chunk is
    as long as the state is wide, within 16 and 64.
    """
    batch, length, groups, width = x.shape
    heads, state = C.shape[2:]
    f32 = jnp.float32
    by_group = (groups, heads // groups)
    A = A.astype(f32).reshape(by_group)
    D, dt_bias = (
        None if v is None else v.astype(f32).reshape(by_group) for v in (D, dt_bias)
    )
    # Products take bfloat16 factors as they are; anything else is multiplied in
    # float32.
    factor = jnp.bfloat16 if x.dtype == B.dtype == C.dtype == jnp.bfloat16 else f32
    chunk = min(chunk_size or min(max(16, state), 64), length)
    if segment_ids is None:
        run = jnp.zeros((batch, length), jnp.int32)
    else:
        run = jnp.cumsum(~segments.continues(segment_ids), axis=1, dtype=jnp.int32)
    run = _split(run, chunk, mode="edge")
    run_before = jnp.pad(run[:, :-1, -1], ((0, 0), (1, 0)))
    xs = _split(x.astype(factor), chunk)
    dts = _split(dt.reshape(batch, length, *by_group), chunk, constant_values=NO_STEP)
    Bs = _split(B.astype(factor), chunk)
    Cs = _split(C.astype(factor).reshape(batch, length, *by_group, state), chunk)

    added, decay = jax.checkpoint(chunk_states)(
        xs, dts, Bs, run, run_before, A, dt_bias
    )
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, state, width), f32)
    h = initial_state.astype(f32).reshape(batch, *by_group, state, width)

    def pass_on(h, chunk):
        added, decay = chunk
        return decay[..., None, None] * h + added, h

    h, before = lax.scan(
        pass_on, h, (jnp.moveaxis(added, 1, 0), jnp.moveaxis(decay, 1, 0))
    )
    y = jax.checkpoint(chunk_outputs)(
        xs, dts, Bs, Cs, run, run_before, jnp.moveaxis(before, 0, 1), A, D, dt_bias
    )
    y = y.reshape(batch, -1, heads, width)[:, :length].astype(x.dtype)
    return y, h.reshape(batch, heads, state, width)
