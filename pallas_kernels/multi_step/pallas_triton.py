"""MultiStep as one Triton kernel per mixer, for CUDA GPUs (Ampere and Hopper).

One program takes some channels (Mamba-1) or some columns of a head's state (Mamba-2) of
one row through all the tokens, with its part of the state in registers. A call lasts
microseconds, so latency is what counts: every load is issued before the first is used.
Nothing that decides where to read therefore depends on `num_pending`: all the pending
tokens are loaded, and those past the row's count get a step size of zero.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import gpu
from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.multi_step import tiles
from pallas_kernels.multi_step.columns import Columns

# Tokens are unrolled, so this bounds registers and time to compile.
MAX_TOKENS = 40
# Mamba-1: values of the state that a program keeps; twice as many where the whole state
# has many values, or where there are many tokens, which then get more warps, too.
STATE_VALUES = 128
MANY_VALUES = 1 << 18
MANY_TOKENS = 6
# Columns of a Mamba-2 head's state that one program keeps, and the smallest product.
COLUMNS = 32
MIN_DOT = 16
# Columns of all rows from which on programs are larger, and tokens up to which they are
# taken one by one.
MANY_COLUMNS = 1 << 15
FEW_TOKENS = 2
# Input channels that one program of the convolution takes, two to a thread; twice as many
# where all rows have many.
CONV_BLOCK = 64
MANY_CHANNELS = 1 << 15
# softplus of this is exactly zero.
NO_STEP = -1e9


def _check_runs(op: str, tokens: int, *arrays: jax.Array) -> None:
    """Raises UnsupportedError unless the kernel runs on the arrays here."""
    gpu.check_platform()
    if tokens > MAX_TOKENS:
        raise UnsupportedError(f"{tokens} tokens are more than {MAX_TOKENS}")
    for dtype in {a.dtype for a in arrays}:
        if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise UnsupportedError(f"{op} does not take {dtype}")


class _Refs(dict):
    """A kernel's arrays by name; some lie among the columns of a wider array."""

    def __init__(self, names, refs, columns):
        super().__init__(zip(names, refs, strict=True))
        self.columns = dict(columns)

    def sizes(self, name: str) -> tuple[int, ...]:
        """Shape of a token's values."""
        if name in self.columns:
            return self.columns[name][1]
        return self[name].shape[2:]

    def at(self, name: str, row, token, *index):
        """Where a token's values with this index lie."""
        if name not in self.columns:
            return self[name].at[row, token, *index]
        start, sizes = self.columns[name]
        column = index[0] if len(sizes) == 1 else index[0] * sizes[1] + index[1]
        return self[name].at[row, token, start + column]

    def read(self, name: str, index, mask, other=0.0):
        """Loads values of tokens; the index begins with row and token."""
        at = self.at(name, *index)
        return plt.load(at, mask=mask, other=None if mask is None else other)

    def load(self, name: str, index, mask, other=0.0):
        """The same in float32."""
        return self.read(name, index, mask, other).astype(jnp.float32)


def _tokens(refs):
    """Pending slots and new tokens; there is no array of no slots."""
    slots = refs["old_x"].shape[1] if "old_x" in refs else 0
    return slots, refs["x"].shape[1]


def _when_active(refs, row, work, skip):
    """Runs `work`, or `skip` for a row that is not active."""
    if "is_active" not in refs:
        work()
        return
    is_active = refs["is_active"][row] != 0
    pl.when(is_active)(work)
    pl.when(jnp.logical_not(is_active))(skip)


