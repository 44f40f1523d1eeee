"""The SSD scan and its gradients as Triton kernels, for CUDA GPUs.

Forward, one program for a head and a block of its width: it walks over the chunks with
the state in registers, so that nothing but inputs and outputs moves. Backward: the
forward writes the state before each chunk, one kernel walks back over the chunks for the
gradients of those states, and three more, parallel over chunks, give dC, dx and dB.

Where heads are too few to fill the chip, time is cut in parts: a first pass finds what
each part adds to the state, a few multiply-adds the states between the parts, and a
second pass runs all parts at once. Shapes are padded to what the kernels can tile.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import segments
from pallas_kernels.dispatch import UnsupportedError

# Interpret the kernels instead of compiling them; tests on a CPU set it.
INTERPRET = False

LOG2_E = math.log2(math.e)
# exp2 of this, and of anything below, is zero in float32. A state forgets all of what it
# held where the log-decay is this low: after a huge step, or where a segment begins.
FORGET = -160.0
# Log-decays are summed as multiples of this and remainders. Sums of up to 128 of the
# former fit a float32 exactly, so differences of sums lose nothing.
GRAIN = 2.0**-9
# A part of time has at least this many chunks, to be worth the first pass.
SHORTEST_PART = 4
# Programs that fill a large GPU.
ENOUGH_PROGRAMS = 256
# A program's chunks where log-decays are summed.
ROWS_OF_SUMS = 32
# GPUs with at least 163 KiB of shared memory for a program.
CAPABILITIES = ("8.0", "9.0", "10.0", "10.3")
LARGEST = 128
SMALLEST = 16


class Launch(NamedTuple):
    """A kernel's block of the width (or of the state), warps, and stages of loads."""

    block: int
    warps: int
    stages: int


# By the factors' bytes; see the README for what else was tried.
FORWARD = {2: Launch(128, 8, 3), 4: Launch(32, 4, 2)}
FORWARD_WITH_STATES = {2: Launch(64, 4, 2), 4: Launch(32, 4, 2)}
STATE_GRADIENTS = {2: Launch(128, 8, 3), 4: Launch(32, 4, 3)}
OUTPUT_GRADIENTS = {2: Launch(128, 4, 1), 4: Launch(128, 8, 1)}
X_GRADIENTS = {2: Launch(64, 4, 2), 4: Launch(32, 4, 2)}
B_GRADIENTS = {2: Launch(64, 4, 2), 4: Launch(32, 4, 2)}


class Plan(NamedTuple):
    """How time is cut: tokens of a chunk, parts; and whether to interpret."""

    chunk: int
    parts: int
    interpret: bool


def ssd(x, dt, A, B, C, *, D, dt_bias, initial_state, segment_ids):
    """Returns (y, final_state); see `api.ssd` for the arguments."""
    _check_supported(x, B, C)
    length, width, state = x.shape[1], x.shape[3], B.shape[3]
    heads, f32 = dt.shape[2], jnp.float32
    out_dtype = x.dtype
    # Products take bfloat16 factors as they are; anything else is multiplied in
    # float32.
    factor = jnp.bfloat16 if x.dtype == B.dtype == C.dtype == jnp.bfloat16 else f32
    rows, columns = _tile(state), _tile(width)
    plan = _plan(x.shape[0] * heads, length, factor)
    dt = dt.astype(f32)
    if dt_bias is not None:
        dt = dt + dt_bias.astype(f32)[None, None]
    dt = jnp.swapaxes(jax.nn.softplus(dt), 1, 2)
    log_decay = jnp.maximum(dt * (A.astype(f32) * LOG2_E)[None, :, None], FORGET)
    if segment_ids is not None:
        kept = segments.continues(segment_ids)[:, None]
        log_decay = jnp.where(kept, log_decay, FORGET)
    dt, log_decay = (_pad(v, {2: plan.chunk * plan.parts}) for v in (dt, log_decay))
    x, B, C = (
        _pad(v.astype(factor), {1: plan.chunk * plan.parts, 3: size})
        for v, size in ((x, columns), (B, rows), (C, rows))
    )
    D = jnp.zeros(heads, f32) if D is None else D.astype(f32)
    if initial_state is not None:
        initial_state = _pad(initial_state.astype(f32), {2: rows, 3: columns})
    y, final = _scan(plan, x, dt, log_decay, B, C, D, initial_state)
    return y[:, :length, :, :width].astype(out_dtype), final[:, :, :state, :width]


