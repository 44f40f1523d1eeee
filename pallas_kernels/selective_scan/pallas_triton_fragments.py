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

from pallas_kernels.selective_scan import pallas_triton_bfloat16 as rough
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
# Steps whose decays and states are in registers at a time.
PART = 2
# What the two walks through a block load of each group.
FIRST_WALK = ("x", "dt", "B", "restart")
WALK_BACK = (*FIRST_WALK, "z", "dy", "C")
# bfloat16 ones.
ONES = 0x3F803F80


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the backward kernel works; every choice computes the same sums.

    Attributes:
      warps: Warps of a program, at most. With 16 the compiler has 128 registers a thread,
        and all programs of a large batch run at once.
      apart: Steps, 2 or 4, between the states that the walk back in time starts from,
        where the forward pass keeps one a block of time. A first walk through the block
        computes the others again; none does where the forward pass keeps those.
    """

    warps: int
    apart: int


LAYOUT = Layout(warps=16, apart=4)


def fits(plan, dtypes):
    """Whether this kernel computes such a call."""
    whole_tiles = plan.state == TILE and plan.run % TILE == 0
    return whole_tiles and all(dtype == jnp.bfloat16 for dtype in dtypes)


def kept_every(plan, dtypes, wanted):
    """Steps between the states that the forward pass keeps; only here less than 64."""
    known = wanted <= GROUP and fits(plan, dtypes)
    return wanted if known else kernels.BLOCK


def warps(plan):
    """Warps of a program, side by side over the channels."""
    return math.gcd(plan.channels // TILE, LAYOUT.warps)


def programs(plan):
    """Programs of the grid."""
    return plan.batch * plan.chunks * (plan.channels // TILE // warps(plan))


def scratch(plan):
    """Space for a block's states."""
    shape = (programs(plan), kernels.BLOCK // LAYOUT.apart, warps(plan) * WARP, 4)
    return jax.ShapeDtypeStruct(shape, I32)


class _Program:
    """A program's place, and what its lanes load and store."""

    def __init__(self, plan, refs):
        self.plan, self.refs = plan, refs
        self.kept = plan.kept_every < kernels.BLOCK
        self.apart = plan.kept_every if self.kept else LAYOUT.apart
        self.tiles = Tiles(plan.interpret)
        count = warps(plan)
        across = plan.channels // TILE // count
        self.program = pl.program_id(0)
        self.chunk = self.program // across % plan.chunks
        self.b = self.program // across // plan.chunks
        self.here = (self.b, self.chunk)
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

    def groups(self, start, steps):
        """Groups in the block or chunk of so many steps that begins at `start`."""
        if self.plan.length % steps == 0:
            return steps // GROUP
        left = (self.plan.length - start + GROUP - 1) // GROUP
        return jnp.minimum(steps // GROUP, left)

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
        """Where the first walk leaves state `i` of a block."""
        return self.refs.scratch.at[self.program, i, self.lane[None, :], row_index(4)]

    def known(self, start, group):
        """States at every `apart` steps of a group, of the block or chunk at `start`."""
        count = GROUP // self.apart
        if not self.kept:
            return [self.sparse(group * count + i)[...] for i in range(count)]
        first = start // self.apart + group * count
        columns = 4 * self.q[None, :] + row_index(4)
        loaded = [
            [
                self.refs.kept[self.b, first + i, self.channel[None, :] + p, columns]
                for p in range(2)
            ]
            for i in range(count)
        ]
        return [[self.tiles.pairs(tile) for tile in both] for both in loaded]

    def left(self, known):
        """A known state as the left operand of products."""
        if not self.kept:
            return known
        a, b = known
        return make(get(a, 0), get(b, 0), get(a, 1), get(b, 1))

    def load(self, t, names):
        """A group of steps as it lies in memory, bfloat16 in pairs.

        The halves of a pair that is carried through a loop the compiler may swap right
        behind the load, which then waits for memory.
        """
        t, _ = self.time(t)
        loaded = {}
        for name in names:
            ref = getattr(self.refs, name)
            if ref is None:
                continue
            if name in self.group_starts:
                start = self.group_starts[name] + 4 * (self.r // 2)
                index = (self.b, t[None, :], start[None, :] + row_index(4))
                loaded[name] = self.tiles.pairs(ref[index])
            elif name == "restart":
                loaded[name] = ref[self.b, t]
            else:
                loaded[name] = self.tiles.pairs(self.pair(ref, self.b, t))
        return loaded

    def run(self, count, load, body, state, loaded):
        """Runs `body` on groups, each loaded while the one before it is computed.

        `load` is asked for group `count` as well. Returns the state after the groups
        and that one, loaded.
        """

        def step(i, carry):
            state, loaded = carry
            following = load(i + 1)
            return body(i, loaded, state), following

        return lax.fori_loop(0, count, step, (state, loaded))

    def inputs(self, loaded, t):
        """What every walk needs of a group, for the lane's two channels and its step."""
        t, exists = self.time(t)
        v = self.tiles.widen(loaded["dt"]) + self.bias
        d, u = rough.softplus(v, self.plan)
        d = self.keep(d, exists)
        slope = kernels._reciprocal(1.0 + u, self.plan)
        slope = jnp.where(v >= 0.0, slope, u * slope)
        step = types.SimpleNamespace(t=t, exists=exists, d=d, slope=slope, restart=None)
        if "x" in loaded:
            step.x = self.tiles.widen(loaded["x"])
            step.dx = d * step.x
        if "restart" in loaded:
            step.restart = self.keep(loaded["restart"], exists)
        return step

    def factors(self, *values):
        """Left operand of the outer products of [2, lanes] values with B and C."""
        return make(*(get(self.tiles.split(v), i) for v in values for i in (0, 1)))

    def rows(self, loaded):
        """Rows of B or C, one in each lane's column: right operand of outer products."""
        return self.tiles.doubled(self.tiles.operand(loaded), self.selector)

    def columns(self, loaded):
        """The same numbers as columns, of states: right operand of sums over states."""
        pairs = self.tiles.operand(loaded)
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


def _up(program, start, groups, loaded):
    """First walk through a block, from its first group, `loaded`, on.

    Leaves states in the scratch array; returns those of the last group, the block's last
    state, and the last group, loaded: the walk back begins there.
    """
    tiles = program.tiles

    def body(j, loaded, carry):
        h, _ = carry
        step = program.inputs(loaded, start + j * GROUP)
        factors = program.factors(step.dx, step.dx)
        rows, known = program.rows(loaded["B"]), []
        for u in range(GROUP):
            if u % program.apart == 0:
                known.append(tiles.left(h))
                at = program.sparse((j * GROUP + u) // program.apart)
                plt.store(at, known[-1])
            h = program.advance(program.decays(step, u), h, factors, rows, u)
        return h, known

    def load(j):
        t = start + jnp.minimum(j, groups - 1) * GROUP
        return program.load(t, FIRST_WALK)

    h = program.states(program.refs.kept, program.b, start // kernels.BLOCK)
    known = [program.zeros(4, I32)] * (GROUP // program.apart)
    (h, known), loaded = program.run(groups, load, body, (h, known), loaded)
    return known, tiles.left(h), loaded


def _gate(program, step, loaded):
    """Adds the gradients of the ungated output and, for each unit of that, of the gate."""
    dy = program.keep(program.tiles.widen(loaded["dy"]), step.exists)
    step.g, step.dz = dy, None
    if "z" in loaded:
        z = program.tiles.widen(loaded["z"])
        sigmoid = rough.sigmoid(z, program.plan)
        step.g = dy * (z * sigmoid)
        step.dz = dy * (sigmoid * (1.0 + z * (1.0 - sigmoid)))


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


def _walk_group(program, step, operands, known, adjoint, after):
    """A group's steps backwards; (adjoint, share of dA, sums, state before them)."""
    tiles, apart = program.tiles, program.apart
    sums = _Sums(tiles, program.r, *(program.zeros(4) for _ in range(3)))
    dA = program.zeros(4, I32)
    # Before each step and after the last one.
    states = {i * apart: state for i, state in enumerate(known)} | {GROUP: after}

    def advance(u, decays):
        h = tiles.accumulators(states[u])
        h = program.advance(decays, h, operands.factors, operands.rows["B"], u)
        states[u + 1] = tiles.left(h)

    for u in range(GROUP - PART):
        if (u // PART + 1) * PART not in states:
            advance(u, program.decays(step, u))
    for first in reversed(range(0, GROUP, PART)):
        # Left alone, the compiler computes all decays first and runs out of registers.
        behind = adjoint[0] if first + PART < GROUP else None
        decays = {}
        for u in range(first, first + PART):
            decays[u] = program.decays(step, u, behind)
            if u + 1 not in states:
                advance(u, decays[u])
        for u in reversed(range(first, first + PART)):
            around = (decays[u], states[u], states[u + 1])
            carry = (adjoint, dA)
            adjoint, dA = _pull_back(program, step, operands, sums, u, *around, carry)
    return adjoint, tiles.accumulators(dA), sums, states[0]


def _store_group(program, step, sums, t, skip):
    """Stores a group's gradients; returns that of dt."""
    refs = program.refs
    # Steps past the end are masked: their own place, not the last step's.
    at = (program.b, step.t if step.exists is None else t + program.q)
    store = functools.partial(program.store_pair, mask=step.exists)
    y = sums.by_step("states", 0) + skip * step.x
    sum_B = sums.by_step("states", 1)
    if step.dz is not None:
        store(refs.dz, step.dz * y, *at)
    dd = step.x * sum_B + (1.0 / kernels.LOG2E) * sums.by_step("weighted", 0)
    ddt = program.keep(dd * step.slope, step.exists)
    store(refs.ddt, ddt, *at)
    store(refs.dx, step.g * skip + step.d * sum_B, *at)
    state = program.tile * TILE + 4 * (program.r // 2) + program.r % 2
    for i, (ref, offset) in enumerate(
        ((refs.dC, 0), (refs.dB, 0), (refs.dC, 2), (refs.dB, 2))
    ):
        value = get(sums.channels, i).astype(ref.dtype)
        plt.store(ref.at[(*at, state + offset)], value, mask=step.exists)
    return ddt


def _down(program, start, groups, loaded, last, carry, following):
    """Pulls gradients back through a block or a chunk.

    Args:
      program: The program's place.
      start: Its first step.
      groups: How many groups it has.
      loaded: (the last of them, loaded; the states known in it).
      last: The state after it.
      carry: What is carried from block to block.
      following: First step of the group to load in the end.

    Returns:
      (what is carried on, that group, loaded).
    """

    def load(j):
        place = groups - 1 - j
        t = jnp.where(j < groups, start + place * GROUP, following)
        known = program.known(start, jnp.maximum(place, 0))
        return program.load(t, WALK_BACK), known

    def body(j, loaded, carry):
        loaded, known = loaded
        adjoint, dA, dD, dbias, after = carry
        t = start + (groups - 1 - j) * GROUP
        # Not kept from group to group: two registers that would have to be spilled.
        skip = program.pair(program.refs.D)
        step = program.inputs(loaded, t)
        _gate(program, step, loaded)
        operands = _operands(program, step, loaded)
        known = [program.left(v) for v in known]
        adjoint, share, sums, after = _walk_group(
            program, step, operands, known, adjoint, after
        )
        dA = [s + v for s, v in zip(dA, share, strict=True)]
        ddt = _store_group(program, step, sums, t, skip)
        return adjoint, dA, dD + step.g * step.x, dbias + ddt, after

    carry, (loaded, _) = program.run(groups, load, body, (*carry, last), loaded)
    return carry[:-1], loaded


def _walk_chunk(program, carry):
    """Pulls gradients back through a chunk of which every group's states are kept."""
    start = program.first
    groups = program.groups(start, program.plan.chunk)
    last = program.tiles.left(program.states(program.refs.end, *program.here))
    t = start + (groups - 1) * GROUP
    loaded = program.load(t, WALK_BACK), program.known(start, groups - 1)
    return _down(program, start, groups, loaded, last, carry, start)[0]


def _walk_blocks(program, carry):
    """Pulls gradients back through a chunk, each block of time walked twice.

    A walk's last iteration loads the first group of the next walk.
    """

    def block(i, carry):
        carry, loaded = carry
        start = program.first + (program.blocks - 1 - i) * kernels.BLOCK
        groups = program.groups(start, kernels.BLOCK)
        # What the first walk does not load.
        names = [name for name in WALK_BACK if name not in FIRST_WALK]
        rest = program.load(start + (groups - 1) * GROUP, names)
        # The walks talk through the scratch array: a lane reads what it wrote.
        known, last, loaded = _up(program, start, groups, loaded)
        loaded = loaded | rest, known
        before = jnp.maximum(start - kernels.BLOCK, program.first)
        carry, loaded = _down(program, start, groups, loaded, last, carry, before)
        return carry, {name: loaded[name] for name in FIRST_WALK if name in loaded}

    start = program.first + (program.blocks - 1) * kernels.BLOCK
    carry = carry, program.load(start, FIRST_WALK)
    return lax.fori_loop(0, program.blocks, block, carry)[0]


def backward_kernel(plan, refs):
    """All gradients; the sums over time are those of the program's chunk."""
    program = _Program(plan, refs)
    zeros = [program.zeros(rows) for rows in (4, 4, 2, 2)]
    carry = (program.states(refs.dh, *program.here), zeros[:2], *zeros[2:])
    walk = _walk_chunk if program.kept else _walk_blocks
    adjoint, dA, *sums = walk(program, carry)
    program.store_states(refs.dh0, adjoint, *program.here)
    program.store_states(refs.dA, dA, *program.here)
    for ref, value in zip((refs.dD, refs.dbias), sums, strict=True):
        # All lanes of a quad store the same: a mask would take shared memory.
        program.store_pair(ref, program.tiles.quad_sum(value), *program.here)


def local_adjoint_kernel(plan, refs):
    """What a chunk's own outputs pull back to the state before it."""
    program = _Program(plan, refs)
    groups = program.groups(program.first, plan.chunk)

    def start(j):
        return program.first + (groups - 1 - j) * GROUP

    def body(j, loaded, adjoint):
        step = program.inputs(loaded, start(j))
        _gate(program, step, loaded)
        factors, rows = program.factors(step.g, step.g), program.rows(loaded["C"])
        for u in reversed(range(GROUP)):
            adjoint = program.add_outer(adjoint, factors, rows, u)
            decays = program.decays(step, u)
            adjoint = [a * s for a, s in zip(decays, adjoint, strict=True)]
        return adjoint

    def load(j):
        names = ("dt", "C", "z", "dy", "restart")
        return program.load(start(jnp.minimum(j, groups - 1)), names)

    adjoint = [program.zeros(4), program.zeros(4)]
    adjoint, _ = program.run(groups, load, body, adjoint, load(0))
    program.store_states(refs.end, adjoint, *program.here)
