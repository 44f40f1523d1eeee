"""The causal convolution and its gradients as Triton kernels, for CUDA GPUs.

A thread owns a few channels and walks along a chunk of time with its last W - 1 inputs in
registers, so that an input is read once; the next steps are loaded before any of them is
used. The backward pass walks the same way: it computes the sums before the activation
again and keeps the unfinished gradients of the last W - 1 inputs in registers.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import gpu
from pallas_kernels.causal_conv import parts
from pallas_kernels.dispatch import UnsupportedError


class Blocks(NamedTuple):
    """How the work is cut: channels a thread, warps, steps loaded at once, a chunk."""

    values: int
    warps: int
    steps: int
    chunk: int


FORWARD = Blocks(values=4, warps=4, steps=8, chunk=128)
BACKWARD = Blocks(values=2, warps=4, steps=8, chunk=128)
MAX_WIDTH = 8


def causal_conv(
    x,
    kernel,
    bias,
    *,
    initial_window,
    segment_ids,
    activation,
    splits=None,
    group=None,
):
    """Returns y, or its parts; see `api.causal_conv` for the arguments."""
    gpu.check_platform()
    if kernel.shape[0] > MAX_WIDTH:
        raise UnsupportedError(f"{kernel.shape[0]} taps are more than {MAX_WIDTH}")
    if kernel.shape[0] == 1:
        initial_window = segment_ids = None
    outputs = kernel.shape[1]
    group = group or x.shape[2]
    # A program sums the gradients of a group's repeats: it has to hold all of them.
    run = group * (outputs // x.shape[2])
    if run & (run - 1) or group & (group - 1) or _block(BACKWARD) % run:
        x = parts.repeat(x, outputs, group)
        initial_window = parts.repeat(initial_window, outputs, group)
    plan = Plan(activation, splits or (outputs,), group)
    found = _causal_conv(plan, x, kernel, bias, initial_window, segment_ids)
    return found[0] if splits is None else found


class Plan(NamedTuple):
    """What is static.

    Attributes:
        activation: "silu" or None.
        splits: Channels of each part of the output.
        group: Channels of x that are repeated as one, where x has fewer than the output.
    """

    activation: str | None
    splits: tuple[int, ...]
    group: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _causal_conv(plan, x, kernel, bias, initial_window, segment_ids):
    inputs = _given(
        x=x, kernel=kernel, bias=bias, window=initial_window, ids=segment_ids
    )
    widths = _written_apart(FORWARD, plan.splits)
    found = _call(
        _forward_kernel,
        plan,
        FORWARD,
        inputs,
        {
            f"y{i}": jax.ShapeDtypeStruct((*x.shape[:2], width), x.dtype)
            for i, width in enumerate(widths)
        },
    )
    if len(found) == len(plan.splits):
        return tuple(found)
    return parts.split(found[0], plan.splits)


def _forward(plan, x, kernel, bias, initial_window, segment_ids):
    arguments = (x, kernel, bias, initial_window, segment_ids)
    return _causal_conv(plan, *arguments), arguments


def _backward(plan, arguments, dys):
    x, kernel, bias, window, ids = arguments
    if len(_written_apart(BACKWARD, plan.splits)) != len(dys):
        dys = (jnp.concatenate(dys, axis=-1),)
    dys = {f"dy{i}": dy for i, dy in enumerate(dys)}
    batch, length, _ = x.shape
    chunks = pl.cdiv(length, _chunk(BACKWARD, length))
    # The gradients of taps and bias are summed over rows and chunks by XLA.
    sums = (batch, chunks, kernel.shape[0] + (bias is not None), kernel.shape[1])
    outputs = {
        "dx": jax.ShapeDtypeStruct(x.shape, x.dtype),
        "sums": jax.ShapeDtypeStruct(sums, jnp.float32),
    }
    if window is not None:
        outputs["dwindow"] = jax.ShapeDtypeStruct(window.shape, window.dtype)
    dx, sums, *dwindow = _call(
        _backward_kernel,
        plan,
        BACKWARD,
        _given(x=x, kernel=kernel, bias=bias, window=window, ids=ids, **dys),
        outputs,
    )
    sums = jnp.sum(sums, axis=(0, 1))
    dkernel = sums[: kernel.shape[0]].astype(kernel.dtype)
    dbias = None if bias is None else sums[-1].astype(bias.dtype)
    return dx, dkernel, dbias, dwindow[0] if dwindow else None, None


_causal_conv.defvjp(_forward, _backward)


def _written_apart(blocks: Blocks, splits: tuple[int, ...]) -> tuple[int, ...]:
    """The parts as kernels know them: a single one if a block would hold two of them."""
    block = _block(blocks)
    return splits if all(s % block == 0 for s in splits) else (sum(splits),)


def _given(**arrays):
    return {name: value for name, value in arrays.items() if value is not None}


def _block(blocks: Blocks) -> int:
    return 32 * blocks.values * blocks.warps


def _chunk(blocks: Blocks, length: int) -> int:
    return min(blocks.chunk, pl.cdiv(length, blocks.steps) * blocks.steps)


def _call(kernel, plan, blocks, inputs, outputs):
    batch, length, _ = inputs["x"].shape
    block = _block(blocks)
    chunk = _chunk(blocks, length)
    return pl.pallas_call(
        functools.partial(
            kernel,
            names=(*inputs, *outputs),
            plan=plan,
            block=block,
            steps=blocks.steps,
            chunk=chunk,
        ),
        grid=(pl.cdiv(inputs["kernel"].shape[1], block), pl.cdiv(length, chunk), batch),
        out_shape=list(outputs.values()),
        compiler_params=plt.CompilerParams(num_warps=blocks.warps, num_stages=1),
        interpret=gpu.INTERPRET,
        name="causal_conv" + kernel.__name__.removesuffix("_kernel"),
    )(*inputs.values())


class _Walk:
    """One program's channels and chunk of time, and how it reads and writes rows.

    Channels are the output's; what belongs to x lies at the channel that they repeat.
    """

    OF_X = ("x", "window", "dx", "dwindow")

    def __init__(self, refs, plan, block, chunk):
        self.refs = refs
        self.row = pl.program_id(2)
        self.chunk = pl.program_id(1)
        self.start = self.chunk * chunk
        self.end = self.start + chunk
        _, self.length, inputs = refs["x"].shape
        taps, channels = refs["kernel"].shape
        self.past = taps - 1
        self.block = block
        self.first = pl.program_id(0) * block
        self.c = self.first + jnp.arange(block, dtype=jnp.int32)
        self.inside = None if channels % block == 0 else self.c < channels
        self.group, self.repeats = plan.group, channels // inputs
        self.source = self.c
        if self.repeats > 1:
            # Not `//` and `%`, whose rules for signs hide that channels are adjacent.
            runs = lax.div(self.c, self.group * self.repeats)
            self.source = runs * self.group + lax.rem(self.c, self.group)
        # Where chunks tile the sequence no step of theirs is outside of it.
        self.is_even = self.length % chunk == 0

    def for_each_part(self, name, run):
        """Calls `run` with the part of `name` that holds these channels.

        The part is a name and its first channel.
        """
        names = [n for n in self.refs if n.rstrip("0123456789") == name and n != name]
        if len(names) == 1:
            run((names[0], 0))
            return
        first = 0
        for part in names:
            width = self.refs[part].shape[-1]
            is_here = (self.first >= first) & (self.first < first + width)
            pl.when(is_here)(functools.partial(run, (part, first)))
            first += width

    def load(self, name, *index, where=None):
        """Float32 channels of `name`; zeros unless the scalar `where`."""
        mask = self._mask(where)
        other = None if mask is None else 0.0
        ref = self._at(name, index)
        return plt.load(ref, mask=mask, other=other).astype(jnp.float32)

    def store(self, name, *index, value, where=None):
        """Writes channels of `name`, nothing unless the scalar `where`."""
        if name in self.OF_X and self.repeats > 1:
            value = self._sum_repeats(value)
        at = self._at(name, index)
        plt.store(at, value.astype(at.dtype), mask=self._mask(where))

    def _at(self, name, index):
        name, first = name if isinstance(name, tuple) else (name, 0)
        channel = self.source if name in self.OF_X else self.c
        return self.refs[name].at[(*index, channel - first if first else channel)]

    def _sum_repeats(self, value):
        """Sums over the repeats, on all of them: they write the same."""
        apart = value.reshape(-1, self.repeats, self.group)
        total = jnp.sum(apart, axis=1, keepdims=True)
        return jnp.broadcast_to(total, apart.shape).reshape(value.shape)

    def _mask(self, where):
        if where is None:
            return self.inside
        where = jnp.broadcast_to(where, self.c.shape)
        return where if self.inside is None else where & self.inside

    def step(self, name, t):
        """A row of the chunk, zeros past the end of the sequence."""
        return self.load(
            name, self.row, t, where=None if self.is_even else t < self.length
        )

    def window(self):
        """The inputs before the chunk, the latest one last."""
        rows = []
        for i in range(self.past):
            t = self.start - self.past + i
            row = self.load("x", self.row, jnp.maximum(t, 0), where=t >= 0)
            if "window" in self.refs:
                at = jnp.clip(t + self.past, 0, self.past - 1)
                row = row + self.load("window", self.row, at, where=t < 0)
            rows.append(row)
        return rows

    def same_segment(self, t):
        """Whether each of the inputs before t is of t's segment, None if all are."""
        if "ids" not in self.refs:
            return [None] * self.past

        def segment(t):
            return self.refs["ids"][self.row, jnp.clip(t, 0, self.length - 1)]

        here = segment(t)
        return [segment(t - self.past + i) == here for i in range(self.past)]