def _check_supported(x, B, C):
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    if not INTERPRET and platform not in ("gpu", "cuda"):
        raise UnsupportedError(f"needs a CUDA GPU, this is a {platform}")
    if not INTERPRET and device is None:
        capability = jax.local_devices()[0].compute_capability
        if capability not in CAPABILITIES:
            raise UnsupportedError(f"needs an A100's shared memory, not {capability}'s")
    for name, value in (("x", x), ("B", B), ("C", C)):
        if value.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
            raise UnsupportedError(f"does not take {name} in {value.dtype}")
    if max(x.shape[3], B.shape[3]) > LARGEST:
        raise UnsupportedError(f"heads or states are wider than {LARGEST}")
    if 0 in x.shape + C.shape:
        raise UnsupportedError("there is nothing to do")


def _tile(size: int) -> int:
    return max(SMALLEST, pl.next_power_of_2(size))


def _plan(sequences: int, length: int, dtype) -> Plan:
    """Cuts the work; `sequences` counts heads of all rows."""
    # Float32 factors take several times the registers.
    chunk = min(64 if dtype == jnp.bfloat16 else 16, _tile(length))
    parts = 1
    while (
        sequences * parts < ENOUGH_PROGRAMS
        and length >= 2 * parts * SHORTEST_PART * chunk
    ):
        parts *= 2
    return Plan(chunk, parts, INTERPRET)


def _pad(value, multiples: dict[int, int]):
    """Zeros at the end of the given axes, up to a multiple."""
    widths = [(0, -value.shape[a] % multiples.get(a, 1)) for a in range(value.ndim)]
    return jnp.pad(value, widths) if any(w for _, w in widths) else value


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(plan, x, dt, log_decay, B, C, D, initial_state):
    """(y, final state); dt and the log2 of the decays are [B H L], after softplus."""
    outputs = _forward(
        plan, x, dt, log_decay, B, C, D, initial_state, with_states=False
    )
    return outputs[:2]


def _scan_forward(plan, x, dt, log_decay, B, C, D, initial_state):
    y, final, states = _forward(
        plan, x, dt, log_decay, B, C, D, initial_state, with_states=True
    )
    has_state = None if initial_state is None else ()
    return (y, final), (x, dt, log_decay, B, C, D, states, has_state)


def _scan_backward(plan, saved, cotangents):
    x, dt, log_decay, B, C, D, states, has_state = saved
    dy, dfinal = cotangents
    sums = _chunk_sums(plan, log_decay)
    dstates, dinitial = _state_gradients(plan, sums, C, dy, dfinal)
    dC, ddt, dlog, dD = _output_gradients(plan, x, dt, sums, B, C, dy, states, dstates)
    dx = _x_gradients(plan, dt, sums, B, C, D, dy, dstates)
    dB, more_ddt, more_dlog = _B_gradients(plan, x, dt, sums, B, C, dy, dstates)
    dlog = (dlog + more_dlog) * (1 / LOG2_E)
    dinitial = None if has_state is None else dinitial
    return dx, ddt + more_ddt, dlog, dB, dC, jnp.sum(dD, axis=(0, 2)), dinitial


_scan.defvjp(_scan_forward, _scan_backward, optimize_remat=True)


