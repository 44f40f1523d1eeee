"""A warp's registers as tiles [rows, lanes], and the instructions that mix lanes.

A tile has a column for every thread of the program and a row for every register: the layout
that Triton gives a tile of this shape, whatever else the program does. So an instruction on
a tile's rows is one that each warp runs on its own registers. `Tiles` has those that Pallas
does not offer, as inline PTX; in Pallas' interpreter, the same in plain JAX.

Matrix fragments are those of PTX's `mma.m16n8k16`: in lane 4 r + q of a warp, an accumulator
has rows r and r + 8 and columns 2 q and 2 q + 1, four float32 values; the left operand has
the same two rows and columns 2 q, 2 q + 1, 2 q + 8, 2 q + 9, in pairs of bfloat16; the right
operand has those four as its rows, and column r.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

WARP = 32
I32, F32 = jnp.int32, jnp.float32


def row_index(rows):
    """[rows, 1]: 0, 1, ..."""
    return lax.broadcasted_iota(I32, (rows, 1), 0)


def get(tile, i):
    """Row `i` of a tile; no instruction."""
    zero = jnp.asarray(-0.0 if tile.dtype == F32 else 0, tile.dtype)
    chosen = jnp.where(row_index(tile.shape[0]) == i, tile, zero)
    return jnp.sum(chosen, axis=0, dtype=tile.dtype)


def make(*rows):
    """The tile of rows [lanes]; no instruction."""
    index = row_index(len(rows))
    tile = jnp.broadcast_to(rows[-1][None, :], (len(rows), rows[-1].shape[0]))
    for i, row in enumerate(rows[:-1]):
        tile = jnp.where(index == i, row[None, :], tile)
    return tile


def _bits(value):
    return lax.bitcast_convert_type(value, I32)


def _upper(value):
    """The float32 value without its lower half."""
    return lax.bitcast_convert_type(_bits(value) & jnp.int32(-65536), F32)


def halves(pairs):
    """The two bfloat16 values in each int32, in float32."""
    low = lax.bitcast_convert_type(pairs << 16, F32)
    return low, lax.bitcast_convert_type(pairs & jnp.int32(-65536), F32)


def _pair(low, high):
    low, high = (_bits(v.astype(jnp.bfloat16).astype(F32)) for v in (low, high))
    return lax.shift_right_logical(low, jnp.int32(16)) | high


def _matrices(pairs):
    """Registers [..., lanes] of pairs -> the 8 x 8 matrices that they hold, by warp."""
    values = [half.reshape(-1, 8, 4) for half in halves(pairs)]
    return jnp.stack(values, axis=-1).reshape(-1, 8, 8)


def _call(code, args, dtype, pack=1):
    """Inline PTX on tiles: $0 ... are the result's rows, then those of each argument."""
    letters = {jnp.dtype(F32): "f", jnp.dtype(I32): "r", jnp.dtype(jnp.bfloat16): "r"}
    constraints = [("=&" if pack > 1 else "=") + letters[jnp.dtype(dtype)]] * pack
    for arg in args:
        halved = pack > 1 and arg.dtype == jnp.bfloat16
        constraints += [letters[jnp.dtype(arg.dtype)]] * (pack // 2 if halved else pack)
    [result] = plt.elementwise_inline_asm(
        code,
        args=args,
        constraints=",".join(constraints),
        pack=pack,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, dtype)],
    )
    return result


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The instructions; `interpret` chooses plain JAX."""

    interpret: bool

    def pair(self, low, high):
        """Pairs of bfloat16 from two float32 tiles."""
        if self.interpret:
            return _pair(low, high)
        return _call("cvt.rn.bf16x2.f32 $0, $2, $1;", [low, high], I32)

    def left(self, accumulators):
        """Two accumulators, 16 columns side by side, as the left operand."""
        first, second = accumulators
        if self.interpret:
            values = [*first, *second]
            return jnp.stack([_pair(*values[i : i + 2]) for i in range(0, 8, 2)])
        code = (
            f"cvt.rn.bf16x2.f32 ${i}, ${2 * i + 5}, ${2 * i + 4};" for i in range(4)
        )
        return _call(" ".join(code), [first, second], I32, pack=4)

    def accumulators(self, left):
        """The inverse of `left`, rounded as that was."""
        if self.interpret:
            low, high = halves(left)
            return [
                jnp.stack([low[i], high[i], low[i + 1], high[i + 1]]) for i in (0, 2)
            ]
        tiles = []
        for i in (4, 6):
            code = (
                f"shl.b32 $0, ${i}, 16; and.b32 $1, ${i}, 0xffff0000; "
                f"shl.b32 $2, ${i + 1}, 16; and.b32 $3, ${i + 1}, 0xffff0000;"
            )
            tiles.append(_call(code, [left], F32, pack=4))
        return tiles

    def transposed(self, left):
        """The left operand's transpose, as a left operand."""
        return make(*(get(self.transpose(left), i) for i in (0, 2, 1, 3)))

    def transpose(self, pairs):
        """Transposes the 8 x 8 matrix in each row of a tile."""
        if self.interpret:
            turned = jnp.swapaxes(_matrices(pairs), 1, 2).reshape(-1, 8, 4, 2)
            return _pair(turned[..., 0], turned[..., 1]).reshape(pairs.shape)
        return _call("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", [pairs], I32)

    def multiply(self, accumulator, left, right):
        """Adds left @ right; the right operand is rows 0 and 1."""
        if self.interpret:
            return self._product(accumulator, left, right[:2])
        code = (
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, "
            "{$8, $9, $10, $11}, {$12, $13}, {$4, $5, $6, $7};"
        )
        return _call(code, [accumulator, left, right], F32, pack=4)

    def multiply_narrow(self, accumulator, left, right, first, row):
        """The same with 8 columns of left (rows `first`, `first` + 1) and 8 rows of right."""
        if self.interpret:
            return self._product(accumulator, left[first : first + 2], right[row][None])
        code = (
            "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, "
            f"{{${8 + first}, ${9 + first}}}, {{${12 + row}}}, {{$4, $5, $6, $7}};"
        )
        return _call(code, [accumulator, left, right], F32, pack=4)

    def _product(self, accumulator, left, right):
        left = [_matrices(row) for row in left]
        halves = [jnp.concatenate(left[i : i + 2], 1) for i in range(0, len(left), 2)]
        right = jnp.concatenate([_matrices(row) for row in right], axis=2)
        product = jnp.einsum(
            "wmk,wnk->wmn", jnp.concatenate(halves, axis=2), right, precision="highest"
        ).reshape(-1, 2, 8, 4, 2)
        rows = [product[:, i // 2, :, :, i % 2].reshape(-1) for i in range(4)]
        return accumulator + jnp.stack(rows)

    def multiply_add(self, x, y, z=None):
        """The sum x y + z on pairs of bfloat16."""
        if self.interpret:
            x, y = halves(x), halves(y)
            z = (0.0, 0.0) if z is None else halves(z)
            return _pair(x[0] * y[0] + z[0], x[1] * y[1] + z[1])
        z = jnp.full_like(x, -0x7FFF8000) if z is None else z
        return _call("fma.rn.bf16x2 $0, $1, $2, $3;", [x, y, z], I32)

    def quad(self, value, lane):
        """Every lane gets the value of that lane of its quad."""
        if self.interpret:
            quads = value.reshape(*value.shape[:-1], -1, 4)
            value = jnp.broadcast_to(quads[..., lane : lane + 1], quads.shape)
            return value.reshape(*value.shape[:-2], -1)
        code = f"shfl.sync.idx.b32 $0, $1, {lane}, 0x1c1f, 0xffffffff;"
        return _call(code, [value], value.dtype)

    def quad_sum(self, value):
        """Every lane gets the sum over its quad."""
        if self.interpret:
            quads = value.reshape(*value.shape[:-1], -1, 4)
            value = jnp.broadcast_to(jnp.sum(quads, -1, keepdims=True), quads.shape)
            return value.reshape(*value.shape[:-2], -1)
        for mask in (1, 2):
            code = f"shfl.sync.bfly.b32 $0, $1, {mask}, 0x1f, 0xffffffff;"
            value = value + _call(code, [value], value.dtype)
        return value

    def across(self, value, source):
        """Every lane gets the value of lane `source` of its warp."""
        source = jnp.broadcast_to(source[None, :], value.shape)
        if self.interpret:
            warps = (value.shape[0], -1, WARP)
            chosen = (value.reshape(warps), source.reshape(warps))
            return jnp.take_along_axis(*chosen, axis=2).reshape(value.shape)
        code = "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;"
        return _call(code, [value, source], value.dtype)

    def pairs(self, tile):
        """bfloat16 [2 or 4, lanes] -> one or two rows of pairs."""
        if self.interpret:
            rows = tile.astype(F32)
            return jnp.stack([_pair(*rows[i : i + 2]) for i in range(0, len(rows), 2)])
        count = tile.shape[0]
        code = (f"mov.b32 ${i}, ${count + i % (count // 2)};" for i in range(count))
        whole = _call(" ".join(code), [tile], I32, pack=count)
        return make(*(get(whole, i) for i in range(count // 2)))

    def widen(self, pairs):
        """One row of pairs -> their values, float32 [2, lanes]."""
        return make(*halves(get(pairs, 0)))

    def operand(self, pairs):
        """Two rows of pairs, and two rows of zeros."""
        zero = jnp.zeros_like(get(pairs, 0))
        return make(get(pairs, 0), get(pairs, 1), zero, zero)

    def doubled(self, pairs, selector):
        """One half of each pair, twice; `selector` is `half_selector` of the half."""
        selector = jnp.broadcast_to(selector[None, :], pairs.shape)
        if self.interpret:
            low, high = pairs & 0xFFFF, lax.shift_right_logical(pairs, jnp.int32(16))
            half = jnp.where(selector == self.half_selector(1), high, low)
            return half | (half << 16)
        return _call("prmt.b32 $0, $1, $1, $2;", [pairs, selector], I32)

    def half_selector(self, half):
        """What `doubled` takes for the lower half, 0, or the upper one, 1."""
        return jnp.where(half == 1, 0x3232, 0x1010)

    def split(self, value):
        """float32 as pairs of bfloat16 whose sum it is, to 16 bits."""
        upper = _upper(value)
        return self.pair(upper, value - upper)

    def hidden_zero(self, lane):
        """Zeros [lanes] that the compiler does not know to be zero."""
        lane = lane % WARP
        if self.interpret:
            return jnp.zeros_like(lane)
        code = "{ .reg .b32 l; mov.u32 l, %laneid; xor.b32 $0, l, $1; }"
        return _call(code, [lane], I32)

    def after(self, value, other, zero):
        """`value`, which the compiler takes to depend on the row `other`."""
        bits = _bits(value) | (_bits(other) & zero)[None, :]
        return lax.bitcast_convert_type(bits, F32)
