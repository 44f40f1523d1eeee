"""The selective scan's backward kernel in matrix fragments: bfloat16, 16 states a channel.

A warp owns a tile of 16 channels by 16 states, laid out as an accumulator of the tensor
cores: in lane 4 r + q, channels 2 r and 2 r + 1 and states 4 q ... 4 q + 3. Steps go in
groups of four. Whatever is per channel and step (softplus, gate) lane 4 r + q computes for
its two channels and step q of the group, and the tensor cores carry it to the lanes that
need it:

- `d x B` and `g C` are outer products, accumulated onto the decayed state and adjoint. The
  left operand holds the four steps' `d x` (in two bfloat16 pieces, for 16 bits), the right
  one B in the step's rows and zero in others.
- Sums over states are products with C, B or ones, which stand in the columns of the step,
  so that a group's sums end up in the lanes of their steps.
- Sums over channels are products of the transposed tile with `g` and `d x`, likewise.
"""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.selective_scan import pallas_triton_kernels as kernels
from pallas_kernels.selective_scan.warp_tiles import (
    F32,
    I32,
    WARP,
    Tiles,
    get,
    make,
    row_index,
)

# Channels and states of a warp's tile.
TILE = 16
# Steps of a group: lanes of a quad.
GROUP = 4
# Steps between the states that the first walk through a block leaves for the second.
SPARSE = 2
# Warps of a program. So many leave the compiler 128 registers a thread, and then all
# programs of a large batch run at once.
MOST_WARPS = 16
# bfloat16 ones.
ONES = 0x3F803F80


def fits(plan, dtypes):
    """Whether this kernel computes such a call."""
    whole_tiles = plan.state == TILE and plan.run % TILE == 0
    return whole_tiles and all(dtype == jnp.bfloat16 for dtype in dtypes)