def _chunk_sums(plan, log_decay):
    """Log-decays summed from a chunk's first token on, [B H L], in two summands."""
    flat = log_decay.reshape(-1, plan.chunk)
    rows = math.gcd(flat.shape[0], ROWS_OF_SUMS)
    spec = pl.BlockSpec((rows, plan.chunk), lambda i: (i, 0))
    made = (jax.ShapeDtypeStruct(flat.shape, jnp.float32), spec)
    sums = _call(
        functools.partial(_chunk_sums_kernel),
        {"log_decay": (flat, spec)},
        {"coarse": made, "fine": made},
        grid=(flat.shape[0] // rows,),
        launch=Launch(0, 4, 1),
        interpret=plan.interpret,
    )
    return tuple(v.reshape(log_decay.shape) for v in sums)


def _between(plan, sums, added, first, *, reverse=False):
    """States [B*parts H N P] at the start of each part (the end, if reverse).

    Args:
      plan: How the work is cut.
      sums: From `_chunk_sums`.
      added: What each part adds to the state, [B*parts H N P].
      first: The state before the first part (after the last), [B H N P] or None.
      reverse: Walk from the last part to the first.
    """
    batch, heads = sums[0].shape[:2]
    parts = plan.parts
    total = (sums[0] + sums[1])[:, :, plan.chunk - 1 :: plan.chunk]
    total = jnp.sum(total.reshape(batch, heads, parts, -1), axis=3)
    decays = jnp.exp2(total)[:, :, :, None, None]
    added = added.reshape(batch, parts, *added.shape[1:])
    order = range(parts - 1, 0, -1) if reverse else range(parts - 1)
    states = [jnp.zeros_like(added[:, 0]) if first is None else first]
    # A few multiply-adds, which XLA writes as one pass over the states.
    for part in order:
        states.append(decays[:, :, part] * states[-1] + added[:, part])
    states = jnp.stack(states[::-1] if reverse else states, axis=1)
    return states.reshape(batch * parts, *states.shape[2:])


def _forward(plan, x, dt, log_decay, B, C, D, initial_state, *, with_states):
    """[y, final state] and, if asked for, the states before the chunks."""
    sums = _chunk_sums(plan, log_decay)
    if plan.parts > 1:
        [added] = _walk(plan, x, dt, sums, B)
        initial_state = _between(plan, sums, added, initial_state)
    y, final, *states = _walk(
        plan, x, dt, sums, B, C, D, initial_state, with_states=with_states
    )
    return (y, final[plan.parts - 1 :: plan.parts], *states)


def _walk(plan, x, dt, sums, B, C=None, D=None, state=None, *, with_states=False):
    """Runs all parts of time: [y,] states after the parts [, states before chunks]."""
    batch, length, groups, width = x.shape
    heads, n = dt.shape[1], B.shape[3]
    tokens = length // plan.parts
    launch = (FORWARD_WITH_STATES if with_states else FORWARD)[x.dtype.itemsize]
    block = min(launch.block, width)
    specs = _Specs(plan, heads // groups, tokens, width, block)
    given = {
        "x": (x, specs.tokens(block, is_group=True, is_block=True)),
        "dt": (dt, specs.vector()),
        "coarse": (sums[0], specs.vector()),
        "fine": (sums[1], specs.vector()),
        "B": (B, specs.tokens(n, is_group=True)),
    }
    made = {}
    if C is not None:
        given["C"] = (C, specs.tokens(n))
        given["D"] = (D, specs.scalar())
        shape = jax.ShapeDtypeStruct((batch, length, heads, width), x.dtype)
        made["y"] = (shape, specs.tokens(block, is_block=True))
    if state is not None:
        given["initial"] = (state, specs.state(n))
    shape = (batch * plan.parts, heads, n, width)
    made["final"] = (jax.ShapeDtypeStruct(shape, jnp.float32), specs.state(n))
    if with_states:
        shape = (batch, heads, length // plan.chunk, width, n)
        made["states"] = (jax.ShapeDtypeStruct(shape, x.dtype), specs.states(n))
    return _call(
        functools.partial(_forward_kernel, plan=plan),
        given,
        made,
        grid=(heads * (width // block), batch * plan.parts),
        launch=launch,
        interpret=plan.interpret,
    )


def _state_gradients(plan, sums, C, dy, dfinal):
    """Gradients of the states after the chunks and of the initial state."""
    batch, length, heads, width = dy.shape
    n = C.shape[3]
    launch = STATE_GRADIENTS[dy.dtype.itemsize]
    block = min(launch.block, width)
    specs = _Specs(plan, 1, length // plan.parts, width, block)

    def walk(dfinal, with_states):
        given = {
            "coarse": (sums[0], specs.vector()),
            "fine": (sums[1], specs.vector()),
            "C": (C, specs.tokens(n)),
            "dy": (dy, specs.tokens(block, is_block=True)),
        }
        if dfinal is not None:
            given["dfinal"] = (dfinal, specs.state(n))
        shape = (batch * plan.parts, heads, n, width)
        made = {"dinitial": (jax.ShapeDtypeStruct(shape, jnp.float32), specs.state(n))}
        if with_states:
            shape = (batch, heads, length // plan.chunk, width, n)
            made["dstates"] = (jax.ShapeDtypeStruct(shape, dy.dtype), specs.states(n))
        return _call(
            functools.partial(_state_gradients_kernel, plan=plan),
            given,
            made,
            grid=(heads * (width // block), batch * plan.parts),
            launch=launch,
            interpret=plan.interpret,
        )

    if plan.parts > 1:
        [added] = walk(None, with_states=False)
        dfinal = _between(plan, sums, added, dfinal, reverse=True)
    dinitial, dstates = walk(dfinal, with_states=True)
    return dstates, dinitial[:: plan.parts]


def _output_gradients(plan, x, dt, sums, B, C, dy, states, dstates):
    """dC, and what its factors give for the gradients of dt, log-decays and D, [B H L].

    That is: all that concerns the outputs of a chunk, and the state handed through it.
    """
    batch, length, heads, width = dy.shape
    repeats, n = heads // x.shape[2], C.shape[3]

    def tokens(width, repeats=1):
        index = lambda h, c, b: (b, c, h // repeats, 0)  # noqa: E731
        return pl.BlockSpec((None, plan.chunk, None, width), index)

    vector = pl.BlockSpec((None, None, plan.chunk), lambda h, c, b: (b, h, c))
    state = pl.BlockSpec((None, None, None, width, n), lambda h, c, b: (b, h, c, 0, 0))
    per_token = (jax.ShapeDtypeStruct(dt.shape, jnp.float32), vector)
    return _call(
        functools.partial(_output_gradients_kernel, plan=plan),
        {
            "x": (x, tokens(width, repeats)),
            "dt": (dt, vector),
            "coarse": (sums[0], vector),
            "fine": (sums[1], vector),
            "B": (B, tokens(n, repeats)),
            "C": (C, tokens(n)),
            "dy": (dy, tokens(width)),
            "state": (states, state),
            "dstate": (dstates, state),
        },
        {
            "dC": (jax.ShapeDtypeStruct(C.shape, C.dtype), tokens(n)),
            "ddt": per_token,
            "dlog": per_token,
            "dD": per_token,
        },
        grid=(heads, length // plan.chunk, batch),
        launch=OUTPUT_GRADIENTS[x.dtype.itemsize],
        interpret=plan.interpret,
    )


def _x_gradients(plan, dt, sums, B, C, D, dy, dstates):
    """The gradient of x, summed over the heads of a group."""
    groups, width = B.shape[2], dy.shape[3]
    launch = X_GRADIENTS[B.dtype.itemsize]
    block = min(launch.block, width)
    specs = _GroupSpecs(plan, dt.shape[1] // groups, width // block)
    n = B.shape[3]
    [dx] = _call(
        functools.partial(_x_gradients_kernel, plan=plan),
        {
            "dt": (dt, specs.vectors()),
            "coarse": (sums[0], specs.vectors()),
            "fine": (sums[1], specs.vectors()),
            "B": (B, specs.tokens(n)),
            "C": (C, specs.tokens(n, of_heads=True)),
            "D": (D, specs.scalars()),
            "dy": (dy, specs.tokens(block, of_heads=True, is_block=True)),
            "dstate": (dstates, specs.states((block, n), (1, 0))),
        },
        {
            "dx": (
                jax.ShapeDtypeStruct((*B.shape[:3], width), B.dtype),
                specs.tokens(block, is_block=True),
            )
        },
        grid=specs.grid(B),
        launch=launch,
        interpret=plan.interpret,
    )
    return dx


def _B_gradients(plan, x, dt, sums, B, C, dy, dstates):
    """dB; gradients of dt and of log-decays from what is written to the state."""
    groups, width = x.shape[2:]
    launch = B_GRADIENTS[x.dtype.itemsize]
    block = min(launch.block, B.shape[3])
    specs = _GroupSpecs(plan, dt.shape[1] // groups, B.shape[3] // block)
    # Every block of the state has its share of the sums over the state.
    shares = jax.ShapeDtypeStruct((specs.blocks, *dt.shape), jnp.float32)
    dB, ddt, dlog = _call(
        functools.partial(_B_gradients_kernel, plan=plan),
        {
            "x": (x, specs.tokens(width)),
            "dt": (dt, specs.vectors()),
            "coarse": (sums[0], specs.vectors()),
            "fine": (sums[1], specs.vectors()),
            "B": (B, specs.tokens(block, is_block=True)),
            "C": (C, specs.tokens(block, of_heads=True, is_block=True)),
            "dy": (dy, specs.tokens(width, of_heads=True)),
            "dstate": (dstates, specs.states((width, block), (0, 1))),
        },
        {
            "dB": (
                jax.ShapeDtypeStruct(B.shape, B.dtype),
                specs.tokens(block, is_block=True),
            ),
            "ddt": (shares, specs.shares()),
            "dlog": (shares, specs.shares()),
        },
        grid=specs.grid(x),
        launch=launch,
        interpret=plan.interpret,
    )
    return dB, jnp.sum(ddt, axis=0), jnp.sum(dlog, axis=0)


class _GroupSpecs(NamedTuple):
    """Blocks of one program that runs over a group's heads, for one chunk."""

    plan: Plan
    repeats: int
    blocks: int

    def grid(self, x):
        return x.shape[2] * self.blocks, x.shape[1] // self.plan.chunk, x.shape[0]

    def _spec(self, shape, index):
        def place(program, chunk, row):
            return index(program // self.blocks, program % self.blocks, chunk, row)

        return pl.BlockSpec(shape, place)

    def tokens(self, size, *, of_heads=False, is_block=False):
        return self._spec(
            (None, self.plan.chunk, self.repeats if of_heads else None, size),
            lambda k, block, c, b: (b, c, k, block if is_block else 0),
        )

    def vectors(self):
        return self._spec(
            (None, self.repeats, self.plan.chunk), lambda k, block, c, b: (b, k, c)
        )

    def shares(self):
        return self._spec(
            (None, None, self.repeats, self.plan.chunk),
            lambda k, block, c, b: (block, b, k, c),
        )

    def scalars(self):
        return self._spec((self.repeats,), lambda k, block, c, b: (k,))

    def states(self, size, moves):
        return self._spec(
            (None, self.repeats, None, *size),
            lambda k, block, c, b: (b, k, c, moves[0] * block, moves[1] * block),
        )


class _Specs(NamedTuple):
    """Blocks of one program that walks over a part of time, for a block of a head."""

    plan: Plan
    repeats: int
    length: int
    width: int
    block: int

    def _spec(self, shape, index):
        blocks, parts = self.width // self.block, self.plan.parts

        def place(program, row):
            return index(program // blocks, program % blocks, row // parts, row % parts)

        return pl.BlockSpec(shape, place)

    def tokens(self, size, *, is_group=False, is_block=False):
        repeats = self.repeats if is_group else 1
        return self._spec(
            (None, self.length, None, size),
            lambda h, block, b, part: (b, part, h // repeats, block if is_block else 0),
        )

    def vector(self):
        return self._spec(
            (None, None, self.length), lambda h, block, b, part: (b, h, part)
        )

    def scalar(self):
        return self._spec((1,), lambda h, block, b, part: (h,))

    def state(self, n):
        parts = self.plan.parts
        return self._spec(
            (None, None, n, self.block),
            lambda h, block, b, part: (b * parts + part, h, 0, block),
        )

    def states(self, n):
        return self._spec(
            (None, None, self.length // self.plan.chunk, self.block, n),
            lambda h, block, b, part: (b, h, part, block, 0),
        )


def _call(kernel, given, made, *, grid, launch, interpret):
    """Runs a kernel on named (array, spec) pairs; returns the arrays made."""
    names = (*given, *made)

    def named(*refs):
        kernel(dict(zip(names, refs, strict=True)))

    return pl.pallas_call(
        named,
        grid=grid,
        in_specs=[spec for _, spec in given.values()],
        out_specs=[spec for _, spec in made.values()],
        out_shape=[shape for shape, _ in made.values()],
        compiler_params=plt.CompilerParams(
            num_warps=launch.warps, num_stages=launch.stages
        ),
        interpret=interpret,
        name="ssd" + kernel.func.__name__.removesuffix("_kernel"),
    )(*(array for array, _ in given.values()))


def _dot(plan, a, b, contract, *, units=True):
    """Product over the axes `contract` of a and b, summed in float32.

    Float32 factors are multiplied as float32, or as accurately by the matrix units, as
    three products. One kernel makes the compiler write 27,000 instructions in the
    latter way.
    """
    dims = (((contract[0],), (contract[1],)), ((), ()))
    if plan.interpret:
        # XLA:CPU has no product of bfloat16 factors with a float32 result.
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return lax.dot_general(a, b, dims, precision=lax.Precision.HIGHEST)
    precision = None
    if a.dtype == jnp.float32:
        exact, split = lax.Precision.HIGHEST, lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        precision = split if units else exact
    return lax.dot_general(
        a, b, dims, precision=precision, preferred_element_type=jnp.float32
    )


def _square(size):
    """Row and column numbers of a square."""
    return tuple(lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))


def _pair_decays(coarse, fine, *, transposed=False):
    """Decay from token j to token i, [i j] ([j i] if transposed), zero for j > i."""
    i, j = _square(coarse.shape[0])
    rows, columns = (lambda v: v[:, None]), (lambda v: v[None, :])
    if transposed:
        i, j, rows, columns = j, i, columns, rows
    between = (rows(coarse) - columns(coarse)) + (rows(fine) - columns(fine))
    # Masked before the exponential, which would overflow.
    return jnp.exp2(jnp.where(i >= j, between, 2 * FORGET))


def _decays_to_end(refs, plan, *at):
    """Decay from each token of the chunk `at` to the chunk's end."""
    last = plan.chunk - 1
    coarse = refs["coarse"][(*at, last)] - refs["coarse"][at]
    return jnp.exp2(coarse + (refs["fine"][(*at, last)] - refs["fine"][at]))


def _chunk_sums_kernel(refs):
    log_decay = refs["log_decay"][...]
    # Through integers, which cut off what is finer.
    coarse = (log_decay * (1 / GRAIN)).astype(jnp.int32).astype(jnp.float32) * GRAIN
    refs["coarse"][...] = jnp.cumsum(coarse, axis=1)
    refs["fine"][...] = jnp.cumsum(log_decay - coarse, axis=1)


def _forward_kernel(refs, plan):
    # The state is held transposed, [P N]: its copy as a factor of the outputs is then
    # the left one, which a tensor core takes from registers.
    chunk = plan.chunk
    x_ref, B_ref = refs["x"], refs["B"]
    low = x_ref.dtype

    def step(c, state):
        at = pl.ds(c * chunk, chunk)
        last = c * chunk + chunk - 1
        x, B = x_ref[at, :], B_ref[at, :]
        dt, coarse, fine = refs["dt"][at], refs["coarse"][at], refs["fine"][at]
        if "states" in refs:
            refs["states"][c] = state.astype(low)
        if "y" in refs:
            C = refs["C"][at, :]
            scores = _dot(plan, B, C, (1, 1))
            scores *= _pair_decays(coarse, fine, transposed=True) * dt[:, None]
            i, j = _square(chunk)
            scores += jnp.where(i == j, refs["D"][0], 0.0)
            carried = _dot(plan, state.astype(low), C, (1, 1))
            y = carried * jnp.exp2(coarse + fine)[None, :]
            y += _dot(plan, x, scores.astype(low), (0, 0))
            refs["y"][at, :] = y.astype(low).T
        coarse_end, fine_end = refs["coarse"][last], refs["fine"][last]
        weight = dt * jnp.exp2((coarse_end - coarse) + (fine_end - fine))
        weighted = (x.astype(jnp.float32) * weight[:, None]).astype(low)
        decay = jnp.exp2(coarse_end + fine_end)
        return state * decay + _dot(plan, weighted, B, (0, 0))

    if "initial" in refs:
        state = refs["initial"][...].T
    else:
        state = jnp.zeros((x_ref.shape[1], B_ref.shape[1]), jnp.float32)
    state = lax.fori_loop(0, x_ref.shape[0] // chunk, step, state)
    refs["final"][...] = state.T


def _state_gradients_kernel(refs, plan):
    # Transposed, as in the forward kernel.
    chunk = plan.chunk
    C_ref, dy_ref = refs["C"], refs["dy"]
    low = dy_ref.dtype
    chunks = dy_ref.shape[0] // chunk

    def step(i, dstate):
        c = chunks - 1 - i
        at = pl.ds(c * chunk, chunk)
        last = c * chunk + chunk - 1
        if "dstates" in refs:
            refs["dstates"][c] = dstate.astype(low)
        weight = jnp.exp2(refs["coarse"][at] + refs["fine"][at])
        weighted = (dy_ref[at, :].astype(jnp.float32) * weight[:, None]).astype(low)
        decay = jnp.exp2(refs["coarse"][last] + refs["fine"][last])
        return dstate * decay + _dot(plan, weighted, C_ref[at, :], (0, 0))

    if "dfinal" in refs:
        dstate = refs["dfinal"][...].T
    else:
        dstate = jnp.zeros((dy_ref.shape[1], C_ref.shape[1]), jnp.float32)
    refs["dinitial"][...] = lax.fori_loop(0, chunks, step, dstate).T


def _output_gradients_kernel(refs, plan):
    f32, low = jnp.float32, refs["x"].dtype
    dot = functools.partial(_dot, plan, units=False)
    i, j = _square(plan.chunk)
    last = plan.chunk - 1
    dt, coarse, fine = refs["dt"][...], refs["coarse"][...], refs["fine"][...]
    state = refs["state"][...]
    kept = state.astype(f32) * refs["dstate"][...].astype(f32)
    kept = jnp.sum(jnp.sum(kept, axis=0), axis=0)
    kept *= jnp.exp2(refs["coarse"][last] + refs["fine"][last])

    B, C, dy = refs["B"][...], refs["C"][...], refs["dy"][...]
    dscores = dot(dy, refs["x"][...], (1, 1))
    refs["dD"][...] = jnp.sum(jnp.where(i == j, dscores, 0.0), axis=0)
    dscores *= _pair_decays(coarse, fine)
    pairs = dot(C, B, (1, 1)) * dscores
    refs["ddt"][...] = jnp.sum(pairs, axis=0)
    dscores *= dt[None, :]
    pairs *= dt[None, :]
    read = dot(dy, state, (1, 0)) * jnp.exp2(coarse + fine)[:, None]
    dC = read + dot(dscores.astype(low), B, (1, 0))
    refs["dC"][...] = dC.astype(low)
    # A decay reaches the pairs of a token before it and one at or after it, what is read
    # of the state there, and the state as a whole. All are summed directly: a difference
    # of sums over rows and columns would cancel.
    dlog = dot(pairs.astype(low), (i < j).astype(low), (1, 0))
    dlog += jnp.sum(read * C.astype(f32), axis=1)[:, None]
    refs["dlog"][...] = jnp.sum(jnp.where(i >= j, dlog, 0.0), axis=0) + kept


def _x_gradients_kernel(refs, plan):
    B = refs["B"][...]
    low = B.dtype
    i, j = _square(plan.chunk)

    def head(r, dx):
        C, dy, dstate = refs["C"][:, r, :], refs["dy"][:, r, :], refs["dstate"][r]
        dt, coarse, fine = refs["dt"][r], refs["coarse"][r], refs["fine"][r]
        weight = dt * _decays_to_end(refs, plan, r)
        dx += _dot(plan, B, dstate, (1, 1)) * weight[:, None]
        decays = _pair_decays(coarse, fine) * dt[None, :]
        scores = _dot(plan, C, B, (1, 1)) * decays
        scores = (scores + jnp.where(i == j, refs["D"][r], 0.0)).astype(low)
        return dx + _dot(plan, scores, dy, (0, 0))

    dx = jnp.zeros(refs["dx"].shape, jnp.float32)
    dx = lax.fori_loop(0, refs["dt"].shape[0], head, dx)
    refs["dx"][...] = dx.astype(low)


def _B_gradients_kernel(refs, plan):
    f32 = jnp.float32
    x, B = refs["x"][...], refs["B"][...]
    low = x.dtype
    i, j = _square(plan.chunk)

    def head(r, dB):
        C, dy, dstate = refs["C"][:, r, :], refs["dy"][:, r, :], refs["dstate"][r]
        dt, coarse, fine = refs["dt"][r], refs["coarse"][r], refs["fine"][r]
        to_end = _decays_to_end(refs, plan, r)
        written = _dot(plan, x, dstate, (1, 0))
        ddt = jnp.sum(written * B.astype(f32), axis=1) * to_end
        refs["ddt"][r] = ddt
        # What is written passes through all decays after it.
        dlog = jnp.where(i < j, (ddt * dt)[:, None], 0.0)
        refs["dlog"][r] = jnp.sum(dlog, axis=0)
        dB += written * (to_end * dt)[:, None]
        decays = _pair_decays(coarse, fine) * dt[None, :]
        dscores = (_dot(plan, dy, x, (1, 1)) * decays).astype(low)
        return dB + _dot(plan, dscores, C, (0, 0))

    dB = lax.fori_loop(0, refs["dt"].shape[0], head, jnp.zeros(B.shape, f32))
    refs["dB"][...] = dB.astype(low)