def _selective_kernel(*refs, names, columns, channels, states, is_log):
    """Some channels of one row: h [channels, states] through all the tokens.

    What is one number a token and channel is loaded and computed as a tile of all the
    tokens and then taken apart, so that no lane computes it again for every state.
    """
    refs = _Refs(names, refs, columns)
    row = pl.program_id(1)
    d_inner, n = refs["A"].shape
    slots, tokens = _tokens(refs)
    e = tiles.Part.create(pl.program_id(0) * channels, channels, d_inner)
    i, j, mask = tiles.spread(e, tiles.Part.create(0, states, n))

    def optional(name):
        return (
            tiles.load(refs[name], (e.at,), e.inside)[None, :] if name in refs else None
        )

    def part(count):
        return tiles.Part.create(0, gpu.power_of_two(count), count)

    def tile(name, count):
        t, c, inside = tiles.spread(part(count), e)
        return refs.load(name, (row, t, c), inside)

    def maps(name, count):
        group = i // (d_inner // refs.sizes(name)[0])
        return [refs.load(name, (row, t, group, j), mask) for t in range(count)]

    def work():
        count = refs["num_pending"][row]
        bias, skip = optional("dt_bias"), optional("D")
        A = tiles.rates(tiles.load(refs["A"], (i, j), mask), is_log)
        h = tiles.load(refs["state"], (row, i, j), mask)
        if slots:
            old_x, old_dt = tile("old_x", slots), tile("old_dt", slots)
            old_B = maps("old_B", slots)
        x, dt, z = tile("x", tokens), tile("dt", tokens), None
        B, C = maps("B", tokens), maps("C", tokens)
        if "z" in refs:
            z = tile("z", tokens)

        def step_sizes(dt):
            return gpu.softplus(dt if bias is None else dt + bias)

        def advance(h, dt, dt_x, B):
            return gpu.exp2(dt[:, None] * A) * h + dt_x[:, None] * B

        if slots:
            replayed = (part(slots).at < count)[:, None]
            old_dt = jnp.where(replayed, step_sizes(old_dt), 0.0)
            old = (
                tiles.unstack(old_dt, slots),
                tiles.unstack(old_dt * old_x, slots),
                old_B,
            )
            for token in zip(*old, strict=True):
                h = advance(h, *token)
        if "new_state" in refs:
            plt.store(refs["new_state"].at[row, i, j], h, mask=mask)
        dt = step_sizes(dt)
        new = (tiles.unstack(dt, tokens), tiles.unstack(dt * x, tokens), B)
        ys = []
        for out, *token in zip(C, *new, strict=True):
            h = advance(h, *token)
            ys.append(jnp.sum(h * out, axis=1))
        y = tiles.stack(ys)
        if skip is not None:
            y = y + skip * x
        put(y if z is None else y * z * gpu.sigmoid(z))

    def put(y):
        t, c, inside = tiles.spread(part(tokens), e)
        plt.store(refs["y"].at[row, t, c], y.astype(refs["y"].dtype), mask=inside)

    def nothing():
        put(jnp.zeros((gpu.power_of_two(tokens), channels), jnp.float32))

    _when_active(refs, row, work, nothing)


def _call(kernel, inputs, y, grid, *, commit, num_warps):
    """Runs a kernel; its first input, the state, is an output too where committed.

    `y` is the shape of the other output, or of several by name.
    """
    first = next(iter(inputs))
    state = inputs[first]
    columns = {n: (v.start, v.sizes) for n, v in inputs.items() if _is_columns(v)}
    arrays = [v.values if _is_columns(v) else v for v in inputs.values()]
    ys = {"y": y} if isinstance(y, jax.ShapeDtypeStruct) else y
    names = (*inputs, *ys, *([f"new_{first}"] if commit else []))
    out_shape = [
        *ys.values(),
        *[jax.ShapeDtypeStruct(state.shape, state.dtype)] * commit,
    ]
    outputs = pl.pallas_call(
        functools.partial(kernel, names=names, columns=columns),
        grid=grid,
        out_shape=out_shape,
        # In place where the caller's state may be overwritten, as in a decoding loop.
        input_output_aliases={0: len(ys)} if commit else {},
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=gpu.INTERPRET,
        name=kernel.func.__name__.strip("_"),
    )(*arrays)
    found = outputs[0] if ys is not y else tuple(outputs[: len(ys)])
    return (found, outputs[-1] if commit else state)


