"""GPU kernels of the selective scan, in Pallas for Triton; `pallas_triton` runs them.

A lane owns one channel for a chunk of time and keeps all its N states in registers, so that
sums over n stay inside a lane and whatever is per channel (softplus, gate, skip) is computed
once. A row of B or C is loaded 16 bytes at a time, and the steps after the current ones are
loaded while those are computed.
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

WARP = 32
# Warps of a program where channels fill them: one for each scheduler of a multiprocessor.
WARPS = 4
# Steps between the states that the forward pass keeps for the backward pass.
BLOCK = 64
# Steps unrolled at a time.
FORWARD_STEPS = 4
BACKWARD_STEPS = 2

LOG2E = math.log2(math.e)
# log1p(u) / u on [0, 1], highest power first (a Chebyshev fit): relative error below 2e-7.
LOG1P = (
    0.00525345793,
    -0.0295885075,
    0.0783616677,
    -0.136747703,
    0.191114306,
    -0.248443693,
    0.333192706,
    -0.499995023,
    1.0,
)


def _unary(instruction, value, plan, otherwise):
    """One approximate instruction (subnormals are zero); plain JAX when interpreted."""
    if plan.interpret:
        return otherwise(value)
    [result] = plt.elementwise_inline_asm(
        f"{instruction}.approx.ftz.f32 $0, $1;",
        args=[value],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(value.shape, jnp.float32)],
    )
    return result


def _exp2(value, plan):
    return _unary("ex2", value, plan, jnp.exp2)


def _reciprocal(value, plan):
    return _unary("rcp", value, plan, lambda v: 1.0 / v)


def _widen(tile, plan):
    """float32 of a tile whose rows lie in a lane: one instruction a bfloat16 value."""
    if plan.interpret or tile.dtype != jnp.bfloat16:
        return tile.astype(jnp.float32)
    [result] = plt.elementwise_inline_asm(
        "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
        args=[tile],
        constraints="=r,=r,r",
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(tile.shape, jnp.float32)],
    )
    return result


def _softplus(v, plan):
    """(softplus(v), exp(-|v|)); a polynomial is cheaper than a logarithm here."""
    u = _exp2(jnp.abs(v) * -LOG2E, plan)
    p = jnp.full_like(u, LOG1P[0])
    for coefficient in LOG1P[1:]:
        p = p * u + coefficient
    return jnp.maximum(v, 0.0) + u * p, u


def _sigmoid(z, plan):
    return _reciprocal(1.0 + _exp2(z * -LOG2E, plan), plan)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about a call.

    Channels are laid out over lanes in runs that share their rows of B and of C, each run
    padded to a power of two or a multiple of a warp, so that no sum over a group's
    channels straddles a warp unevenly.
    """

    batch: int
    length: int
    channels: int
    state: int
    B_groups: int
    C_groups: int
    row: int
    chunk: int
    interpret: bool
    kept_every: int

    @property
    def kept(self):
        """The states that the forward pass keeps for the backward pass, every so often."""
        count = pl.cdiv(self.length, BLOCK) * (BLOCK // self.kept_every)
        shape = (self.batch, count, self.channels, self.state)
        sparse = self.kept_every == BLOCK
        return jax.ShapeDtypeStruct(shape, jnp.float32 if sparse else jnp.bfloat16)

    @property
    def rows(self):
        """Tiles of `row` states, 16 bytes of B each, that make up a channel's state."""
        return self.state // self.row

    @property
    def chunks(self):
        """Chunks of time, each a program's share."""
        return pl.cdiv(self.length, self.chunk)

    @property
    def ragged(self):
        """Whether the last block of time is cut short."""
        return self.length % BLOCK != 0

    @property
    def runs(self):
        """Groups of channels that share their rows of B and of C."""
        return math.lcm(self.B_groups, self.C_groups)

    @property
    def run(self):
        """Channels of a run."""
        return self.channels // self.runs

    @property
    def padded_run(self):
        """Lanes of a run."""
        if self.run < WARP:
            return pl.next_power_of_2(self.run)
        return pl.cdiv(self.run, WARP) * WARP

    @property
    def warps(self):
        """Warps of a program; more than one only where channels fill them all."""
        return WARPS if self.runs * self.padded_run >= WARPS * WARP else 1

    @property
    def lanes(self):
        """Channels of a program."""
        return self.warps * WARP

    @property
    def across(self):
        """Programs side by side over the channels."""
        return pl.cdiv(self.runs * self.padded_run, self.lanes)

    @property
    def programs(self):
        """Programs of the grid."""
        return self.batch * self.chunks * self.across

    def group_lanes(self, groups):
        """(lanes of one group, how many of them lie in one warp)."""
        lanes = self.runs // groups * self.padded_run
        return lanes, math.gcd(lanes, WARP)


class _Place:
    """Where a program stands: row of the batch, chunk of time, channels of its lanes."""

    def __init__(self, plan):
        self.plan = plan
        self.program = pl.program_id(0)
        self.side = self.program % plan.across
        above = self.program // plan.across
        self.chunk = above % plan.chunks
        self.b = above // plan.chunks
        lane = self.side * plan.lanes + jnp.arange(plan.lanes, dtype=jnp.int32)
        self.valid = None
        if plan.run == plan.padded_run and plan.channels % plan.lanes == 0:
            self.channel = lane
        else:
            run, within = lane // plan.padded_run, lane % plan.padded_run
            self.valid = (run < plan.runs) & (within < plan.run)
            run = jnp.minimum(run, plan.runs - 1)
            self.channel = run * plan.run + jnp.minimum(within, plan.run - 1)
        # Masked stores go past the end: interpreted ones would write back old values.
        self.target = self.channel
        if self.valid is not None:
            self.target = jnp.where(self.valid, self.channel, plan.channels)
        self.B_group = self.channel // (plan.channels // plan.B_groups)
        self.C_group = self.channel // (plan.channels // plan.C_groups)
        self.column = jnp.arange(plan.row, dtype=jnp.int32)
        self.first = self.chunk * plan.chunk
        self.blocks = pl.cdiv(min(plan.chunk, plan.length), BLOCK)
        if plan.length % plan.chunk:
            left = plan.length - self.first
            self.blocks = jnp.minimum(self.blocks, (left + BLOCK - 1) // BLOCK)

    def pairs(self, start, blocks, size):
        """Pairs of groups of `size` steps in the blocks of time from `start` on."""
        most = blocks * (BLOCK // (2 * size))
        if not self.plan.ragged:
            return most
        left = (self.plan.length - start + 2 * size - 1) // (2 * size)
        return jnp.minimum(most, left)

    def time(self, t):
        """(a step that exists, whether `t` does)."""
        if not self.plan.ragged:
            return t, None
        return jnp.minimum(t, self.plan.length - 1), t < self.plan.length

    def channels(self, ref, *index):
        return ref[(*index, self.channel)].astype(jnp.float32)

    def load(self, refs, names, t):
        """Step `t` of the arrays of those names as it lies in memory, or the last step."""
        t = jnp.minimum(t, self.plan.length - 1)
        groups = {"B": self.B_group, "C": self.C_group}
        loaded = {}
        for name in names:
            ref = getattr(refs, name)
            if ref is None:
                continue
            if name in groups:
                start = groups[name][:, None] * self.plan.state + self.column[None, :]
                loaded[name] = [
                    ref[self.b, t, start + k * self.plan.row]
                    for k in range(self.plan.rows)
                ]
            elif name == "restart":
                loaded[name] = ref[self.b, t]
            else:
                loaded[name] = ref[self.b, t, self.channel]
        return loaded

    def widen(self, loaded, name):
        """Loaded values in float32: [lanes], or tiles [lanes, row] of B and C."""
        if name in ("B", "C"):
            return [_widen(tile, self.plan) for tile in loaded[name]]
        return loaded[name].astype(jnp.float32)

    def states(self, ref, *index):
        """Tiles [lanes, row] of an array [..., E, N]."""
        row = self.plan.row
        return [
            ref[(*index, self.channel[:, None], k * row + self.column[None, :])]
            for k in range(self.plan.rows)
        ]

    def store_channels(self, ref, value, *index, exists=None):
        mask = _both(self.valid, exists, self.plan)
        plt.store(ref.at[(*index, self.target)], value.astype(ref.dtype), mask=mask)

    def store_states(self, ref, tiles, *index):
        mask = None
        if self.valid is not None:
            mask = jnp.broadcast_to(self.valid[:, None], tiles[0].shape)
        for k, tile in enumerate(tiles):
            columns = k * self.plan.row + self.column[None, :]
            at = ref.at[(*index, self.target[:, None], columns)]
            plt.store(at, tile, mask=mask)

    def keep(self, value, exists=None):
        """Zero for lanes without a channel and steps that do not exist."""
        mask = _both(self.valid, exists, self.plan)
        return value if mask is None else jnp.where(mask, value, 0.0)


def _both(valid, exists, plan):
    if valid is None and exists is None:
        return None
    if valid is None:
        return jnp.broadcast_to(exists, (plan.lanes,))
    return valid if exists is None else valid & exists


def _sum_rows(tiles):
    """Sum over the states: tiles [lanes, row] -> [lanes]."""
    return jnp.sum(functools.reduce(jnp.add, tiles), axis=1)


def _inputs(place, refs, t, loaded):
    """What every pass over a step needs of its inputs."""
    t, exists = place.time(t)
    x = place.widen(loaded, "x")
    v = place.widen(loaded, "dt") + refs.bias_lanes
    d, u = _softplus(v, place.plan)
    d = place.keep(d, exists)
    restart = loaded.get("restart")
    if restart is not None and exists is not None:
        restart = jnp.where(exists, restart, 0.0)
    return types.SimpleNamespace(
        t=t, exists=exists, x=x, v=v, u=u, d=d, dx=d * x, restart=restart
    )


def _prefetched(place, refs, names, starts, steps, body, state, also=None):
    """Runs `body` on groups of steps, each loaded while the group before it is computed.

    Args:
      place: The program's place.
      refs: The kernel's arrays.
      names: Those to load.
      starts: Function of a group's number to its first step; number 0 comes first.
      steps: (number of pairs of groups, steps in a group).
      body: Function (group's number, (loaded steps, `also` of it), state) -> state.
      state: What is carried.
      also: Function of a group's number to more values to load for it.
    """
    pairs, size = steps

    def load(i):
        i = jnp.minimum(i, 2 * pairs - 1)
        loaded = [place.load(refs, names, starts(i) + u) for u in range(size)]
        return loaded, None if also is None else also(i)

    bias = refs.bias_lanes

    def pair(i, carry):
        state, even = carry
        odd = load(2 * i + 1)
        refs.bias_lanes = _after_loads(bias, i, place.plan)
        state = body(2 * i, even, state)
        even = load(2 * i + 2)
        refs.bias_lanes = _after_loads(bias, i, place.plan)
        return body(2 * i + 1, odd, state), even

    result = lax.fori_loop(0, pairs, pair, (state, load(0)))[0]
    refs.bias_lanes = bias
    return result


def _after_loads(value, i, plan):
    """`value` [lanes], which the compiler takes to be known after the loads before only.

    Left alone, it moves loads down to where their values are used. They do not cross a
    barrier, so what depends on a barrier's result comes after them. The result is how
    many lanes have a negative `i`, none, and its bits are those of 0.0.
    """
    if plan.interpret:
        return value
    plt.debug_barrier()
    [zero] = plt.elementwise_inline_asm(
        "{ .reg .pred p; .reg .b32 n; setp.lt.s32 p, $1, 0;"
        " bar.red.popc.u32 n, 0, p; mov.b32 $0, n; }",
        args=[jnp.full((plan.lanes,), i, jnp.int32)],
        constraints="=f,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct((plan.lanes,), jnp.float32)],
    )
    return value + zero


def _decays(step, A2, plan):
    exponents = [step.d[:, None] * a for a in A2]
    if step.restart is not None:
        exponents = [e + step.restart for e in exponents]
    return [_exp2(e, plan) for e in exponents]


def _advance(step, A2, rows, h, plan):
    """(decays, next state)."""
    decays = _decays(step, A2, plan)
    dx = step.dx[:, None]
    return decays, [a * s + dx * r for a, s, r in zip(decays, h, rows, strict=True)]


def _start(plan, refs):
    place = _Place(plan)
    A = place.states(refs.A)
    refs.bias_lanes = place.channels(refs.bias)
    return place, [a * LOG2E for a in A]


def forward_kernel(plan, refs):
    """Outputs, the chunk's last state, and the state before each block of time."""
    place, A2 = _start(plan, refs)
    skip = place.channels(refs.D)

    def one(t, loaded, h):
        step = _inputs(place, refs, t, loaded)
        _, h = _advance(step, A2, place.widen(loaded, "B"), h, plan)
        C = place.widen(loaded, "C")
        y = _sum_rows([s * c for s, c in zip(h, C, strict=True)]) + skip * step.x
        if refs.z is not None:
            z = place.widen(loaded, "z")
            y = y * (z * _sigmoid(z, plan))
        place.store_channels(refs.y, y, place.b, step.t, exists=step.exists)
        return h

    def starts(j):
        return place.first + j * FORWARD_STEPS

    def group(j, loaded, h):
        if refs.kept is not None:

            @pl.when(starts(j) % BLOCK == 0)
            def _():
                place.store_states(refs.kept, h, place.b, starts(j) // BLOCK)

        for u, values in enumerate(loaded[0]):
            h = one(starts(j) + u, values, h)
        return h

    h = place.states(refs.h0, place.b, place.chunk)
    h = _prefetched(
        place,
        refs,
        ("x", "dt", "B", "C", "z", "restart"),
        starts,
        (place.pairs(place.first, place.blocks, FORWARD_STEPS), FORWARD_STEPS),
        group,
        h,
    )
    place.store_states(refs.end, h, place.b, place.chunk)


def local_state_kernel(plan, refs):
    """A chunk's last state from zero, and the sum of its step sizes."""
    place, A2 = _start(plan, refs)

    def starts(j):
        return place.first + j * FORWARD_STEPS

    def steps(j, loaded, carry):
        h, total = carry
        for u, values in enumerate(loaded[0]):
            step = _inputs(place, refs, starts(j) + u, values)
            _, h = _advance(step, A2, place.widen(values, "B"), h, plan)
            total = total + step.d
        return h, total

    zeros = [jnp.zeros_like(a) for a in A2]
    h, total = _prefetched(
        place,
        refs,
        ("x", "dt", "B", "restart"),
        starts,
        (place.pairs(place.first, place.blocks, FORWARD_STEPS), FORWARD_STEPS),
        steps,
        (zeros, jnp.zeros((plan.lanes,), jnp.float32)),
    )
    place.store_states(refs.end, h, place.b, place.chunk)
    place.store_channels(refs.total, total, place.b, place.chunk)
