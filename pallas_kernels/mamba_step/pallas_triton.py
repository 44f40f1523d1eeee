"""A pure Mamba layer's step as two Triton kernels, for CUDA GPUs.

The first one convolves and multiplies: every program convolves all the channels for the
few outputs of the maps that it owns, which is less work than starting another kernel. The
second one belongs to channels: it multiplies dt up from its low rank, runs the recurrence
and writes all that the cache keeps of its channels where the cache has it. So nothing of
the cache is ever copied.

Only B belongs to no channel: the first kernel hands the second one the pending tokens' maps
beside the new ones', so that no program reads the slots in which another one writes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import gpu
from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.multi_step import tiles
from pallas_kernels.multi_step.api import conv_multi_step
from pallas_kernels.multi_step.columns import Columns
from pallas_kernels.narrow_product import narrow_product

# Tokens of a row, pending and new, that are unrolled.
MAX_TOKENS = 24
# New tokens of all rows.
MAX_NEW = 8
# New tokens of all rows up to which the convolution is computed again by each program of
# the maps, the threads of one, channels of a thread, and programs that are enough.
FEW_TOKENS = 2
CONV_WARPS, CONV_VECTOR = (8, 4, 2), 4
MAX_CONV_TILES = 8
MAPS_PROGRAMS = 128
# Values of the state that a program keeps; twice as many where there are many tokens,
# which then get more warps, too.
STATE_VALUES = 128
MANY_TOKENS = 6
# Smallest part of the low rank that is multiplied at once.
MIN_RANK = 8


def mamba_step(xz, cache, num_pending, weights, *, commit):
    """Returns (y, cache); see `api.mamba_step` for the arguments."""
    gpu.check_platform()
    batch, tokens = xz.shape[:2]
    slots, e = cache.x.shape[1:]
    _check(xz, cache, weights)
    num_pending = jnp.clip(num_pending.astype(jnp.int32), 0, slots)
    tile = _conv_tile(e)
    if tile is not None and batch * tokens <= FEW_TOKENS:
        x, maps = _convolve_and_map(xz, cache, num_pending, weights, *tile)
    else:
        x, _ = conv_multi_step(
            cache.window,
            Columns(cache.xz, 0, (e,)),
            num_pending,
            Columns(xz, 0, (e,)),
            weights.conv_kernel,
            weights.conv_bias,
            commit=False,
        )
        maps = jnp.concatenate([cache.maps, narrow_product(x, weights.maps)], axis=1)
    return _recur(xz, x, maps, cache, num_pending, weights, commit)


def _check(xz, cache, weights):
    batch, tokens = xz.shape[:2]
    if tokens + cache.x.shape[1] > MAX_TOKENS:
        raise UnsupportedError(
            f"{tokens + cache.x.shape[1]} tokens are more than {MAX_TOKENS}"
        )
    if batch * tokens > MAX_NEW:
        raise UnsupportedError(f"{batch * tokens} new tokens are more than {MAX_NEW}")
    if weights.conv_kernel.shape[0] == 1:
        raise UnsupportedError("one tap needs no window")
    floats = {xz.dtype, *(value.dtype for value in cache[1:])}
    if len(floats) > 1 or xz.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise UnsupportedError(f"a cache of {sorted(map(str, floats))}")


def _conv_tile(channels: int) -> tuple[int, int] | None:
    """Lanes and warps of a program that convolves, None if it takes too long."""
    for warps in CONV_WARPS:
        lanes = 32 * warps
        count, rest = divmod(channels, lanes * CONV_VECTOR)
        if not rest and count <= MAX_CONV_TILES:
            return lanes, warps
    if gpu.INTERPRET and channels % CONV_VECTOR == 0:
        return channels // CONV_VECTOR, 1
    return None


def _call(kernel, inputs, outputs, aliases, grid, num_warps):
    """Runs a kernel on named arrays; `aliases` are pairs of an input and an output."""
    names = (*inputs, *outputs)
    index = {name: i for i, name in enumerate(inputs)}
    into = {name: i for i, name in enumerate(outputs)}
    found = pl.pallas_call(
        functools.partial(kernel, names=names),
        grid=grid,
        out_shape=list(outputs.values()),
        input_output_aliases={index[a]: into[b] for a, b in aliases},
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=gpu.INTERPRET,
        name=f"mamba{kernel.func.__name__.removesuffix('_kernel')}",
    )(*inputs.values())
    return dict(zip(outputs, found, strict=True))


def _convolve_and_map(xz, cache, num_pending, weights, lanes, warps):
    """Returns x after the convolution, and the maps of pending and new tokens."""
    batch, tokens = xz.shape[:2]
    slots, e = cache.x.shape[1:]
    outputs = weights.maps.shape[0]
    columns = gpu.power_of_two(pl.cdiv(outputs, MAPS_PROGRAMS))
    inputs = {
        "window": cache.window,
        "old_xz": cache.xz,
        "old_maps": cache.maps,
        "num_pending": num_pending,
        "xz": xz,
        "taps": weights.conv_kernel,
        "bias": weights.conv_bias,
        "kernel": weights.maps,
    }
    found = _call(
        functools.partial(_convolve_kernel, columns=columns, lanes=lanes),
        inputs,
        {
            "x": jax.ShapeDtypeStruct((batch, tokens, e), xz.dtype),
            "maps": jax.ShapeDtypeStruct((batch, slots + tokens, outputs), xz.dtype),
        },
        (),
        (pl.cdiv(outputs, columns),),
        warps,
    )
    return found["x"], found["maps"]


def _convolve_kernel(*refs, names, columns, lanes):
    """All channels of all rows, and some outputs of the maps of them."""
    refs = dict(zip(names, refs, strict=True))
    f32, i32 = jnp.float32, jnp.int32
    batch, tokens, _ = refs["xz"].shape
    slots, outputs = refs["old_maps"].shape[1:]
    past, e = refs["window"].shape[1:]
    program, programs = pl.program_id(0), pl.cdiv(outputs, columns)
    shape = (lanes, CONV_VECTOR)
    lane = jnp.arange(lanes, dtype=i32)
    channel = jax.lax.broadcast_in_dim(lane * CONV_VECTOR, shape, (0,))
    step = jnp.arange(CONV_VECTOR, dtype=i32)
    channel = channel + jax.lax.broadcast_in_dim(step, shape, (1,))
    parts = [channel + first for first in range(0, e, lanes * CONV_VECTOR)]
    own = [jnp.minimum(program * columns + j, outputs - 1) for j in range(columns)]
    # Volatile: in flight before anything is waited for.
    weights = [
        [plt.load(refs["kernel"].at[o, part], volatile=True) for o in own]
        for part in parts
    ]
    counts = [refs["num_pending"][b] for b in range(batch)]

    def before(b, i, part):
        """The input i places after the first of the window that the row is at."""
        at = counts[b] + i
        in_window = jnp.broadcast_to(at < past, shape)
        at_slot = jnp.clip(at - past, 0, slots - 1)
        at_window = refs["window"].at[b, jnp.minimum(at, past - 1), part]
        old = plt.load(at_window, mask=in_window, other=0.0)
        slot = refs["old_xz"].at[b, at_slot, part]
        new = plt.load(slot, mask=jnp.logical_not(in_window), other=0.0)
        return jnp.where(in_window, old, new).astype(f32)

    sums = {}
    for u, part in enumerate(parts):
        taps = [plt.load(refs["taps"].at[w, part]).astype(f32) for w in range(past + 1)]
        bias = plt.load(refs["bias"].at[part]).astype(f32)
        is_mine = jnp.broadcast_to(program == u % programs, shape)
        for b in range(batch):
            values = [before(b, i, part) for i in range(past)]
            values += [
                plt.load(refs["xz"].at[b, t, part]).astype(f32) for t in range(tokens)
            ]
            for t in range(tokens):
                y = bias
                for tap, value in zip(taps, values[t : t + past + 1], strict=True):
                    y = y + tap * value
                y = (y * gpu.sigmoid(y)).astype(refs["x"].dtype)
                plt.store(refs["x"].at[b, t, part], y, mask=is_mine)
                for j, w in enumerate(weights[u]):
                    total = jnp.sum(y.astype(f32) * w.astype(f32), axis=1)
                    key = (b, slots + t, j)
                    sums[key] = total + sums[key] if key in sums else total
    per_row = (slots + tokens) * columns
    for b in range(batch):
        for start in range(0, per_row, lanes):
            place = start + lane
            t, o = place // columns, program * columns + place % columns
            inside = (place < per_row) & (o < outputs)
            is_old = inside & (t < slots)
            value = plt.load(refs["old_maps"].at[b, t, o], mask=is_old, other=0.0)
            value = value.astype(f32)
            for (row, at, j), total in sums.items():
                if row == b and start <= at * columns + j < start + lanes:
                    here = place == at * columns + j
                    value = jnp.where(here, jnp.sum(total, axis=0), value)
            value = value.astype(refs["maps"].dtype)
            plt.store(refs["maps"].at[b, t, o], value, mask=inside)


def _recur(xz, x, maps, cache, num_pending, weights, commit):
    """Returns (y, cache) from the convolution's output and all the maps."""
    batch, tokens, e = x.shape
    slots, n = cache.x.shape[1], cache.state.shape[2]
    states = gpu.power_of_two(n)
    is_long = tokens + slots >= MANY_TOKENS
    channels = max(1, STATE_VALUES * (2 if is_long else 1) // states)
    kept = cache._asdict()
    inputs = {f"old_{name}": value for name, value in kept.items()}
    inputs |= {"num_pending": num_pending, "xz": xz, "x": x, "all_maps": maps}
    inputs |= {name: getattr(weights, name) for name in ("dt_up", "dt_bias")}
    inputs |= {"A_log": weights.A_log, "D": weights.D}
    if not commit:
        kept = {name: kept[name] for name in ("xz", "x", "dt", "maps")}
    outputs = {"y": jax.ShapeDtypeStruct(x.shape, x.dtype)}
    outputs |= {
        f"new_{name}": jax.ShapeDtypeStruct(value.shape, value.dtype)
        for name, value in kept.items()
    }
    found = _call(
        functools.partial(_recur_kernel, channels=channels, states=states),
        inputs,
        outputs,
        tuple((f"old_{name}", f"new_{name}") for name in kept),
        (pl.cdiv(e, channels), batch),
        4 if is_long else 1,
    )
    new = {name: found[f"new_{name}"] for name in kept}
    return found["y"], cache._replace(**new)


def _recur_kernel(*refs, names, channels, states):
    """Some channels of one row: h [channels, states] through all the tokens."""
    refs = dict(zip(names, refs, strict=True))
    row, block = pl.program_id(1), pl.program_id(0)
    d_inner, n = refs["A_log"].shape
    slots, tokens = refs["old_x"].shape[1], refs["x"].shape[1]
    rank, dtype = refs["dt_up"].shape[1], refs["x"].dtype
    e = tiles.Part.create(block * channels, channels, d_inner)
    i, j, mask = tiles.spread(e, tiles.Part.create(0, states, n))
    count = refs["num_pending"][row]

    def part(size):
        return tiles.Part.create(0, gpu.power_of_two(size), size)

    def tile(name, size, first=0):
        t, c, inside = tiles.spread(part(size), e)
        return tiles.load(refs[name], (row, t, first + c), inside)

    def vector(name):
        return tiles.load(refs[name], (e.at,), e.inside)[None, :]

    def state_maps(first, size, start):
        at = refs["all_maps"]
        return [
            tiles.load(at, (row, t, first + j), mask)
            for t in range(start, start + size)
        ]

    bias, skip = vector("dt_bias"), vector("D")
    A = tiles.rates(tiles.load(refs["A_log"], (i, j), mask), True)
    h = tiles.load(refs["old_state"], (row, i, j), mask)
    raw = _step_sizes(refs, row, e, slots, tokens, rank)
    old_x, old_dt = tile("old_x", slots), tile("old_dt", slots)
    old_B = state_maps(rank, slots, 0)
    x, z, conv_in = tile("x", tokens), tile("xz", tokens, d_inner), tile("xz", tokens)
    B = state_maps(rank, tokens, slots)
    C = state_maps(rank + n, tokens, slots)
    window = None
    if "new_window" in refs:
        window = _moved_window(refs, row, e, count)
    # Rounded as it is kept, so that replaying gives the same.
    raw = raw.astype(dtype)

    def advance(h, dt, dt_x, B):
        return gpu.exp2(dt[:, None] * A) * h + dt_x[:, None] * B

    replayed = (part(slots).at < count)[:, None]
    old_dt = jnp.where(replayed, gpu.softplus(old_dt + bias), 0.0)
    old = (tiles.unstack(old_dt, slots), tiles.unstack(old_dt * old_x, slots), old_B)
    for token in zip(*old, strict=True):
        h = advance(h, *token)
    if "new_state" in refs:
        plt.store(refs["new_state"].at[row, i, j], h, mask=mask)
    dt = gpu.softplus(raw.astype(jnp.float32) + bias)
    new = (tiles.unstack(dt, tokens), tiles.unstack(dt * x, tokens), B)
    ys = []
    for out, *token in zip(C, *new, strict=True):
        h = advance(h, *token)
        ys.append(jnp.sum(h * out, axis=1))
    y = tiles.stack(ys) + skip * x
    t, c, inside = tiles.spread(part(tokens), e)
    out = (y * z * gpu.sigmoid(z)).astype(dtype)
    plt.store(refs["y"].at[row, t, c], out, mask=inside)
    if not gpu.INTERPRET:
        # What follows overwrites what other threads of the program have read.
        plt.debug_barrier()
    start = 0 if window is not None else jnp.minimum(count, slots - tokens)
    for name, value in (("xz", conv_in), ("x", x), ("dt", raw)):
        at = refs[f"new_{name}"].at[row, start + t, c]
        plt.store(at, value.astype(dtype), mask=inside)
    for place, value in enumerate(window or ()):
        at = refs["new_window"].at[row, place, e.at]
        plt.store(at, value.astype(dtype), mask=e.inside)
    m = tiles.Part.create(0, gpu.power_of_two(rank + 2 * n), rank + 2 * n)
    once = jnp.broadcast_to(block == 0, m.at.shape)
    once = once if m.inside is None else once & m.inside
    for token in range(tokens):
        at = refs["all_maps"].at[row, slots + token, m.at]
        new = plt.load(at, mask=once, other=0.0)
        plt.store(refs["new_maps"].at[row, start + token, m.at], new, mask=once)


def _step_sizes(refs, row, e, slots, tokens, rank):
    """Raw step sizes of the new tokens, [tokens, channels], from those of low rank."""
    totals = [None] * tokens
    first = 0
    while first < rank:
        left = rank - first
        size = min(128, 1 << (left.bit_length() - 1))
        size = size if size >= MIN_RANK else gpu.power_of_two(left, MIN_RANK)
        c, k, inside = tiles.spread(e, tiles.Part.create(0, size, left))
        kernel = tiles.load(refs["dt_up"], (c, first + k), inside)
        for t in range(tokens):
            # As many copies as channels, so that every factor is where the other is.
            low = tiles.load(refs["all_maps"], (row, slots + t, first + k), inside)
            total = jnp.sum(kernel * low, axis=1)
            totals[t] = total if totals[t] is None else totals[t] + total
        first += size
    return tiles.stack(totals)


def _moved_window(refs, row, e, count):
    """The inputs of the convolution before the first new token."""
    past, slots = refs["old_window"].shape[1], refs["old_xz"].shape[1]
    seen = [
        tiles.load(refs["old_window"], (row, i, e.at), e.inside) for i in range(past)
    ]
    seen += [tiles.load(refs["old_xz"], (row, s, e.at), e.inside) for s in range(slots)]
    window = seen[:past]
    for s in range(1, slots + 1):
        pairs = zip(window, seen[s : s + past], strict=True)
        window = [jnp.where(count == s, later, now) for now, later in pairs]
    return window