def warps(plan):
    """Warps of a program, side by side over the channels."""
    return math.gcd(plan.channels // TILE, MOST_WARPS)


def programs(plan):
    """Programs of the grid."""
    return plan.batch * plan.chunks * (plan.channels // TILE // warps(plan))


def scratch(plan):
    """Space for a block's states."""
    shape = (programs(plan), kernels.BLOCK // SPARSE, warps(plan) * WARP, 4)
    return jax.ShapeDtypeStruct(shape, I32)


class _Program:
    """A program's place, and what its lanes load and store."""

    def __init__(self, plan, refs):
        self.plan, self.refs = plan, refs
        self.tiles = Tiles(plan.interpret)
        count = warps(plan)
        across = plan.channels // TILE // count
        self.program = pl.program_id(0)
        self.chunk = self.program // across % plan.chunks
        self.b = self.program // across // plan.chunks
        self.lane = jnp.arange(count * WARP, dtype=I32)
        self.r, self.q = self.lane % WARP // 4, self.lane % 4
        self.tile = self.program % across * count + self.lane // WARP
        self.channel = self.tile * TILE + 2 * self.r
        first = self.tile * TILE
        self.group_starts = {
            "B": first // (plan.channels // plan.B_groups) * TILE,
            "C": first // (plan.channels // plan.C_groups) * TILE,
        }
        self.first = self.chunk * plan.chunk
        self.blocks = pl.cdiv(min(plan.chunk, plan.length), kernels.BLOCK)
        if plan.length % plan.chunk:
            left = plan.length - self.first
            left = (left + kernels.BLOCK - 1) // kernels.BLOCK
            self.blocks = jnp.minimum(self.blocks, left)
        self.A2 = [a * kernels.LOG2E for a in self.states(refs.A)]
        self.A2_pairs = self.tiles.left(self.A2)
        self.bias = self.pair(refs.bias)
        self.selector = self.tiles.half_selector(self.r % 2)
        self.hidden_zero = self.tiles.hidden_zero(self.lane)

    def zeros(self, rows, dtype=F32):
        return jnp.zeros((rows, self.lane.shape[0]), dtype)

    def groups(self, start):
        """Groups of steps in the block that begins at `start`."""
        most = kernels.BLOCK // GROUP
        if not self.plan.ragged:
            return most
        return jnp.minimum(most, (self.plan.length - start + GROUP - 1) // GROUP)

    def time(self, t):
        """(the lane's step of the group at `t` or the last step, whether it exists)."""
        t = t + self.q
        if not self.plan.ragged:
            return t, None
        return jnp.minimum(t, self.plan.length - 1), t < self.plan.length

    def keep(self, value, exists):
        """Zero at steps that do not exist."""
        if exists is None:
            return value
        return jnp.where(exists if value.ndim == 1 else exists[None, :], value, 0.0)

    def pair(self, ref, *index):
        """The lane's two channels of an array [..., E]."""
        index = [i if jnp.ndim(i) == 0 else i[None, :] for i in index]
        return ref[(*index, self.channel[None, :] + row_index(2))]

    def store_pair(self, ref, value, *index, mask=None):
        """Stores the lane's two channels, where the mask is set."""
        channel = self.channel
        if mask is not None:
            # An interpreted store that is masked would write back old values.
            channel = jnp.where(mask, channel, self.plan.channels)
            mask = jnp.broadcast_to(mask[None, :], value.shape)
        index = [i if jnp.ndim(i) == 0 else i[None, :] for i in index]
        at = ref.at[(*index, channel[None, :] + row_index(2))]
        plt.store(at, value.astype(ref.dtype), mask=mask)

    def states(self, ref, *index):
        """A tile of an array [..., E, N], as two accumulators."""
        columns = 4 * self.q[None, :] + row_index(4)
        a, b = (ref[(*index, self.channel[None, :] + i, columns)] for i in (0, 1))
        a, b = ([get(v, i) for i in range(4)] for v in (a, b))
        return [make(*a[:2], *b[:2]), make(*a[2:], *b[2:])]

    def store_states(self, ref, accumulators, *index):
        columns = 4 * self.q[None, :] + row_index(4)
        first, second = ([get(v, i) for i in range(4)] for v in accumulators)
        for i in (0, 1):
            rows = slice(2 * i, 2 * i + 2)
            at = ref.at[(*index, self.channel[None, :] + i, columns)]
            plt.store(at, make(*first[rows], *second[rows]))

    def sparse(self, i):
        """Where state `i` of a block is kept."""
        return self.refs.scratch.at[self.program, i, self.lane[None, :], row_index(4)]

    def load(self, t, names):
        """A group of steps as it lies in memory."""
        t, _ = self.time(t)
        loaded = {}
        for name in names:
            ref = getattr(self.refs, name)
            if ref is None:
                continue
            if name in self.group_starts:
                start = self.group_starts[name] + 4 * (self.r // 2)
                index = (self.b, t[None, :], start[None, :] + row_index(4))
                loaded[name] = ref[index]
            elif name == "restart":
                loaded[name] = ref[self.b, t]
            else:
                loaded[name] = self.pair(ref, self.b, t)
        return loaded

    def run(self, count, load, body, state):
        """Runs `body` on groups, each loaded while the group before it is computed."""

        def step(i, carry):
            state, loaded = carry
            following = load(jnp.minimum(i + 1, count - 1))
            return body(i, loaded, state), following

        return lax.fori_loop(0, count, step, (state, load(0)))[0]

    def inputs(self, loaded, t):
        """What both walks need of a group, for the lane's two channels and its step."""
        t, exists = self.time(t)
        v = self.tiles.widen(loaded["dt"]) + self.bias
        d, u = kernels._softplus(v, self.plan)
        d = self.keep(d, exists)
        x = self.tiles.widen(loaded["x"])
        restart = loaded.get("restart")
        if restart is not None:
            restart = self.keep(restart, exists)
        return types.SimpleNamespace(
            t=t, exists=exists, x=x, v=v, u=u, d=d, dx=d * x, restart=restart
        )

    def factors(self, *values):
        """Left operand of the outer products of [2, lanes] values with B and C."""
        return make(*(get(self.tiles.split(v), i) for v in values for i in (0, 1)))

    def rows(self, loaded):
        """Rows of B or C, one in each lane's column: right operand of outer products."""
        return self.tiles.doubled(self.tiles.pairs_of_four(loaded), self.selector)

    def columns(self, loaded):
        """The same numbers as columns, of states: right operand of sums over states."""
        pairs = self.tiles.pairs_of_four(loaded)
        return self.tiles.across(pairs, 8 * self.q + self.r // 2)

    def decays(self, step, u, behind=None):
        """Decays of step `u`, not computed before the tile `behind` is."""
        d = self.tiles.quad(step.d, u)
        if behind is not None:
            d = self.tiles.after(d, get(behind, 0), self.hidden_zero)
        exponents = [make(*(get(d, i) for i in (0, 0, 1, 1))) * a for a in self.A2]
        if step.restart is not None:
            restart = self.tiles.quad(step.restart, u)[None, :]
            exponents = [e + restart for e in exponents]
        return [kernels._exp2(e, self.plan) for e in exponents]

    def add_outer(self, accumulators, factors, rows, u, first=0):
        """Adds factors of step `u`, from row `first` on, times its row of B or C."""
        rows = jnp.where((self.q == u)[None, :], rows, 0)
        return [
            self.tiles.multiply_narrow(value, factors, rows, first, i)
            for i, value in enumerate(accumulators)
        ]

    def advance(self, decays, h, factors, rows, u):
        decayed = [a * s for a, s in zip(decays, h, strict=True)]
        return self.add_outer(decayed, factors, rows, u)


@dataclasses.dataclass
class _Sums:
    """A group's sums: each product adds those of one step, in its two columns."""

    tiles: Tiles
    r: jax.Array
    states: jax.Array
    weighted: jax.Array
    channels: jax.Array

    def add(self, name, left, right, column):
        """Adds left @ right in that column of the eight."""
        right = jnp.where((self.r == column)[None, :], right, jnp.zeros_like(right))
        total = self.tiles.multiply(getattr(self, name), left, right)
        setattr(self, name, total)

    def by_step(self, name, offset):
        """[2, lanes]: the sums of a tile's two channels, in the lanes of their steps."""
        total = getattr(self, name)
        return make(get(total, offset), get(total, 2 + offset))


def _up(program, start, groups):
    """First walk: leaves a block's states in the scratch array, returns the last."""
    tiles = program.tiles

    def body(j, loaded, h):
        step = program.inputs(loaded, start + j * GROUP)
        factors = program.factors(step.dx, step.dx)
        rows = program.rows(loaded["B"])
        for u in range(GROUP):
            if u % SPARSE == 0:
                at = program.sparse((j * GROUP + u) // SPARSE)
                plt.store(at, tiles.left(h))
            h = program.advance(program.decays(step, u), h, factors, rows, u)
        return h

    h = program.run(
        groups,
        lambda j: program.load(start + j * GROUP, ("x", "dt", "B", "restart")),
        body,
        program.states(program.refs.kept, program.b, start // kernels.BLOCK),
    )
    return tiles.left(h)


def _gate(program, step, loaded):
    """Adds the upstream gradient, the gate's slope, and the ungated output's gradient."""
    step.dy = program.keep(program.tiles.widen(loaded["dy"]), step.exists)
    step.g, step.gate_slope = step.dy, None
    if "z" in loaded:
        z = program.tiles.widen(loaded["z"])
        sigmoid = kernels._sigmoid(z, program.plan)
        step.g = step.dy * (z * sigmoid)
        step.gate_slope = sigmoid * (1.0 + z * (1.0 - sigmoid))


def _operands(program, step, loaded):
    """A group's operands of the tensor cores."""
    tiles = program.tiles
    factors = program.factors(step.dx, step.g)
    rows = {name: program.rows(loaded[name]) for name in ("B", "C")}
    columns = {name: program.columns(loaded[name]) for name in ("B", "C")}
    weights = tiles.transpose(tiles.pair(step.g, step.dx))
    weights = [get(weights, 0), get(weights, 1)]
    return types.SimpleNamespace(
        factors=factors,
        rows=rows,
        columns=columns,
        weights=make(*weights, *weights),
        ones=jnp.full((4, program.lane.shape[0]), ONES, I32),
    )


def _pull_back(program, step, operands, sums, u, decays, before, after, carry):
    """One step backwards in time; states `before` and `after` it are left operands."""
    tiles = program.tiles
    adjoint, dA = carry
    sums.add("states", after, operands.columns["C"], 2 * u)
    sums.add("channels", tiles.transposed(after), operands.weights, 2 * u)
    adjoint = program.add_outer(adjoint, operands.factors, operands.rows["C"], u, 2)
    left = tiles.left(adjoint)
    sums.add("states", left, operands.columns["B"], 2 * u + 1)
    sums.add("channels", tiles.transposed(left), operands.weights, 2 * u + 1)
    adjoint = [a * s for a, s in zip(decays, adjoint, strict=True)]
    pulled = tiles.multiply_add(tiles.left(adjoint), before)
    weighted = tiles.multiply_add(pulled, program.A2_pairs)
    sums.add("weighted", weighted, operands.ones, 2 * u)
    d = tiles.quad(step.d, u)
    d = tiles.pair(d, d)
    d = make(*(get(d, i) for i in (0, 1, 0, 1)))
    return adjoint, tiles.multiply_add(d, pulled, dA)


def _walk_group(program, step, operands, kept, adjoint, after):
    """A group's steps backwards; (adjoint, share of dA, sums, state before them)."""
    tiles = program.tiles
    sums = _Sums(tiles, program.r, *(program.zeros(4) for _ in range(3)))
    dA = program.zeros(4, I32)
    for part in reversed(range(GROUP // SPARSE)):
        # Left alone, the compiler computes all decays first and runs out of registers.
        behind = adjoint[0] if part < GROUP // SPARSE - 1 else None
        states, decays, h = [kept[part]], [], tiles.accumulators(kept[part])
        for u in range(part * SPARSE, (part + 1) * SPARSE - 1):
            decays.append(program.decays(step, u, behind))
            rows = operands.rows["B"]
            h = program.advance(decays[-1], h, operands.factors, rows, u)
            states.append(tiles.left(h))
        decays.append(program.decays(step, (part + 1) * SPARSE - 1, behind))
        states.append(after)
        for i in reversed(range(SPARSE)):
            u, around = part * SPARSE + i, (decays[i], states[i], states[i + 1])
            carry = (adjoint, dA)
            adjoint, dA = _pull_back(program, step, operands, sums, u, *around, carry)
        after = kept[part]
    return adjoint, tiles.accumulators(dA), sums, after


def _store_group(program, step, sums, t, skip):
    """Stores a group's gradients; returns that of dt."""
    plan, refs = program.plan, program.refs
    # Steps past the end are masked: their own place, not the last step's.
    at = (program.b, step.t if step.exists is None else t + program.q)
    store = functools.partial(program.store_pair, mask=step.exists)
    y = sums.by_step("states", 0) + skip * step.x
    sum_B = sums.by_step("states", 1)
    if step.gate_slope is not None:
        store(refs.dz, step.dy * y * step.gate_slope, *at)
    dd = step.x * sum_B + (1.0 / kernels.LOG2E) * sums.by_step("weighted", 0)
    slope = kernels._reciprocal(1.0 + step.u, plan)
    slope = jnp.where(step.v >= 0.0, slope, step.u * slope)
    ddt = program.keep(dd * slope, step.exists)
    store(refs.ddt, ddt, *at)
    store(refs.dx, step.g * skip + step.d * sum_B, *at)
    state = program.tile * TILE + 4 * (program.r // 2) + program.r % 2
    for i, (ref, offset) in enumerate(
        ((refs.dC, 0), (refs.dB, 0), (refs.dC, 2), (refs.dB, 2))
    ):
        value = get(sums.channels, i).astype(ref.dtype)
        plt.store(ref.at[(*at, state + offset)], value, mask=step.exists)
    return ddt


def _down(program, start, groups, last, carry):
    """Second walk: pulls gradients back through a block, whose last state is `last`."""

    def place(j):
        return groups - 1 - j

    def load(j):
        names = ("x", "dt", "z", "dy", "B", "C", "restart")
        first = place(j) * (GROUP // SPARSE)
        kept = [program.sparse(first + i)[...] for i in range(GROUP // SPARSE)]
        return program.load(start + place(j) * GROUP, names), kept

    def body(j, loaded, carry):
        loaded, kept = loaded
        adjoint, dA, dD, dbias, after = carry
        t = start + place(j) * GROUP
        # Not kept from group to group: two registers that would have to be spilled.
        skip = program.pair(program.refs.D)
        step = program.inputs(loaded, t)
        _gate(program, step, loaded)
        operands = _operands(program, step, loaded)
        adjoint, share, sums, after = _walk_group(
            program, step, operands, kept, adjoint, after
        )
        dA = [s + v for s, v in zip(dA, share, strict=True)]
        ddt = _store_group(program, step, sums, t, skip)
        return adjoint, dA, dD + step.g * step.x, dbias + ddt, after

    return program.run(groups, load, body, (*carry, last))[:-1]


def backward_kernel(plan, refs):
    """All gradients; the sums over time are those of the program's chunk."""
    program = _Program(plan, refs)
    here = (program.b, program.chunk)

    def block(i, carry):
        start = program.first + (program.blocks - 1 - i) * kernels.BLOCK
        groups = program.groups(start)
        # The walks talk through the scratch array: a lane reads what it wrote.
        last = _up(program, start, groups)
        return _down(program, start, groups, last, carry)

    zeros = [program.zeros(rows) for rows in (4, 4, 2, 2)]
    carry = (program.states(refs.dh, *here), zeros[:2], *zeros[2:])
    adjoint, dA, *sums = lax.fori_loop(0, program.blocks, block, carry)
    program.store_states(refs.dh0, adjoint, *here)
    program.store_states(refs.dA, dA, *here)
    for ref, value in zip((refs.dD, refs.dbias), sums, strict=True):
        total = program.tiles.quad_sum(value)
        program.store_pair(ref, total, *here, mask=program.q == 0)
