"""The backward GPU kernels of the selective scan for any call; see `pallas_triton_fragments`.

As in the forward kernel, a lane owns one channel with all its states. Calls that fit the
fragments' kernel run that one instead of `backward_kernel`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

from pallas_kernels.selective_scan import pallas_triton_kernels as kernels

# How sums over a group's channels are made: "mma" on tensor cores, "plain" by shuffles.
SUMS = "mma"


def _gate(place, loaded, step):
    """(dy, z, its sigmoid, d loss / d ungated output), zero at steps beyond the end."""
    dy = place.keep(place.widen(loaded, "dy"), step.exists)
    if "z" not in loaded:
        return dy, None, None, dy
    z = place.widen(loaded, "z")
    sigmoid = kernels._sigmoid(z, place.plan)
    return dy, z, sigmoid, dy * (z * sigmoid)


def local_adjoint_kernel(plan, refs):
    """What a chunk's own outputs pull back to the state before it."""
    place, A2 = kernels._start(plan, refs)
    pairs = place.pairs(place.first, place.blocks, kernels.FORWARD_STEPS)

    def starts(j):
        return place.first + (2 * pairs - 1 - j) * kernels.FORWARD_STEPS

    def steps(j, loaded, carry):
        loaded = loaded[0]
        for u in reversed(range(kernels.FORWARD_STEPS)):
            step = kernels._inputs(place, refs, starts(j) + u, loaded[u])
            g = _gate(place, loaded[u], step)[3][:, None]
            C = place.widen(loaded[u], "C")
            decays = kernels._decays(step, A2, plan)
            carry = [a * (s + g * c) for a, s, c in zip(decays, carry, C, strict=True)]
        return carry

    carry = kernels._prefetched(
        place,
        refs,
        ("x", "dt", "C", "z", "dy", "restart"),
        starts,
        (pairs, kernels.FORWARD_STEPS),
        steps,
        [jnp.zeros_like(a) for a in A2],
    )
    place.store_states(refs.end, carry, place.b, place.chunk)


@functools.cache
def _mma_sum_code():
    """(PTX, constraints) that sum two tiles of eight values a lane over lanes.

    Of the result's eight values a lane, the first is the sum over groups of 16 lanes, the
    second over 32; the others are zero.
    """
    lines = [
        ".reg .f32 s0, s1, s2, s3;",
        ".reg .b32 zero, lane, bit;",
        ".reg .pred odd;",
        "mov.b32 zero, 0;",
        *(f"mov.f32 s{i}, 0f00000000;" for i in range(4)),
    ]
    # Operands: eight results, then eight values of each tile, then the selection.
    for i in range(8):
        low, high, one = f"${8 + i}", f"${16 + i}", f"${24 + i}"
        lines.append(
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {s0, s1, s2, s3}, "
            f"{{{one}, zero, zero, {one}}}, {{{low}, {high}}}, {{s0, s1, s2, s3}};"
        )
    lines += [
        "add.f32 s0, s0, s1;",
        "add.f32 s2, s2, s3;",
        "mov.u32 lane, %laneid;",
        "and.b32 bit, lane, 1;",
        "setp.ne.b32 odd, bit, 0;",
        "selp.f32 s1, s0, s2, odd;",
        "selp.f32 s0, s2, s0, odd;",
        "shfl.sync.bfly.b32 s1, s1, 1, 31, 0xffffffff;",
        "add.f32 s0, s0, s1;",
        "shfl.sync.bfly.b32 s1, s0, 2, 31, 0xffffffff;",
        "add.f32 s1, s0, s1;",
        "mov.f32 $0, s0;",
        "mov.f32 $1, s1;",
        *(f"mov.f32 ${i}, 0f00000000;" for i in range(2, 8)),
    ]
    constraints = ["=&f"] * 8 + ["f"] * 24
    return "{ " + " ".join(lines) + " }", ",".join(constraints)