def _keep(same, value):
    return value if same is None else jnp.where(same, value, 0.0)


def _tap_sum(taps, bias, inputs):
    total = taps[-1] * inputs[-1]
    for tap, value in zip(taps[:-1], inputs[:-1], strict=True):
        total = total + tap * value
    return total if bias is None else total + bias


def _forward_kernel(*refs, names, plan, block, steps, chunk):
    walk = _Walk(dict(zip(names, refs, strict=True)), plan, block, chunk)
    walk.for_each_part(
        "y", functools.partial(_forward_part, walk, steps, chunk, plan.activation)
    )


def _forward_part(walk, steps, chunk, activation, y_part):
    refs = walk.refs
    taps = [walk.load("kernel", w) for w in range(walk.past + 1)]
    bias = walk.load("bias") if "bias" in refs else None

    def body(i, window):
        first = walk.start + i * steps
        rows = [walk.step("x", first + u) for u in range(steps)]
        window = list(window)
        for u, x in enumerate(rows):
            t = first + u
            same = walk.same_segment(t)
            inputs = [*map(_keep, same, window), x]
            y = _tap_sum(taps, bias, inputs)
            if activation == "silu":
                y = y * gpu.sigmoid(y)
            where = None if walk.is_even else t < walk.length
            walk.store(y_part, walk.row, t, value=y, where=where)
            window = [*window, x][1:]
        return tuple(window)

    lax.fori_loop(0, chunk // steps, body, tuple(walk.window()))


def _backward_kernel(*refs, names, plan, block, steps, chunk):
    walk = _Walk(dict(zip(names, refs, strict=True)), plan, block, chunk)
    walk.for_each_part(
        "dy", functools.partial(_backward_part, walk, steps, chunk, plan.activation)
    )


def _backward_part(walk, steps, chunk, activation, dy_part):
    refs, past, block = walk.refs, walk.past, walk.block
    taps = [walk.load("kernel", w) for w in range(past + 1)]
    bias = walk.load("bias") if "bias" in refs else None

    def step(t, x, dy, window, unfinished):
        """Gradients that the output at t sends back: to its sum and to its inputs."""
        same = walk.same_segment(t)
        inputs = [*map(_keep, same, window), x]
        if activation == "silu":
            total = _tap_sum(taps, bias, inputs)
            gate = gpu.sigmoid(total)
            dy = dy * gate * (1.0 + total * (1.0 - gate))
        to_inputs = [*map(_keep, same, (tap * dy for tap in taps[:-1])), taps[-1] * dy]
        zeros = jnp.zeros_like(dy)
        return (
            inputs,
            dy,
            [a + b for a, b in zip([*unfinished, zeros], to_inputs, strict=True)],
        )

    def finish(t, gradient):
        """Writes the gradient of the input at t - past: t was the last to use it."""
        source = t - past
        walk.store(
            "dx",
            walk.row,
            jnp.maximum(source, 0),
            value=gradient,
            where=(source >= walk.start) & (source < walk.length),
        )
        if "dwindow" in refs:
            at = jnp.minimum(t, past - 1)
            walk.store("dwindow", walk.row, at, value=gradient, where=source < 0)

    def body(i, carry):
        window, unfinished, sums = map(list, carry)
        first = walk.start + i * steps
        rows = [
            (walk.step("x", first + u), walk.step(dy_part, first + u))
            for u in range(steps)
        ]
        for u, (x, dy) in enumerate(rows):
            inputs, ds, unfinished = step(first + u, x, dy, window, unfinished)
            terms = [ds * value for value in inputs] + ([] if bias is None else [ds])
            sums = [a + b for a, b in zip(sums, terms, strict=True)]
            finish(first + u, unfinished[0])
            unfinished = unfinished[1:]
            window = [*window, x][1:]
        return tuple(window), tuple(unfinished), tuple(sums)

    zeros = jnp.zeros((block,), jnp.float32)
    carry = (
        tuple(walk.window()),
        (zeros,) * past,
        (zeros,) * (past + 1 + (bias is not None)),
    )
    window, unfinished, sums = lax.fori_loop(0, chunk // steps, body, carry)
    for k, value in enumerate(sums):
        walk.store("sums", walk.row, walk.chunk, k, value=value)
    # The next chunk's first outputs finish this chunk's last inputs.
    window, unfinished = list(window), list(unfinished)
    for h in range(past):
        t = walk.end + h
        at, where = jnp.minimum(t, walk.length - 1), t < walk.length
        x = walk.load("x", walk.row, at, where=where)
        dy = walk.load(dy_part, walk.row, at, where=where)
        _, _, unfinished = step(t, x, dy, window, unfinished)
        finish(t, unfinished[0])
        unfinished, window = unfinished[1:], [*window, x][1:]
