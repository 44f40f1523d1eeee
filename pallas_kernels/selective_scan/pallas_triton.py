"""The selective scan on a GPU through Pallas and Triton: calls, gradients, limits.

For the backward pass the forward keeps the state at every 64th step; the backward runs
those 64 steps again, first for the states at every second or fourth step (or the forward
keeps those, `checkpoint_every`) and then from each of them in registers. It never inverts
the recurrence. A batch too small for the GPU is cut in time as well: a first pass computes
each chunk's last state from zero, or what its outputs pull back to its start, and the
second pass begins from what those combine to.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import segments
from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.selective_scan import pallas_triton_backward as backward
from pallas_kernels.selective_scan import pallas_triton_forward as forward
from pallas_kernels.selective_scan import pallas_triton_fragments as fragments
from pallas_kernels.selective_scan import pallas_triton_kernels as kernels

# Warps that fill a large GPU: two for each of an H200's 528 schedulers.
ENOUGH_WARPS = 1024
MAX_STATE = 32
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
# Added to the exponent of a decay, in base 2, where the state restarts.
RESET = -1e30


def _call(kernel, plan, inputs, outputs, programs=None, warps=None):
    """Runs a kernel on arrays by name; an array that is None is None in the kernel."""
    inputs = {k: v for k, v in inputs.items() if v is not None}
    names = (*inputs, *outputs)
    absent = dict.fromkeys(("z", "restart", "kept"))

    def body(*refs):
        given = dict(zip(names, refs, strict=True))
        kernel(plan, types.SimpleNamespace(**(absent | given)))

    values = pl.pallas_call(
        body,
        grid=(programs or plan.programs,),
        out_shape=tuple(outputs.values()),
        interpret=plan.interpret,
        compiler_params=plt.CompilerParams(num_warps=warps or plan.warps, num_stages=1),
        name=f"selective_scan_{kernel.__name__}",
    )(*inputs.values())
    return dict(zip(outputs, values, strict=True))


def _float32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _flat(groups):
    """[B, L, G, N] -> [B, L, G N]."""
    return groups.reshape(*groups.shape[:2], -1)


def _named(arguments):
    names = ("x", "dt", "A", "B", "C", "D", "z", "bias", "h0", "restart")
    named = dict(zip(names, arguments, strict=True))
    return named | {"B": _flat(named["B"]), "C": _flat(named["C"])}


def _chunk_decays(plan, A, restart, total):
    """The factor from a chunk's first state to its last one: [B, chunks, E, N]."""
    decays = jnp.exp(total[..., None] * A[None, None])
    if restart is None:
        return decays
    pad = plan.chunks * plan.chunk - plan.length
    restarts = jnp.pad(restart, ((0, 0), (0, pad))).reshape(plan.batch, plan.chunks, -1)
    return jnp.where(jnp.any(restarts < 0, axis=2)[..., None, None], 0.0, decays)


def _linear_recurrence(decays, values, first, reverse=False):
    """s_0 = first, s_{j+1} = decays_j s_j + values_j, along axis 1; s before each j."""

    def step(state, inputs):
        decay, value = inputs
        return decay * state + value, state

    inputs = (jnp.moveaxis(decays, 1, 0), jnp.moveaxis(values, 1, 0))
    _, states = lax.scan(step, first, inputs, reverse=reverse)
    return jnp.moveaxis(states, 0, 1)


def _forward_kernels(plan, inputs):
    """The module of kernels that fit the call, and the plan as it needs it."""
    used = ("x", "dt", "B", "C", "z")
    dtypes = [inputs[k].dtype for k in used if inputs[k] is not None]
    tiles = forward.tile_plan(plan, dtypes)
    return (kernels, plan) if tiles is None else (forward, tiles)


def _run_forward(plan, arguments, keep_states):
    inputs = _named(arguments)
    module, plan = _forward_kernels(plan, inputs)
    b, length, e, n = plan.batch, plan.length, plan.channels, plan.state
    h0 = inputs["h0"][:, None]
    total = None
    if plan.chunks > 1:
        used = {k: inputs[k] for k in ("x", "dt", "A", "B", "bias", "restart")}
        outputs = {
            "end": _float32(b, plan.chunks, e, n),
            "total": _float32(b, plan.chunks, e),
        }
        local = _call(module.local_state_kernel, plan, used, outputs)
        total = local["total"]
        decays = _chunk_decays(plan, inputs["A"], inputs["restart"], total)
        h0 = _linear_recurrence(decays, local["end"], inputs["h0"])
    outputs = {
        "y": jax.ShapeDtypeStruct((b, length, e), inputs["x"].dtype),
        "end": _float32(b, plan.chunks, e, n),
    }
    if keep_states:
        outputs["kept"] = plan.kept
    out = _call(module.forward_kernel, plan, inputs | {"h0": h0}, outputs)
    return (out["y"], out["end"][:, -1]), (out.get("kept"), out["end"], total)


