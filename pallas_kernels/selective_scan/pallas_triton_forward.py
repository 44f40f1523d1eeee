"""Forward kernels of the selective scan on tensor cores, in Pallas for Triton.

A warp owns a tile of 16 channels that share their rows of B and C, and takes 8 steps at
a time. What it computes is laid out over its lanes the way tensor cores take and leave
the parts of a matrix ("fragments"). Lane 4 i + j holds

    of the states      n = 4 j .. 4 j + 3 of channels 2 i and 2 i + 1,
    of x, dt, z and y  those two channels at steps j and j + 4,
    of B               n = 2 i and 2 i + 1 at steps j and j + 4,
    of C               n = 4 j .. 4 j + 3 at step i // 2 + 4 (i % 2),

so that one product makes d_t x_t B_t for the whole tile, another sums C_t h_t over n,
and only the step size passes from lane to lane. A value of each lane is an array
[lanes], k values a tile [k, lanes].
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.selective_scan import pallas_triton_kernels as common
from pallas_kernels.selective_scan import warp_tiles

# Channels and states of a warp, steps at a time, lanes of a row of its fragments.
TILE = 16
STATE = 16
STEPS = 8
QUAD = 4
# Warps of a program. More share the work out evenly, if no program waits for another:
# one fits a multiprocessor.
FEW_WARPS, MANY_WARPS = 4, 16
# An H200's, where JAX does not know.
MULTIPROCESSORS = 132
# Rows of a tile of states [8, lanes]: the place of (channel 2 i + p, n = 4 j + r).
PLACES = {(p, r): 4 * (r % 2) + 2 * p + r // 2 for p in range(2) for r in range(4)}


@dataclasses.dataclass(frozen=True)
class TilePlan(common.Plan):
    """A plan whose warps own tiles of channels."""

    multiprocessors: int

    @property
    def warps(self):
        """Warps of a program."""
        tiles = self.channels // TILE
        many = math.gcd(MANY_WARPS, tiles)
        if self.batch * self.chunks * (tiles // many) <= self.multiprocessors:
            return many
        return math.gcd(FEW_WARPS, tiles)

    @property
    def across(self):
        """Programs side by side over the channels."""
        return self.channels // (TILE * self.warps)

    @property
    def uneven(self):
        """Whether the last group of steps is cut short."""
        return self.length % STEPS != 0


def tile_plan(plan, dtypes):
    """The plan for these kernels, or None if they do not fit the call."""
    shared = math.gcd(plan.channels // plan.B_groups, plan.channels // plan.C_groups)
    fits = plan.state == STATE and shared % TILE == 0
    # Products round to 10 bits, as good as bfloat16 results need.
    if not fits or any(dtype != jnp.bfloat16 for dtype in dtypes):
        return None
    count = getattr(jax.devices()[0], "core_count", MULTIPROCESSORS)
    return TilePlan(**dataclasses.asdict(plan), multiprocessors=count)


def _tile(values):
    """Values [lanes] as the rows of a tile."""
    return warp_tiles.make(*values)


def _rows(tile):
    """The rows of a tile as values [lanes]."""
    return [warp_tiles.get(tile, k) for k in range(tile.shape[0])]


def _asm(code, arguments, constraints):
    """Runs the code in each lane on its column of arguments [lanes] or [k, lanes]."""
    shape = arguments[0].shape
    [result] = plt.elementwise_inline_asm(
        "{ .reg .f32 zero; mov.f32 zero, 0f00000000; " + code + " }",
        args=arguments,
        constraints=constraints,
        pack=math.prod(shape[:-1]),
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.float32)],
    )
    return result


def _from_lane(value, lane, plan):
    """What the given lane of every four holds."""
    if plan.interpret:
        fours = value.reshape(-1, QUAD)
        return jnp.repeat(fours[:, lane], QUAD)
    code = f"shfl.sync.idx.b32 $0, $1, {lane}, 0x1c1f, 0xffffffff;"
    return _asm(code, [value], "=f,f")


def _multiply(result, left, right, add):
    """PTX for [16, k] times [k, 8], k = 4 or 8; a register of a lane each."""
    parts = (", ".join(registers) for registers in (result, left, right, add))
    shape = f"m16n8k{QUAD * len(right)}"
    return (
        f"mma.sync.aligned.{shape}.row.col.f32.tf32.tf32.f32 "
        + ", ".join(f"{{{part}}}" for part in parts)
        + ";"
    )


def _registers(first, count):
    return [f"${first + k}" for k in range(count)]


def _interpreted_product(left, right):
    """What `_multiply` computes, four values [lanes], in plain JAX."""

    def spread(values):
        """[warps, row or column, k] in the precision of the product."""
        bits = [lax.bitcast_convert_type(v, jnp.int32) & -(1 << 13) for v in values]
        values = [lax.bitcast_convert_type(v, jnp.float32) for v in bits]
        return jnp.concatenate([v.reshape(-1, 8, QUAD) for v in values], axis=2)

    columns, result = spread(right), []
    for rows in (left[0::2], left[1::2]):
        product = jnp.einsum("wik,wjk->wij", spread(rows), columns)
        result += [product[:, :, 0::2].reshape(-1), product[:, :, 1::2].reshape(-1)]
    return result


def _outer(dx, B, plan):
    """[8, lanes]: dx (of channels 2 i and 2 i + 1) times B (of n = 2 i and 2 i + 1).

    Summed over the lanes of every four: one of them has a B that is not zero.
    """
    if plan.interpret:
        return _tile([v for b in B for v in _interpreted_product(dx, [b])])
    given = _tile([*dx, *B] * 2)
    code = "".join(
        _multiply(_registers(4 * k, 4), ["$8", "$9"], [f"${10 + k}"], ["zero"] * 4)
        for k in range(2)
    )
    # A result may be written before all arguments are read.
    return _asm(code, [given], ",".join(["=&f"] * 8 + ["f"] * 8))


def _inner(h, C, plan):
    """[lanes] x 4: sums of C h for (channel 2 i + p, the step of row 2 j + k of C)."""
    if plan.interpret:
        h = _rows(h)
        parts = (_interpreted_product(h[k::2], C[2 * k :][:2]) for k in range(2))
        return [a + b for a, b in zip(*parts, strict=True)]
    result, h_registers = _registers(0, 4), _registers(8, 8)
    code, add = "", ["zero"] * 4
    for k in range(2):
        right = _registers(16 + 2 * k, 2)
        code += _multiply(result, h_registers[k::2], right, add)
        add = result
    code += "".join(f"mov.f32 {register}, zero;" for register in _registers(4, 4))
    out = _asm(code, [h, _tile(C * 2)], ",".join(["=&f"] * 8 + ["f"] * 16))
    return _rows(out)[:4]


class _Place:
    """Where a program stands: row of the batch, chunk of time, its lanes' channels."""

    def __init__(self, plan, refs):
        self.plan, self.refs = plan, refs
        program = pl.program_id(0)
        above = program // plan.across
        self.chunk, self.b = above % plan.chunks, above // plan.chunks
        lane = jnp.arange(plan.lanes, dtype=jnp.int32)
        tile = program % plan.across * plan.warps + lane // common.WARP
        row, self.quad = lane % common.WARP // QUAD, lane % QUAD
        self.channel = tile * TILE + 2 * row
        channels = plan.channels
        self.B_column = tile * TILE // (channels // plan.B_groups) * STATE + 2 * row
        C_group = tile * TILE // (channels // plan.C_groups)
        self.C_column = C_group * STATE + QUAD * self.quad
        self.C_step = row // 2 + QUAD * (row % 2)
        self.first = self.chunk * plan.chunk
        self.steps = min(plan.chunk, plan.length)
        if plan.length % plan.chunk and plan.chunks > 1:
            self.steps = jnp.minimum(self.steps, plan.length - self.first)
        self.groups = (self.steps + STEPS - 1) // STEPS
        self.A2 = self.states(refs.A) * common.LOG2E
        self.bias = self.per_channel(refs.bias)

    def per_channel(self, ref):
        """[4, lanes]: the two channels, once for each of a lane's steps."""
        return _tile([ref[self.channel + p].astype(jnp.float32) for p in range(2)] * 2)

    def states(self, ref, *index):
        """[8, lanes] of an array [..., E, N], its rows at PLACES."""
        rows = [
            _rows(ref[(*index, *self._state_index(p, self.channel))]) for p in range(2)
        ]
        found = {place: rows[p][r] for (p, r), place in PLACES.items()}
        return _tile([found[place] for place in sorted(found)])

    def store_states(self, ref, h, *index):
        rows = _rows(h)
        for p in range(2):
            at = ref.at[(*index, *self._state_index(p, self.channel))]
            plt.store(at, _tile([rows[PLACES[p, r]] for r in range(QUAD)]))

    def _state_index(self, p, channel):
        return (channel + p)[None, :], _columns(QUAD * self.quad, QUAD)

    def time(self, group):
        """The first of a lane's two steps in a group."""
        return self.first + group * STEPS + self.quad

    def load(self, names, group):
        """A group of steps of the arrays of those names, as they lie in memory."""
        last, loaded = self.plan.length - 1, {}
        start = self.time(group)
        pair = [jnp.minimum(start + QUAD * k, last) for k in range(2)]
        for name in names:
            ref = getattr(self.refs, name)
            if ref is None:
                continue
            if name == "C":
                t = jnp.minimum(start - self.quad + self.C_step, last)[None, :]
                loaded[name] = ref[self.b, t, _columns(self.C_column, QUAD)]
            elif name == "restart":
                loaded[name] = [ref[self.b, t] for t in pair]
            else:
                column = _columns(self.B_column if name == "B" else self.channel, 2)
                loaded[name] = [ref[self.b, t[None, :], column] for t in pair]
        return loaded

    def ready(self, loaded, group):
        """What the steps of a group need, in float32; all but C in tiles [4, lanes]."""
        plan = self.plan
        wide = {
            name: _tile(
                [row for tile in tiles for row in _rows(common._widen(tile, plan))]
            )
            for name, tiles in loaded.items()
            if name not in ("C", "restart")
        }
        d = common._softplus(wide.pop("dt") + self.bias, plan)[0]
        restart = loaded.get("restart")
        if plan.uneven:
            start = self.time(group)
            exist = [start + QUAD * k < plan.length for k in range(2)]
            rows = enumerate(_rows(d))
            d = _tile([jnp.where(exist[k // 2], row, 0.0) for k, row in rows])
            if restart is not None:
                pairs = zip(exist, restart, strict=True)
                restart = [jnp.where(inside, r, 0.0) for inside, r in pairs]
        wide |= {"d": d, "dx": d * wide["x"], "restart": restart}
        if "C" in loaded:
            wide["C"] = common._widen(loaded["C"], plan)
        return wide

    def run(self, names, step, state):
        """Goes through time; `step` is (group's number, its values, state) -> state.

        A group is loaded, and made ready, while the one before it is computed.
        """
        plan = self.plan

        def group(i, carry):
            state, values = carry
            loaded = self.load(names, i + 1)
            zeros = jnp.zeros((plan.lanes,), jnp.float32)
            # The compiler would move the loads down to where they are needed.
            pinned = common._after_loads(zeros, i, plan)
            now = values | {"d": values["d"] + pinned[None, :]}
            rows = (name for name in ("d", "dx", "B", "C") if name in now)
            now |= {name: _rows(now[name]) for name in rows}
            state = step(i, now, state)
            return state, self.ready(loaded, i + 1)

        carry = (state, self.ready(self.load(names, 0), 0))
        return lax.fori_loop(0, self.groups, group, carry)[0]


def _columns(first, count):
    """[count, lanes]: so many indices from the lane's first on."""
    return first[None, :] + jnp.arange(count, dtype=jnp.int32)[:, None]


def _advance(place, values, s, h):
    """The states [8, lanes] after step s of a group."""
    plan = place.plan
    later, lane = divmod(s, QUAD)
    mine = place.quad == lane
    dx, B, d = (values[name][2 * later :][:2] for name in ("dx", "B", "d"))
    added = _outer(dx, [jnp.where(mine, b, 0.0) for b in B], plan)
    d = [_from_lane(v, lane, plan) for v in d]
    exponents = place.A2 * _tile([d[0], d[0], d[1], d[1]] * 2)
    if values["restart"] is not None:
        restart = _from_lane(values["restart"][later], lane, plan)
        exponents = exponents + restart[None, :]
    return common._exp2(exponents, plan) * h + added


def _read(place, values, s, h, y):
    """Puts sum_n C h of step s into the rows y, in the lanes that hold the step."""
    later, lane = divmod(s, QUAD)
    out = _inner(h, values["C"], place.plan)
    y = list(y)
    for p in range(2):
        row = 2 * later + p
        y[row] = jnp.where(place.quad == lane, out[2 * p + later], y[row])
    return y


def forward_kernel(plan, refs):
    """Outputs, the chunk's last state, and the state before each block of time."""
    place = _Place(plan, refs)
    skip = place.per_channel(refs.D)

    def group(i, values, h):
        start = place.first + i * STEPS
        if refs.kept is not None:

            @pl.when(start % common.BLOCK == 0)
            def _():
                place.store_states(refs.kept, h, place.b, start // common.BLOCK)

        y = [jnp.zeros((plan.lanes,), jnp.float32)] * 4
        for s in range(STEPS):
            h = _advance(place, values, s, h)
            y = _read(place, values, s, h, y)
        y = _tile(y) + skip * values["x"]
        if refs.z is not None:
            y = y * (values["z"] * common._sigmoid(values["z"], plan))
        rows = _rows(y)
        for k in range(2):
            t = (place.time(i) + QUAD * k)[None, :]
            tile = _tile(rows[2 * k :][:2]).astype(refs.y.dtype)
            mask = (
                jnp.broadcast_to(t < plan.length, tile.shape) if plan.uneven else None
            )
            plt.store(
                refs.y.at[place.b, t, _columns(place.channel, 2)], tile, mask=mask
            )
        return h

    names = ("x", "dt", "B", "C", "z", "restart")
    h = place.run(names, group, place.states(refs.h0, place.b, place.chunk))
    place.store_states(refs.end, h, place.b, place.chunk)


def local_state_kernel(plan, refs):
    """A chunk's last state from zero, and the sum of its step sizes."""
    place = _Place(plan, refs)

    def group(i, values, carry):
        h, total = carry
        for s in range(STEPS):
            h = _advance(place, values, s, h)
        return h, [a + b for a, b in zip(total, values["d"], strict=True)]

    lanes = jnp.zeros((plan.lanes,), jnp.float32)
    carry = (jnp.zeros_like(place.A2), [lanes] * 4)
    h, rows = place.run(("x", "dt", "B", "restart"), group, carry)
    place.store_states(refs.end, h, place.b, place.chunk)
    for p in range(2):
        parts = [_from_lane(rows[p] + rows[2 + p], lane, plan) for lane in range(QUAD)]
        at = refs.total.at[place.b, place.chunk, place.channel + p]
        plt.store(at, sum(parts[1:], parts[0]))