def _inputs(state, pending, num_pending, is_active):
    """The kernels' inputs by name, those of both mixers; the state is the first."""
    i32 = jnp.int32
    inputs = {"state": state.astype(jnp.float32)}
    inputs["num_pending"] = num_pending.astype(i32)
    if is_active is not None:
        inputs["is_active"] = is_active.astype(i32)
    if pending.x.shape[1]:
        inputs |= {"old_x": pending.x, "old_dt": pending.dt, "old_B": pending.B}
    return inputs


def _is_columns(value):
    return isinstance(value, Columns)


def _given(**arrays):
    return {name: value for name, value in arrays.items() if value is not None}


def selective_multi_step(
    state,
    pending,
    num_pending,
    x,
    dt,
    A,
    B,
    C,
    *,
    D,
    z,
    dt_bias,
    A_is_log,
    is_active,
    commit,
):
    """Returns (y, state_j); see `api.selective_multi_step` for the arguments."""
    batch, tokens, d_inner = x.shape
    floats = (x, dt, B, C, *pending)
    _check_runs("selective_multi_step", tokens + pending.x.shape[1], *floats)
    inputs = _inputs(state, pending, num_pending, is_active)
    inputs |= {"x": x, "dt": dt, "A": A, "B": B, "C": C}
    inputs |= _given(D=D, z=z, dt_bias=dt_bias)
    states = gpu.power_of_two(A.shape[1])
    is_large = batch * d_inner * states > MANY_VALUES
    is_long = tokens + pending.x.shape[1] >= MANY_TOKENS
    values = STATE_VALUES * (2 if is_large or is_long else 1)
    channels = max(1, values // states)
    kernel = functools.partial(
        _selective_kernel, channels=channels, states=states, is_log=A_is_log
    )
    return _call(
        kernel,
        inputs,
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        (pl.cdiv(d_inner, channels), batch),
        commit=commit,
        num_warps=4 if is_long and not is_large else 1,
    )


def _ssd_kernel(*refs, names, columns, width, states, is_log, exact):
    """Some columns of a head's state, h [states, columns], through all the tokens.

    As in `ssd`, the tokens meet in matrix products, so that the state is multiplied
    twice however many there are: by the pending tokens' decay and by the new ones' C.
    """
    refs = _Refs(names, refs, columns)
    row = pl.program_id(1)
    _, heads, n, head_dim = refs["state"].shape
    slots, tokens = _tokens(refs)
    blocks = pl.cdiv(head_dim, width)
    head = pl.program_id(0) // blocks
    group = head // (heads // refs.sizes("x")[0])
    p = tiles.Part.create(pl.program_id(0) % blocks * width, width, head_dim)
    n = tiles.Part.create(0, states, n)
    i, j, mask = tiles.spread(n, p)
    dot = functools.partial(_dot, exact)

    def new_tokens():
        return tiles.Part.create(0, gpu.power_of_two(tokens, MIN_DOT), tokens)

    def tile(name, token, part, which):
        t, c, inside = tiles.spread(token, part)
        return refs.read(name, (row, t, which, c), inside)

    def raw_steps(name, token):
        return refs.load(name, (row, token.at, head), token.inside, NO_STEP)

    def scalar(name):
        return refs[name][head].astype(jnp.float32) if name in refs else None

    def work():
        # The exponential is an instruction for vectors: of one value.
        A = jnp.sum(tiles.rates(jnp.full((1,), scalar("A"), jnp.float32), is_log))
        bias, skip = scalar("dt_bias"), scalar("D")
        count = refs["num_pending"][row]
        h = tiles.load(refs["state"], (row, head, i, j), mask)
        if slots:
            old = tiles.Part.create(0, gpu.power_of_two(slots, MIN_DOT), slots)
            old_x, old_B = tile("old_x", old, p, group), tile("old_B", old, n, group)
            old_dt = raw_steps("old_dt", old)
        new = new_tokens()
        x, B = tile("x", new, p, group), tile("B", new, n, group)
        C, dt = tile("C", new, n, head), raw_steps("dt", new)

        def step_sizes(dt):
            return gpu.softplus(dt if bias is None else dt + bias)

        if slots:
            old_dt = jnp.where(old.at < count, step_sizes(old_dt), 0.0)
            later = old.at[None, :] > old.at[:, None]
            weight = old_dt * gpu.exp2(_masked_sums(later, old_dt) * A)
            decay = gpu.exp2(jnp.broadcast_to(jnp.sum(old_dt) * A, h.shape))
            h = decay * h + dot(old_B.astype(h.dtype) * weight[:, None], old_x, 0, 0)
        if "new_state" in refs:
            plt.store(refs["new_state"].at[row, head, i, j], h, mask=mask)
        dt = step_sizes(dt)
        seen = new.at[None, :] <= new.at[:, None]
        decay = gpu.exp2(_sums_between(new.at, dt) * A)
        scores = dot(C, B, 1, 1) * decay * dt[None, :]
        y = dot(jnp.where(seen, scores, 0.0), x, 1, 0)
        y = y + gpu.exp2(_masked_sums(seen, dt) * A)[:, None] * dot(C, h, 1, 0)
        put(y if skip is None else y + skip * x.astype(y.dtype))

    def put(y):
        t, c, inside = tiles.spread(new_tokens(), p)
        plt.store(refs["y"].at[row, t, head, c], y.astype(refs["y"].dtype), mask=inside)

    def nothing():
        put(jnp.zeros((gpu.power_of_two(tokens, MIN_DOT), width), jnp.float32))

    _when_active(refs, row, work, nothing)


def _ssd_step_kernel(*refs, names, columns, width, states, is_log):
    """`_ssd_kernel` for single tokens: they need no matrix products."""
    refs = _Refs(names, refs, columns)
    row = pl.program_id(1)
    _, heads, n, head_dim = refs["state"].shape
    slots, tokens = _tokens(refs)
    blocks = pl.cdiv(head_dim, width)
    head = pl.program_id(0) // blocks
    group = head // (heads // refs.sizes("x")[0])
    p = tiles.Part.create(pl.program_id(0) % blocks * width, width, head_dim)
    n = tiles.Part.create(0, states, n)
    i, j, mask = tiles.spread(n, p)

    def vector(name, t, part, which):
        return refs.load(name, (row, t, which, part.at), part.inside)

    def scalar(name):
        return refs[name][head].astype(jnp.float32) if name in refs else None

    def work():
        # The exponential is an instruction for vectors: of one value.
        A = jnp.sum(tiles.rates(jnp.full((1,), scalar("A"), jnp.float32), is_log))
        bias, skip = scalar("dt_bias"), scalar("D")
        count = refs["num_pending"][row]
        h = tiles.load(refs["state"], (row, head, i, j), mask)

        def load(prefix, count):
            at = tiles.Part.create(0, gpu.power_of_two(count), count)
            dt = refs.load(f"{prefix}dt", (row, at.at, head), at.inside, NO_STEP)
            x = [vector(f"{prefix}x", t, p, group) for t in range(count)]
            return (
                at.at,
                dt,
                x,
                [vector(f"{prefix}B", t, n, group) for t in range(count)],
            )

        def decays(at, dt, count):
            """Step size and decay of every token, as scalars."""
            values = (dt, gpu.exp2(dt * A))
            return [
                [jnp.sum(jnp.where(at == t, v, 0.0)) for v in values]
                for t in range(count)
            ]

        def step_sizes(dt):
            return gpu.softplus(dt if bias is None else dt + bias)

        old = load("old_", slots) if slots else None
        at, dt, xs, Bs = load("", tokens)
        Cs = [vector("C", t, n, head) for t in range(tokens)]
        if slots:
            old_at, old_dt, old_xs, old_Bs = old
            old_dt = jnp.where(old_at < count, step_sizes(old_dt), 0.0)
            scalars = decays(old_at, old_dt, slots)
            for (step, decay), x, B in zip(scalars, old_xs, old_Bs, strict=True):
                h = decay * h + (step * B)[:, None] * x[None, :]
        if "new_state" in refs:
            plt.store(refs["new_state"].at[row, head, i, j], h, mask=mask)
        scalars = decays(at, step_sizes(dt), tokens)
        new = zip(scalars, xs, Bs, Cs, strict=True)
        for t, ((step, decay), x, B, C) in enumerate(new):
            h = decay * h + (step * B)[:, None] * x[None, :]
            y = jnp.sum(h * C[:, None], axis=0)
            put(t, y if skip is None else y + skip * x)

    def put(t, y):
        y = y.astype(refs["y"].dtype)
        plt.store(refs["y"].at[row, t, head, p.at], y, mask=p.inside)

    def nothing():
        for t in range(tokens):
            put(t, jnp.zeros((width,), jnp.float32))

    _when_active(refs, row, work, nothing)


def _dot(exact, a, b, a_axis, b_axis):
    """A product with float32 sums; bfloat16 values are exact in TF32."""
    if a.dtype != b.dtype:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def _masked_sums(mask, value):
    """Sums of value[q] over the q of each row of a mask [i, q]."""
    return jnp.sum(jnp.where(mask, value[None, :], 0.0), axis=1)


def _sums_between(at, value):
    """Sums of value[q] over j < q <= i, [i, j].

    Not a difference of two cumulated sums, which a large early step would spoil.
    """
    size = at.shape[0]
    i, j, q = (
        lax.broadcasted_iota(jnp.int32, (size, size, size), axis) for axis in range(3)
    )
    inside = jnp.logical_and(q > j, q <= i)
    return jnp.sum(jnp.where(inside, value[None, None, :], 0.0), axis=2)


def ssd_multi_step(
    state,
    pending,
    num_pending,
    x,
    dt,
    A,
    B,
    C,
    *,
    D,
    dt_bias,
    A_is_log,
    is_active,
    commit,
):
    """Returns (y, state_j); see `api.ssd_multi_step` for the arguments."""
    batch, tokens, _, width = x.shape
    heads, n = C.shape[2:]
    floats = (x, dt, B, C, *pending)
    _check_runs("ssd_multi_step", tokens + pending.x.shape[1], *floats)
    inputs = _inputs(state, pending, num_pending, is_active)
    inputs |= {"x": x, "dt": dt, "A": A, "B": B, "C": C}
    inputs |= _given(D=D, dt_bias=dt_bias)
    columns = COLUMNS if batch * heads * width < MANY_COLUMNS else 2 * COLUMNS
    columns = min(columns, gpu.power_of_two(width, MIN_DOT))
    sizes = {
        "width": columns,
        "states": gpu.power_of_two(n, MIN_DOT),
        "is_log": A_is_log,
    }
    exact = any(a.dtype == jnp.float32 for a in (x, B, C, pending.x, pending.B))
    kernel = functools.partial(_ssd_kernel, exact=exact, **sizes)
    if max(tokens, pending.x.shape[1]) <= FEW_TOKENS:
        kernel = functools.partial(_ssd_step_kernel, **sizes)
    return _call(
        kernel,
        inputs,
        jax.ShapeDtypeStruct((batch, tokens, heads, width), x.dtype),
        (heads * pl.cdiv(width, columns), batch),
        commit=commit,
        num_warps=4,
    )


def _conv_kernel(*refs, names, columns, splits, block, repeats, group, width):
    """Some input channels of one row: T convolved tokens and the window before them."""
    refs = _Refs(names, refs, columns)
    row = pl.program_id(1)
    tokens, (channels,) = refs["x"].shape[1], refs.sizes("x")
    slots = refs["pending"].shape[1] if "pending" in refs else 0
    c = tiles.Part.create(pl.program_id(0) * block, block, channels)

    def load(name, token):
        return refs.load(name, (row, token, c.at), c.inside)

    def put(name, t, at, value):
        ref = refs[name]
        plt.store(ref.at[row, t, at], value.astype(ref.dtype), mask=c.inside)

    def put_y(t, f, value):
        start = 0
        for name, size in splits.items():
            mask, ref, at = c.inside, refs[name], f
            if len(splits) > 1:
                here = jnp.logical_and(f >= start, f < start + size)
                mask = here if mask is None else jnp.logical_and(mask, here)
                at = jnp.where(here, f - start, size)
            plt.store(ref.at[row, t, at], value.astype(ref.dtype), mask=mask)
            start += size

    # Where the repeats of an input channel lie: a group is repeated as a whole.
    outputs = [
        c.at // group * (group * repeats) + r * group + c.at % group
        for r in range(repeats)
    ]

    def work():
        count = jnp.clip(refs["num_pending"][row], 0, slots)
        new = [load("x", t) for t in range(tokens)]
        seen = [load("window", i) for i in range(width - 1)]
        seen += [load("pending", s) for s in range(slots)]
        window = seen[: width - 1]
        for s in range(1, slots + 1):
            later = seen[s : s + width - 1]
            window = [
                jnp.where(count == s, b, a) for a, b in zip(window, later, strict=True)
            ]
        inputs = [*window, *new]
        for f in outputs:
            taps = [tiles.load(refs["kernel"], (w, f), c.inside) for w in range(width)]
            bias = tiles.load(refs["bias"], (f,), c.inside)
            for t in range(tokens):
                y = bias
                for tap, value in zip(taps, inputs[t : t + width], strict=True):
                    y = y + tap * value
                put_y(t, f, y * gpu.sigmoid(y))
        if "new_window" in refs:
            for i, value in enumerate(window):
                put("new_window", i, c.at, value)

    def nothing():
        for f, t in itertools.product(outputs, range(tokens)):
            put_y(t, f, jnp.zeros((block,), jnp.float32))

    _when_active(refs, row, work, nothing)


def conv_multi_step(
    window, pending, num_pending, x, kernel, bias, *, group, splits, is_active, commit
):
    """Returns (y, window_j); see `api.conv_multi_step` for the arguments."""
    batch, tokens, channels = x.shape
    width, outputs = kernel.shape
    slots = pending.shape[1]
    _check_runs("conv_multi_step", tokens + slots, x, window, pending)
    if width == 1:
        raise UnsupportedError("one tap needs no window")
    i32 = jnp.int32
    inputs = {"window": window, "num_pending": num_pending.astype(i32)}
    inputs |= _given(is_active=None if is_active is None else is_active.astype(i32))
    inputs |= {"pending": pending} if slots else {}
    inputs |= {"x": x, "kernel": kernel, "bias": bias}
    block = CONV_BLOCK * (2 if batch * channels >= MANY_CHANNELS else 1)
    named = {"y": outputs}
    if splits is not None:
        named = {f"y{i}": size for i, size in enumerate(splits)}
    ys = {
        name: jax.ShapeDtypeStruct((batch, tokens, size), x.dtype)
        for name, size in named.items()
    }
    body = functools.partial(
        _conv_kernel,
        splits=named,
        block=block,
        repeats=outputs // channels,
        group=group,
        width=width,
    )
    return _call(
        body,
        inputs,
        ys["y"] if splits is None else ys,
        (pl.cdiv(channels, block), batch),
        commit=commit,
        num_warps=block // 32,
    )
