"""Forward kernels of the selective scan on tensor cores, in Pallas for Triton.

A warp owns a tile of 16 or 8 channels that share their rows of B and C, and takes 8 steps
at a time. What it computes is laid out over its lanes the way tensor cores take and leave
the parts of a matrix ("fragments"). Lane 4 i + j holds

    of the states      n = 4 j .. 4 j + 3 of channels 2 i and 2 i + 1 (8: of channel i),
    of x, dt, z and y  those channels at steps j and j + 4,
    of B               n = 2 i and 2 i + 1 at steps j and j + 4,
    of C               n = 4 j .. 4 j + 3 at step i // 2 + 4 (i % 2) (8: half of them, the
                       even or the odd n as i is, at steps i // 2 and i // 2 + 4),

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

from pallas_kernels.selective_scan import pallas_triton_bfloat16 as rough
from pallas_kernels.selective_scan import pallas_triton_kernels as common
from pallas_kernels.selective_scan import warp_tiles

# States of a channel, steps at a time, lanes of a row of a warp's fragments.
STATE = 16
STEPS = 8
QUAD = 4
# An H200's, where JAX does not know.
MULTIPROCESSORS = 132


@dataclasses.dataclass(frozen=True)
class Tile:
    """How the work is laid out; every choice computes the same.

    Attributes:
      channels: Channels of a warp, 16 or 8.
      warps: Warps of a program, at most; a divisor of theirs where they do not fill it.
      ahead: Groups of steps between a group's loads and its computation. With 1 the
        loads stand before the steps of the group before, which wait for them to be
        issued behind a barrier of the program: the compiler would move the loads to the
        end of the steps. With more they stand at the end anyway.
      ahead_unkept: The same for a forward pass that keeps no states; None for `ahead`.
    """

    channels: int
    warps: int
    ahead: int = 1
    ahead_unkept: int | None = None


# The tile of a call whose programs, one a multiprocessor, all run at once (many warps
# share the work out evenly), of a call with more programs, and of groups of channels
# that only the smaller tile divides.
ONE_WAVE = Tile(channels=16, warps=16, ahead=2, ahead_unkept=4)
WAVES = Tile(channels=16, warps=4)
NARROW = Tile(channels=8, warps=4)


def places(pairs):
    """Rows of a tile of states, 4 for each channel: that of (channel p, n = 4 j + r)."""
    both = ((p, r) for p in range(pairs) for r in range(4))
    return {(p, r): 2 * pairs * (r % 2) + 2 * p + r // 2 for p, r in both}


@dataclasses.dataclass(frozen=True)
class TilePlan(common.Plan):
    """A plan whose warps own tiles of channels."""

    tile: Tile

    @property
    def warps(self):
        """Warps of a program."""
        return math.gcd(self.tile.warps, self.channels // self.tile.channels)

    @property
    def across(self):
        """Programs side by side over the channels."""
        return self.channels // (self.tile.channels * self.warps)

    @property
    def pairs(self):
        """Channels of a lane."""
        return self.tile.channels // 8

    @property
    def uneven(self):
        """Whether the last group of steps is cut short."""
        return self.length % STEPS != 0


def tile_plan(plan, dtypes):
    """The plan for these kernels, or None if they do not fit the call."""
    # Products round to 10 bits, as good as bfloat16 results need.
    if plan.state != STATE or any(dtype != jnp.bfloat16 for dtype in dtypes):
        return None
    shared = math.gcd(plan.channels // plan.B_groups, plan.channels // plan.C_groups)
    multiprocessors = getattr(jax.devices()[0], "core_count", MULTIPROCESSORS)
    for tile in (ONE_WAVE, WAVES, NARROW):
        tiled = TilePlan(**dataclasses.asdict(plan), tile=tile)
        whole = shared % tile.channels == 0
        if whole and (tile != ONE_WAVE or tiled.programs <= multiprocessors):
            return tiled
    return None


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
    """[4 pairs, lanes]: dx (of the lane's channels) times B (of n = 2 i and 2 i + 1).

    Summed over the lanes of every four: in all but one of them dx or B is zero.
    """
    if plan.pairs == 1:
        return _outer_of_one(dx[0], B, plan)
    if plan.interpret:
        return _tile([v for b in B for v in _interpreted_product(dx, [b])])
    given = _tile([*dx, *B] * 2)
    code = "".join(
        _multiply(_registers(4 * k, 4), ["$8", "$9"], [f"${10 + k}"], ["zero"] * 4)
        for k in range(2)
    )
    # A result may be written before all arguments are read.
    return _asm(code, [given], ",".join(["=&f"] * 8 + ["f"] * 8))


def _outer_of_one(dx, B, plan):
    """The same for a channel a lane: even n in the upper half of a product, odd below."""
    zeros = jnp.zeros_like(dx)
    if plan.interpret:
        return _tile(_interpreted_product([dx, zeros, zeros, dx], B))
    left = ["$4", "zero", "zero", "$4"]
    code = _multiply(_registers(0, 4), left, ["$5", "$6"], ["zero"] * 4)
    return _asm(code, [_tile([dx, *B, zeros])], ",".join(["=f"] * 4 + ["f"] * 4))


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


def _inner_of_one(h, C, plan):
    """[lanes]: the sum of C h for channel i and the step of rows 2 j and 2 j + 1 of C."""
    if plan.interpret:
        h = _rows(h)
        out = _interpreted_product(h[0::2] + h[1::2], C)
        return out[0] + out[3]
    h_registers = _registers(4, 4)
    left = h_registers[0::2] + h_registers[1::2]
    code = _multiply(_registers(0, 4), left, ["$8", "$9"], ["zero"] * 4)
    given = [h, _tile(C * 2)]
    out = _rows(_asm(code, given, ",".join(["=f"] * 4 + ["f"] * 8)))
    # The even n of a step by the even rows of C, the odd n by the odd ones.
    return out[0] + out[3]


class _Place:
    """Where a program stands: row of the batch, chunk of time, its lanes' channels."""

    def __init__(self, plan, refs):
        self.plan, self.refs = plan, refs
        program = pl.program_id(0)
        above = program // plan.across
        self.chunk, self.b = above % plan.chunks, above // plan.chunks
        lane = jnp.arange(plan.lanes, dtype=jnp.int32)
        self.tiles = warp_tiles.Tiles(plan.interpret)
        self.hidden_zero = self.tiles.hidden_zero(lane)
        tile = program % plan.across * plan.warps + lane // common.WARP
        first, channels = tile * plan.tile.channels, plan.channels
        row, self.quad = lane % common.WARP // QUAD, lane % QUAD
        self.channel = first + plan.pairs * row
        self.B_column = first // (channels // plan.B_groups) * STATE + 2 * row
        C_group = first // (channels // plan.C_groups)
        self.C_column = C_group * STATE + QUAD * self.quad
        self.odd_row = row % 2 == 1
        self.C_step = row // 2 + (QUAD * (row % 2) if plan.pairs == 2 else 0)
        self.first = self.chunk * plan.chunk
        self.steps = min(plan.chunk, plan.length)
        if plan.length % plan.chunk and plan.chunks > 1:
            self.steps = jnp.minimum(self.steps, plan.length - self.first)
        self.groups = (self.steps + STEPS - 1) // STEPS
        self.A2 = self.states(refs.A) * common.LOG2E
        self.bias = self.per_channel(refs.bias)

    def per_channel(self, ref):
        """[2 pairs, lanes]: a lane's channels, once for each of its steps."""
        pairs = range(self.plan.pairs)
        return _tile([ref[self.channel + p].astype(jnp.float32) for p in pairs] * 2)

    def states(self, ref, *index):
        """[4 pairs, lanes] of an array [..., E, N], its rows at `places`."""
        rows = [
            _rows(ref[(*index, *self._state_index(p, self.channel))])
            for p in range(self.plan.pairs)
        ]
        found = {at: rows[p][r] for (p, r), at in places(self.plan.pairs).items()}
        return _tile([found[place] for place in sorted(found)])

    def store_states(self, ref, h, *index):
        rows, place = _rows(h), places(self.plan.pairs)
        for p in range(self.plan.pairs):
            at = ref.at[(*index, *self._state_index(p, self.channel))]
            tile = _tile([rows[place[p, r]] for r in range(QUAD)])
            plt.store(at, tile.astype(ref.dtype))

    def keep(self, h, group, s):
        """Stores the states before step `s` of a group, where the backward reads them."""
        kept, every = self.refs.kept, self.plan.kept_every
        if kept is not None and every < STEPS and s % every == 0:
            t = self.first + group * STEPS + s
            self.store_states(kept, h, self.b, t // every)

    def _state_index(self, p, channel):
        return (channel + p)[None, :], _columns(QUAD * self.quad, QUAD)

    def store_steps(self, ref, rows, group):
        """Stores rows [lanes], those of a lane's channels at its two steps of a group."""
        pairs, plan = self.plan.pairs, self.plan
        for k in range(2):
            t = self.time(group) + QUAD * k
            exists = t < plan.length if plan.uneven else None
            if pairs == 1:
                at, value = ref.at[self.b, t, self.channel], rows[k]
            else:
                columns = _columns(self.channel, pairs)
                at, value = (
                    ref.at[self.b, t[None, :], columns],
                    _tile(rows[2 * k :][:2]),
                )
                exists = None if exists is None else exists[None, :]
            mask = None if exists is None else jnp.broadcast_to(exists, value.shape)
            plt.store(at, value.astype(ref.dtype), mask=mask)

    def time(self, group):
        """The first of a lane's two steps in a group."""
        return self.first + group * STEPS + self.quad

    def load(self, names, group, behind=None):
        """A group of steps of the arrays of those names, as they lie in memory.

        Two channels or states are a pair in a register: the halves of one that is
        carried through a loop the compiler may swap right behind the load, which then
        waits for memory.
        They are not loaded before the values `behind` [lanes] are known.
        """
        quad, C_step = self.quad, self.C_step
        if behind is not None:
            bits = lax.bitcast_convert_type(behind, jnp.int32) & self.hidden_zero
            quad, C_step = quad | bits, C_step | bits
        loaded = {}
        for name in names:
            ref = getattr(self.refs, name)
            if ref is None:
                continue
            if name == "C":
                halves = range(3 - self.plan.pairs)
                steps = [C_step + QUAD * k for k in halves]
            else:
                steps = [quad, quad + QUAD]
            steps = [self._existing(group, step) for step in steps]
            column = {"B": self.B_column, "C": self.C_column}.get(name, self.channel)
            count = {"B": 2, "C": QUAD}.get(name, self.plan.pairs)
            if name == "restart":
                loaded[name] = [ref[self.b, t] for t in steps]
            elif count == 1:
                loaded[name] = [ref[self.b, t, column] for t in steps]
            else:
                columns = _columns(column, count)
                tiles = (ref[self.b, t[None, :], columns] for t in steps)
                loaded[name] = [self.tiles.pairs(tile) for tile in tiles]
        return loaded

    def _existing(self, group, step):
        """That step of a group, or one that exists."""
        if self.plan.uneven:
            t = self.first + group * STEPS + step
            return jnp.minimum(t, self.plan.length - 1)
        return self.first + jnp.minimum(group, self.groups - 1) * STEPS + step

    def ready(self, loaded, group):
        """What the steps of a group need, in float32: tiles, and rows of C.

        A tile [2 pairs, lanes] has a row for each of a lane's steps and its channels.
        """
        plan = self.plan
        wide = {
            name: self._widen(values)
            for name, values in loaded.items()
            if name not in ("C", "restart")
        }
        d = rough.softplus(wide.pop("dt") + self.bias, plan)[0]
        restart = loaded.get("restart")
        if plan.uneven:
            start = self.time(group)
            exist = [start + QUAD * k < plan.length for k in range(2)]
            rows = enumerate(_rows(d))
            d = _tile([jnp.where(exist[k // plan.pairs], row, 0.0) for k, row in rows])
            if restart is not None:
                pairs = zip(exist, restart, strict=True)
                restart = [jnp.where(inside, r, 0.0) for inside, r in pairs]
        wide |= {"d": d, "dx": d * wide["x"], "restart": restart}
        if "C" in loaded:
            wide["C"] = self._rows_of_C(loaded["C"])
        return wide

    def _widen(self, values):
        """[k, lanes] in float32 of what was loaded for a lane's two steps."""
        return _tile([row for value in values for row in self._wide_rows(value)])

    def _wide_rows(self, value):
        """Rows [lanes] in float32 of a value, or of rows of pairs."""
        if value.ndim == 1:
            return [value.astype(jnp.float32)]
        return [half for pair in _rows(value) for half in warp_tiles.halves(pair)]

    def _rows_of_C(self, values):
        """Four [lanes]: the parts of C that are a lane's in the products."""
        rows = [row for value in values for row in self._wide_rows(value)]
        if self.plan.pairs == 2:
            return rows
        return [jnp.where(self.odd_row, rows[k + 1], rows[k]) for k in (0, 2, 4, 6)]

    def step_sizes(self, d, s):
        """The step sizes of step `s` of a lane's channels, from the lane that has them."""
        later, lane = divmod(s, QUAD)
        mine = d[self.plan.pairs * later :][: self.plan.pairs]
        return [_from_lane(v, lane, self.plan) for v in mine]

    def run(self, names, step, state, keep=None, ahead=None):
        """Goes through time; `step` is (group's number, its values, state) -> state.

        A group is loaded, and made ready, while those before it are computed. `keep`,
        if there is one, gets the number of each block of time and the state before it;
        the loop over a block's groups is faster than one over all groups either way.
        `ahead` is the tile's unless given.
        """
        plan, ahead = self.plan, ahead or self.plan.tile.ahead
        size = common.BLOCK // STEPS

        def group(i, carry):
            state, values, waiting = carry
            if ahead == 1:
                waiting = [self.load(names, i + 1)]
                values = self._after_loads(values, i)
            rows = (name for name in ("d", "dx", "B") if name in values)
            now = values | {name: _rows(values[name]) for name in rows}
            state = step(i, now, state)
            values, waiting = self.ready(waiting[0], i + 1), waiting[1:]
            if ahead > 1:
                # Into the registers that were just read, without any moves.
                behind = warp_tiles.get(values["d"], 0)
                waiting = [*waiting, self.load(names, i + ahead, behind)]
            return state, values, waiting

        def block(i, carry):
            # A branch inside the groups' loop would keep the loads from moving in it.
            if keep is not None:
                keep(i, carry[0])
            count = size
            if plan.uneven or plan.length % common.BLOCK:
                count = jnp.minimum(size, self.groups - i * size)
            return lax.fori_loop(0, count, lambda k, c: group(i * size + k, c), carry)

        loaded = [self.load(names, i) for i in range(ahead)]
        carry = (state, self.ready(loaded[0], 0), loaded[1:])
        return lax.fori_loop(0, (self.groups + size - 1) // size, block, carry)[0]

    def _after_loads(self, values, i):
        """The same values, of which step sizes are not known before the loads before."""
        zeros = jnp.zeros((self.plan.lanes,), jnp.float32)
        # The compiler would move the loads down to where they are needed.
        pinned = common._after_loads(zeros, i, self.plan)
        return values | {"d": values["d"] + pinned[None, :]}


def _columns(first, count):
    """[count, lanes]: so many indices from the lane's first on."""
    return first[None, :] + jnp.arange(count, dtype=jnp.int32)[:, None]


def _advance(place, values, s, h):
    """The states [4 pairs, lanes] after step s of a group."""
    plan = place.plan
    later, lane = divmod(s, QUAD)
    mine = place.quad == lane
    B = values["B"][2 * later :][:2]
    dx = values["dx"][plan.pairs * later :][: plan.pairs]
    # Of a product's operands the one in fewer registers is zero in the other lanes.
    if plan.pairs == 1:
        dx = [jnp.where(mine, dx[0], 0.0)]
    else:
        B = [jnp.where(mine, b, 0.0) for b in B]
    added = _outer(dx, B, plan)
    d = place.step_sizes(values["d"], s)
    exponents = place.A2 * _tile([v for v in d for _ in range(2)] * 2)
    if values["restart"] is not None:
        restart = _from_lane(values["restart"][later], lane, plan)
        exponents = exponents + restart[None, :]
    return common._exp2(exponents, plan) * h + added


def _read(place, values, s, h, y):
    """Puts sum_n C h of step s into the rows y, in the lanes that hold the step."""
    plan, y = place.plan, list(y)
    later, lane = divmod(s, QUAD)
    if plan.pairs == 1:
        total = _inner_of_one(h, values["C"][2 * later :][:2], plan)
        y[later] = jnp.where(place.quad == lane, total, y[later])
        return y
    out = _inner(h, values["C"], plan)
    for p in range(2):
        row = 2 * later + p
        y[row] = jnp.where(place.quad == lane, out[2 * p + later], y[row])
    return y


def forward_kernel(plan, refs):
    """Outputs, the chunk's last state, and the states that the plan keeps."""
    place = _Place(plan, refs)
    skip = place.per_channel(refs.D)

    def group(i, values, h):
        y = [jnp.zeros((plan.lanes,), jnp.float32)] * (2 * plan.pairs)
        for s in range(STEPS):
            place.keep(h, i, s)
            h = _advance(place, values, s, h)
            y = _read(place, values, s, h, y)
        y = _tile(y) + skip * values["x"]
        if refs.z is not None:
            y = y * rough.silu(values["z"], plan)
        place.store_steps(refs.y, _rows(y), i)
        return h

    def keep(i, h):
        if refs.kept is not None and plan.kept_every == common.BLOCK:
            number = place.first // common.BLOCK + i
            place.store_states(refs.kept, h, place.b, number)
        else:
            # Nobody reads it before the last state is there, but without a store between
            # its blocks the loop takes a fifth longer.
            place.store_states(refs.end, h, place.b, place.chunk)

    names = ("x", "dt", "B", "C", "z", "restart")
    ahead = plan.tile.ahead_unkept if refs.kept is None else None
    h = place.states(refs.h0, place.b, place.chunk)
    h = place.run(names, group, h, keep, ahead)
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
    carry = (jnp.zeros_like(place.A2), [lanes] * (2 * plan.pairs))
    h, rows = place.run(("x", "dt", "B", "restart"), group, carry)
    place.store_states(refs.end, h, place.b, place.chunk)
    for p in range(plan.pairs):
        both = rows[p] + rows[plan.pairs + p]
        parts = [_from_lane(both, lane, plan) for lane in range(QUAD)]
        at = refs.total.at[place.b, place.chunk, place.channel + p]
        plt.store(at, sum(parts[1:], parts[0]))