def _adjoint_after_chunks(plan, inputs, total, dh):
    """Adjoints of the states after the chunks, but for what the chunks add themselves."""
    if plan.chunks == 1:
        return dh[:, None]
    used = ("x", "dt", "A", "C", "z", "bias", "restart", "dy")
    used = {k: inputs[k] for k in used}
    shape = (plan.batch, plan.chunks, plan.channels, plan.state)
    outputs = {"end": _float32(*shape)}
    if _tiled(plan, inputs):
        size = fragments.programs(plan), fragments.warps(plan)
        local = _call(fragments.local_adjoint_kernel, plan, used, outputs, *size)
    else:
        local = _call(backward.local_adjoint_kernel, plan, used, outputs)
    decays = _chunk_decays(plan, inputs["A"], inputs["restart"], total)
    return _linear_recurrence(decays, local["end"], dh, reverse=True)


def _tiled(plan, inputs):
    """Whether the backward kernels in fragments fit; the gradient of y has x's dtype."""
    used = [inputs[k] for k in ("x", "dt", "B", "C", "z")]
    return fragments.fits(plan, [v.dtype for v in used if v is not None])


def _call_backward(plan, inputs):
    """The backward kernel that fits; dB and dC are in parts, [B, L, parts N]."""
    b, length, e, n = plan.batch, plan.length, plan.channels, plan.state
    tiled = _tiled(plan, inputs)
    outputs = {
        "d" + name: jax.ShapeDtypeStruct((b, length, e), inputs[name].dtype)
        for name in ("x", "dt", "z")
        if inputs[name] is not None
    }
    for name, groups in (("B", plan.B_groups), ("C", plan.C_groups)):
        parts = plan.runs * plan.padded_run // plan.group_lanes(groups)[1]
        parts = e // fragments.TILE if tiled else parts
        dtype = inputs[name].dtype
        outputs["d" + name] = jax.ShapeDtypeStruct((b, length, parts * n), dtype)
    outputs |= {name: _float32(b, plan.chunks, e, n) for name in ("dA", "dh0")}
    outputs |= {name: _float32(b, plan.chunks, e) for name in ("dD", "dbias")}
    if tiled:
        if plan.kept_every == kernels.BLOCK:
            outputs["scratch"] = fragments.scratch(plan)
        size = fragments.programs(plan), fragments.warps(plan)
        return _call(fragments.backward_kernel, plan, inputs, outputs, *size)
    steps = kernels.BLOCK // kernels.BACKWARD_STEPS
    # Rounded states (of bfloat16 inputs) are used within two steps and not passed on.
    outputs["scratch"] = jax.ShapeDtypeStruct(
        (plan.programs, steps, plan.rows, plan.lanes, plan.row), inputs["B"].dtype
    )
    return _call(backward.backward_kernel, plan, inputs, outputs)