def _store_group_sums(place, ref, tiles, lanes, step):
    """Sums tiles [lanes, row] over each group's lanes of a warp; stores [groups, N]."""
    plan = place.plan
    # Tensor cores round float32 operands to 10 bits, as good as bfloat16 results need.
    fits = (
        lanes in (kernels.WARP // 2, kernels.WARP)
        and plan.row == 8
        and plan.state % 16 == 0
    )
    if SUMS == "mma" and fits and not plan.interpret:
        _store_group_sums_mma(place, ref, tiles, lanes, step)
    else:
        _store_group_sums_plain(place, ref, tiles, lanes, step)


def _store_group_sums_mma(place, ref, tiles, lanes, step):
    """The sums of groups of 16 or 32 lanes on the tensor cores.

    One instruction adds up two values over the four lanes of each quad; its left operand
    says which rows of the result the sums go to, so eight of them reduce 16 values to four
    a lane. Shuffles would take 64 and as many additions. It relies on a lane holding one
    row of a tile, the layout that follows from loading rows of B and C 16 bytes a lane.
    """
    plan = place.plan
    lane = jnp.arange(plan.lanes, dtype=jnp.int32)
    warp, lane = lane // kernels.WARP, lane % kernels.WARP
    # Where the lane's row of the left operand is the value's.
    selection = (lane[:, None] // 4 == place.column[None, :]).astype(jnp.float32)
    here = kernels.WARP // lanes
    group = (place.side * plan.warps + warp) * here
    if here == 2:
        group = group + lane % 4 // 2
    count = ref.shape[2] // plan.state
    mask = kernels._both(
        None if place.valid is None else group < count, step.exists, plan
    )
    if here == 1:
        mask = lane % 4 < 2 if mask is None else mask & (lane % 4 < 2)
    code, constraints = _mma_sum_code()
    for k in range(plan.state // 16):
        [sums] = plt.elementwise_inline_asm(
            code,
            args=[tiles[2 * k], tiles[2 * k + 1], selection],
            constraints=constraints,
            pack=8,
            result_shape_dtypes=[jax.ShapeDtypeStruct((plan.lanes, 8), jnp.float32)],
        )
        chosen = place.column[None, :] == (0 if here == 2 else 1)
        total = jnp.sum(jnp.where(chosen, sums, -0.0), axis=1)
        columns = group * plan.state + 16 * k + lane // 4 + 8 * (lane % 2)
        at = ref.at[place.b, step.t, columns]
        plt.store(at, total.astype(ref.dtype), mask=mask)


def _store_group_sums_plain(place, ref, tiles, lanes, step):
    """The sums by shuffles, whatever the layout."""
    plan = place.plan
    here = plan.lanes // lanes
    group = place.side * here + jnp.arange(here, dtype=jnp.int32)
    shape = (here, plan.row)
    mask = None
    if place.valid is not None:
        mask = (group < ref.shape[2] // plan.state)[:, None]
    if step.exists is not None:
        mask = step.exists if mask is None else mask & step.exists
    if mask is not None:
        mask = jnp.broadcast_to(mask, shape)
    for k, tile in enumerate(tiles):
        total = jnp.sum(tile.reshape(here, lanes, plan.row), axis=1)
        columns = group[:, None] * plan.state + k * plan.row + place.column[None, :]
        at = ref.at[place.b, step.t, columns]
        plt.store(at, total.astype(ref.dtype), mask=mask)


def _pull_back_step(place, refs, A2, skip, loaded, step, inside, carry):
    """One step backwards in time; `inside` = (decays, state before, state after)."""
    plan = place.plan
    decays, before, after = inside
    adjoint, dA, dD, dbias = carry
    B, C = place.widen(loaded, "B"), place.widen(loaded, "C")
    dy, z, sigmoid, g = _gate(place, loaded, step)
    at = (place.b, step.t)
    if z is not None:
        y = (
            kernels._sum_rows([s * c for s, c in zip(after, C, strict=True)])
            + skip * step.x
        )
        dz = dy * y * (sigmoid * (1.0 + z * (1.0 - sigmoid)))
        place.store_channels(refs.dz, dz, *at, exists=step.exists)
    g_column, d_column = g[:, None], step.d[:, None]
    adjoint = [s + g_column * c for s, c in zip(adjoint, C, strict=True)]
    sum_B = kernels._sum_rows([s * r for s, r in zip(adjoint, B, strict=True)])
    lanes = plan.group_lanes(plan.C_groups)[1]
    masked = place.keep(g)[:, None]
    _store_group_sums(place, refs.dC, [masked * s for s in after], lanes, step)
    lanes = plan.group_lanes(plan.B_groups)[1]
    masked = place.keep(step.dx)[:, None]
    _store_group_sums(place, refs.dB, [masked * s for s in adjoint], lanes, step)
    adjoint = [a * s for a, s in zip(decays, adjoint, strict=True)]
    pulled = [s * h for s, h in zip(adjoint, before, strict=True)]
    dA = [s + d_column * p for s, p in zip(dA, pulled, strict=True)]
    sum_A = kernels._sum_rows([a * p for a, p in zip(A2, pulled, strict=True)])
    dd = step.x * sum_B + (1.0 / kernels.LOG2E) * sum_A
    slope = kernels._reciprocal(1.0 + step.u, plan)
    slope = jnp.where(step.v >= 0.0, slope, step.u * slope)
    ddt = place.keep(dd * slope, step.exists)
    place.store_channels(refs.ddt, ddt, *at, exists=step.exists)
    dx = g * skip + step.d * sum_B
    place.store_channels(refs.dx, dx, *at, exists=step.exists)
    return adjoint, dA, dD + g * step.x, dbias + ddt


def _barrier(plan):
    if not plan.interpret:
        plt.debug_barrier()


def backward_kernel(plan, refs):
    """All gradients; the sums over time are those of the program's chunk."""
    place, A2 = kernels._start(plan, refs)
    skip = place.channels(refs.D)
    lane = jnp.arange(plan.lanes, dtype=jnp.int32)[:, None]

    def scratch(j, k):
        return refs.scratch.at[place.program, j, k, lane, place.column[None, :]]

    def advance(t, loaded, h):
        step = kernels._inputs(place, refs, t, loaded)
        decays, following = kernels._advance(
            step, A2, place.widen(loaded, "B"), h, plan
        )
        return step, (decays, h, following)

    def block(i, carry):
        start = place.first + (place.blocks - 1 - i) * kernels.BLOCK
        pairs = place.pairs(start, 1, kernels.BACKWARD_STEPS)

        def up(j, loaded, h):
            for u, values in enumerate(loaded[0]):
                t = j * kernels.FORWARD_STEPS + u
                if u % kernels.BACKWARD_STEPS == 0:
                    for k, tile in enumerate(h):
                        tile = tile.astype(refs.scratch.dtype)
                        plt.store(scratch(t // kernels.BACKWARD_STEPS, k), tile)
                h = advance(start + t, values, h)[1][2]
            return h

        kernels._prefetched(
            place,
            refs,
            ("x", "dt", "B", "restart"),
            lambda j: start + j * kernels.FORWARD_STEPS,
            (place.pairs(start, 1, kernels.FORWARD_STEPS), kernels.FORWARD_STEPS),
            up,
            place.states(refs.kept, place.b, start // kernels.BLOCK),
        )
        _barrier(plan)

        def down(j, loaded, carry):
            loaded, h = loaded
            h = [kernels._widen(tile, plan) for tile in h]
            done = []
            for u, values in enumerate(loaded):
                t = start + (2 * pairs - 1 - j) * kernels.BACKWARD_STEPS + u
                done.append((values, *advance(t, values, h)))
                h = done[-1][2][2]
            for values, step, inside in reversed(done):
                carry = _pull_back_step(
                    place, refs, A2, skip, values, step, inside, carry
                )
            return carry

        carry = kernels._prefetched(
            place,
            refs,
            ("x", "dt", "B", "C", "z", "dy", "restart"),
            lambda j: start + (2 * pairs - 1 - j) * kernels.BACKWARD_STEPS,
            (pairs, kernels.BACKWARD_STEPS),
            down,
            carry,
            lambda j: [scratch(2 * pairs - 1 - j, k)[...] for k in range(plan.rows)],
        )
        _barrier(plan)
        return carry

    zeros = [jnp.zeros_like(a) for a in A2]
    lanes = jnp.zeros((plan.lanes,), jnp.float32)
    carry = (place.states(refs.dh, place.b, place.chunk), zeros, lanes, lanes)
    carry = lax.fori_loop(0, place.blocks, block, carry)
    place.store_states(refs.dh0, carry[0], place.b, place.chunk)
    place.store_states(refs.dA, carry[1], place.b, place.chunk)
    place.store_channels(refs.dD, carry[2], place.b, place.chunk)
    place.store_channels(refs.dbias, carry[3], place.b, place.chunk)