def _run_backward(plan, residuals, cotangents):
    arguments, kept, end, total = residuals
    dy, dh = cotangents
    inputs = _named(arguments) | {"dy": dy, "kept": kept}
    inputs["dh"] = _adjoint_after_chunks(plan, inputs, total, dh.astype(jnp.float32))
    if plan.kept_every < kernels.BLOCK:
        inputs["end"] = end
    del inputs["h0"]
    out = _call_backward(plan, inputs)

    def sum_parts(name, groups):
        """Adds up what several programs computed for one group."""
        value = out["d" + name]
        value = value.reshape(*value.shape[:2], groups, -1, plan.state)
        if value.shape[3] == 1:
            return value[:, :, :, 0]
        total = jnp.sum(value, axis=3, dtype=jnp.float32)
        return total.astype(value.dtype)

    return (
        out["dx"],
        out["ddt"],
        jnp.sum(out["dA"], axis=(0, 1)),
        sum_parts("B", plan.B_groups),
        sum_parts("C", plan.C_groups),
        jnp.sum(out["dD"], axis=(0, 1)),
        out.get("dz"),
        jnp.sum(out["dbias"], axis=(0, 1)),
        out["dh0"][:, 0],
        None,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(plan, *arguments):
    return _run_forward(plan, arguments, keep_states=False)[0]


def _scan_forward(plan, *arguments):
    outputs, kept = _run_forward(plan, arguments, keep_states=True)
    return outputs, (arguments, *kept)


_scan.defvjp(_scan_forward, _run_backward)


def _chunk_length(length, warps):
    """Steps of a chunk, so that enough warps run side by side."""
    blocks = pl.cdiv(length, kernels.BLOCK)
    chunks = min(max(1, ENOUGH_WARPS // warps), pl.cdiv(blocks, 2))
    # Computing the chunks' states first is most of a forward pass.
    if chunks < 3:
        return blocks * kernels.BLOCK
    return pl.cdiv(blocks, chunks) * kernels.BLOCK


def _check_support(inputs, state):
    for name, value in inputs.items():
        if value is not None and value.dtype not in DTYPES:
            raise UnsupportedError(f"{name} is {value.dtype}")
    if state > MAX_STATE:
        raise UnsupportedError(f"{state} states a channel, more than {MAX_STATE}")


def _check_platform():
    if jax.default_backend() != "gpu":
        raise UnsupportedError(f"needs a CUDA GPU, not {jax.default_backend()}")
    kind = jax.devices()[0].device_kind
    if not kind.startswith("NVIDIA"):
        raise UnsupportedError(f"needs an NVIDIA GPU, not {kind}")


def selective_scan(
    x,
    dt,
    A,
    B,
    C,
    *,
    D,
    z,
    dt_bias,
    initial_state,
    segment_ids,
    checkpoint_every=kernels.BLOCK,
    interpret=False,
):
    """Returns (y, final_state); see `api.selective_scan` for the arguments.

    `interpret` runs the kernels in Pallas' interpreter, on any platform.
    """
    _check_support(dict(x=x, dt=dt, A=A, B=B, C=C, D=D, z=z), A.shape[1])
    if not interpret:
        _check_platform()
    return scan(
        x,
        dt,
        A,
        B,
        C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        initial_state=initial_state,
        segment_ids=segment_ids,
        checkpoint_every=checkpoint_every,
        interpret=interpret,
    )


def scan(
    x,
    dt,
    A,
    B,
    C,
    *,
    D,
    z,
    dt_bias,
    initial_state,
    segment_ids,
    checkpoint_every=kernels.BLOCK,
    interpret,
):
    """`selective_scan` without the look at the platform."""
    f32 = jnp.float32
    (batch, length, channels), state = x.shape, A.shape[1]
    if B.dtype != C.dtype:
        B, C = B.astype(f32), C.astype(f32)
    row = 16 // B.dtype.itemsize
    A, D, dt_bias, initial_state = (
        jnp.zeros(shape, f32) if v is None else v.astype(f32)
        for v, shape in (
            (A, None),
            (D, (channels,)),
            (dt_bias, (channels,)),
            (initial_state, (batch, channels, state)),
        )
    )
    # A state with a zero row of B stays zero.
    extra = -state % row
    A, B, C, initial_state = (
        jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, extra)]) if extra else v
        for v in (A, B, C, initial_state)
    )
    restart = None
    if segment_ids is not None:
        restart = jnp.where(segments.continues(segment_ids), 0.0, RESET).astype(f32)
    plan = kernels.Plan(
        batch=batch,
        length=length,
        channels=channels,
        state=state + extra,
        B_groups=B.shape[2],
        C_groups=C.shape[2],
        row=row,
        chunk=pl.cdiv(length, kernels.BLOCK) * kernels.BLOCK,
        interpret=interpret,
        kept_every=kernels.BLOCK,
    )
    used = [v.dtype for v in (x, dt, B, C, z) if v is not None]
    plan = dataclasses.replace(
        plan,
        chunk=_chunk_length(length, plan.programs * plan.warps),
        kept_every=fragments.kept_every(plan, used, checkpoint_every),
    )
    y, h = _scan(plan, x, dt, A, B, C, D, z, dt_bias, initial_state, restart)
    return y, h[..., :state]
