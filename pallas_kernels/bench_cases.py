"""What the benchmark runs: each operation at its named shapes, and its least cost."""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.cached_attention import api as attention_api
from pallas_kernels.cached_attention import shapes as attention_shapes
from pallas_kernels.causal_conv import api as conv_api
from pallas_kernels.causal_conv import shapes as conv_shapes
from pallas_kernels.gated_norm import api as norm_api
from pallas_kernels.gated_norm import shapes as norm_shapes
from pallas_kernels.multi_step import api as multi_step_api
from pallas_kernels.multi_step import shapes as multi_step_shapes
from pallas_kernels.residual_norm import api as residual_api
from pallas_kernels.residual_norm import shapes as residual_shapes
from pallas_kernels.selective_scan import api as selective_api
from pallas_kernels.selective_scan import shapes as selective_shapes
from pallas_kernels.ssd import api as ssd_api
from pallas_kernels.ssd import shapes as ssd_shapes

# Relative errors in norm of bfloat16 values against the reference in float32.
TOLERANCE = {"forward": 1e-2, "forward_backward": 1e-2}
# XLA rounds partial sums over tokens of the scale's gradient to bfloat16, which is 1.1e-2 off
# for 768 tokens on a CPU; beside the kernel they are summed in float32.
LOOSE = {"residual_norm": {"scale": 2e-2}}


class Peaks(NamedTuple):
    """What a device can do in a second."""

    bandwidth: float  # bytes, as its maker states it
    exps: float  # exponentials
    flops: float  # bfloat16 matrix products


# Exponentials: 16 a clock and multiprocessor. Matrix products: measured on an H200, its
# share of the stated rate taken for the others.
PEAKS = {
    "H200": Peaks(4.8e12, 4.2e12, 780e12),
    "H100": Peaks(3.35e12, 4.2e12, 780e12),
    "A100": Peaks(2.04e12, 2.4e12, 250e12),
}


class Cost(NamedTuple):
    """The least that an operation moves and computes; the largest term is its floor.

    Bytes count every input read once and every output written once. In a backward pass
    the inputs are read again and the exponentials, which nobody can keep, computed
    again.
    """

    bytes: float
    exps: float = 0.0
    flops: float = 0.0

    def floor_ms(self, peaks: Peaks | None) -> float | None:
        """Returns the floor on a device, None on one that is not in `PEAKS`."""
        if peaks is None:
            return None
        return 1e3 * max(
            self.bytes / peaks.bandwidth,
            self.exps / peaks.exps,
            self.flops / peaks.flops,
        )


class Case(NamedTuple):
    """One operation at one shape.

    Attributes:
      op: Name of the operation.
      shape: Name of the shape.
      make: From a key to the inputs, a dict; floats in it are differentiated.
      make_small: The same for the comparison with the reference.
      call: From the inputs and an implementation's name to the outputs.
      implementations: Names, the reference among them.
      costs: Least cost by pass; passes that are not in it are not timed.
      donated: Inputs that a call may overwrite, as its caller in a model lets it.
      tolerance: Largest relative error in norm of a value, and with gradients.
      loose: The same for the gradients of inputs that need a bound of their own.
      shared: Inputs whose gradient is another one's: as outputs, both would be a copy.
    """

    op: str
    shape: str
    make: Callable[[jax.Array], dict[str, Any]]
    make_small: Callable[[jax.Array], dict[str, Any]]
    call: Callable[[dict[str, Any], str], Any]
    implementations: Sequence[str]
    costs: dict[str, Cost]
    donated: tuple[str, ...] = ()
    tolerance: dict[str, float] = TOLERANCE
    loose: Mapping[str, float] = MappingProxyType({})
    shared: tuple[str, ...] = ()


def _normals(key: jax.Array, **sizes: Any) -> dict[str, jax.Array]:
    """Random values by name: bfloat16, or float32 for a size that ends in None."""
    made = {}
    for name, size in sizes.items():
        key, here = jax.random.split(key)
        dtype = jnp.float32 if size[-1] is None else jnp.bfloat16
        size = tuple(s for s in size if s is not None)
        made[name] = jax.random.normal(here, size, dtype)
    return made


def _decays(value: jax.Array) -> jax.Array:
    """Continuous-time rates as a trained model has them, from normal values."""
    return -jnp.exp(value)


def _small(shape: Any) -> Any:
    """A shape that the reference can differentiate in a second."""
    return shape._replace(batch=min(shape.batch, 2), length=min(shape.length, 384))


def _case(
    op: str,
    name: str,
    shape: Any,
    make: Callable[[Any, jax.Array], dict[str, Any]],
    api: Any,
    costs: dict[str, Cost],
    small: Any = None,
    **options: Any,
) -> Case:
    """A case of an operation whose arguments are the inputs and some fixed options."""
    small = _small(shape) if small is None else small
    function = getattr(api, op)

    def call(inputs, implementation):
        return function(**inputs, **options, implementation=implementation)

    makers = (functools.partial(make, s) for s in (shape, small))
    names = tuple(api.IMPLEMENTATIONS)
    return Case(op, name, *makers, call, names, costs, loose=LOOSE.get(op, {}))


def selective_scan_case(name: str) -> Case:
    """Returns the selective scan at one of its shapes, gate and skip fused."""
    shape = selective_shapes.LARGE[name]

    def make(s, key):
        b, length, e, n = s.batch, s.length, s.d_inner, s.d_state
        made = _normals(
            key,
            x=(b, length, e),
            dt=(b, length, e),
            A=(e, n, None),
            B=(b, length, s.B_groups, n),
            C=(b, length, s.C_groups, n),
            D=(e, None),
            z=(b, length, e),
            dt_bias=(e, None),
        )
        return made | {"A": _decays(made["A"])} | _segments(s, key)

    tokens = shape.batch * shape.length
    channels = 2 * tokens * shape.d_inner
    maps = 2 * tokens * (shape.B_groups + shape.C_groups) * shape.d_state
    exps = tokens * shape.d_inner * (shape.d_state + 2)
    # Forward: x, dt, z in, y out. Backward: those and dy in, dx, ddt, dz out.
    costs = {
        "forward": Cost(4 * channels + maps, exps),
        "forward_backward": Cost(11 * channels + 3 * maps, 2 * exps),
    }
    every = {"checkpoint_every": shape.checkpoint_every}
    case = _case("selective_scan", name, shape, make, selective_api, costs, **every)
    if shape.checkpoint_every < max(selective_api.CHECKPOINTS):
        # Others keep what they keep.
        return case._replace(implementations=("pallas_triton", "reference"))
    return case


def ssd_case(name: str) -> Case:
    """Returns the SSD scan at one of its shapes."""
    shape = ssd_shapes.LARGE[name]

    def make(s, key):
        b, length, k, n = s.batch, s.length, s.kv_heads, s.d_state
        made = _normals(
            key,
            x=(b, length, k, s.head_dim),
            dt=(b, length, s.heads),
            A=(s.heads, None),
            B=(b, length, k, n),
            C=(b, length, s.heads, n),
            D=(s.heads, None),
            dt_bias=(s.heads, None),
        )
        return made | {"A": _decays(made["A"])} | _segments(s, key)

    tokens = shape.batch * shape.length
    n, width = shape.d_state, shape.head_dim
    grouped = 2 * tokens * shape.kv_heads * (width + n)
    headed = 2 * tokens * shape.heads * (width + n)
    # In chunks of 64: half of the scores count, each with N + P products; the state takes
    # N P to update and N P to read.
    flops = 2 * tokens * shape.heads * (32 * (width + n) + 2 * n * width)
    costs = {
        "forward": Cost(grouped + headed, 0.0, flops),
        "forward_backward": Cost(3 * (grouped + headed), 0.0, 3 * flops),
    }
    return _case("ssd", name, shape, make, ssd_api, costs)


def causal_conv_case(name: str) -> Case:
    """Returns the convolution at one of its shapes, bias and silu fused."""
    shape = conv_shapes.LARGE[name]

    def make(s, key):
        c = s.channels
        made = _normals(
            key,
            x=(s.batch, s.length, c),
            kernel=(s.width, c, None),
            bias=(c, None),
        )
        return made | _segments(s, key)

    values = shape.batch * shape.length * shape.channels
    # A silu is one exponential. Forward: x in, y out. Backward: x and dy in, dx out.
    costs = {
        "forward": Cost(4 * values, values),
        "forward_backward": Cost(10 * values, 2 * values),
    }
    return _case("causal_conv", name, shape, make, conv_api, costs, activation="silu")


def gated_norm_case(name: str) -> Case:
    """Returns the gated norm at one of its shapes."""
    shape = norm_shapes.LARGE[name]

    def make(s, key):
        size = (s.batch, s.length, s.heads * s.width)
        return _normals(key, y=size, z=size, scale=(size[-1], None))

    values = shape.batch * shape.length * shape.heads * shape.width
    # Forward: y and z in, one out. Backward: y, z and the gradient in, two out.
    costs = {
        "forward": Cost(6 * values, values),
        "forward_backward": Cost(16 * values, 2 * values),
    }
    return _case("gated_norm", name, shape, make, norm_api, costs, groups=shape.heads)


def residual_norm_case(name: str) -> Case:
    """Returns the residual sum and norm at one of its shapes."""
    shape = residual_shapes.LARGE[name]

    def make(s, key):
        return _normals(key, x=s, delta=s, scale=(s.channels, None))

    values = shape.batch * shape.length * shape.channels
    # Forward: two in, two out. Backward: the sum and two gradients in, one out.
    costs = {
        "forward": Cost(8 * values),
        "forward_backward": Cost(16 * values),
    }
    case = _case("residual_norm", name, shape, make, residual_api, costs, eps=1e-5)
    return case._replace(shared=("delta",))


def _segments(shape: Any, key: jax.Array) -> dict[str, jax.Array]:
    """Segment ids of a packed shape by name, nothing for one segment."""
    if shape.segments == 1:
        return {}
    at = jax.random.randint(key, (shape.batch, shape.segments - 1), 1, shape.length)
    position = jnp.arange(shape.length, dtype=jnp.int32)[None, :, None]
    ids = jnp.sum(position >= at[:, None, :], axis=-1, dtype=jnp.int32)
    return {"segment_ids": ids}


def multi_step_case(name: str) -> Case:
    """Returns MultiStep with all pending tokens accepted."""
    if name.startswith("ssd_"):
        return _ssd_multi_step_case(name)
    slots, s = multi_step_shapes.LARGE[name]
    b, tokens, e, n = s.batch, s.length, s.d_inner, s.d_state

    def make(key):
        made = _normals(
            key,
            state=(b, e, n, None),
            old_x=(b, slots, e),
            old_dt=(b, slots, e),
            old_B=(b, slots, s.B_groups, n),
            x=(b, tokens, e),
            dt=(b, tokens, e),
            A=(e, n, None),
            B=(b, tokens, s.B_groups, n),
            C=(b, tokens, s.C_groups, n),
            D=(e, None),
            z=(b, tokens, e),
            dt_bias=(e, None),
        )
        made["A"] = _decays(made["A"])
        return made | {"num_pending": jnp.full((b,), slots, jnp.int32)}

    call = _multi_step_call(multi_step_api.selective_multi_step)
    maps = slots * s.B_groups + tokens * (s.B_groups + s.C_groups)
    numbers = b * (2 * slots * e + 4 * tokens * e + maps * n)
    cost = Cost(
        4 * (2 * b * e * n + e * n + 2 * e) + 2 * numbers,
        b * e * (slots * (n + 1) + tokens * (n + 2)),
    )
    names = tuple(multi_step_api.SELECTIVE_IMPLEMENTATIONS)
    costs = {"forward": cost}
    return Case("multi_step", name, make, make, call, names, costs, ("state",))


def _ssd_multi_step_case(name: str) -> Case:
    slots, s = multi_step_shapes.LARGE_SSD[name.removeprefix("ssd_")]
    b, tokens, k, heads = s.batch, s.length, s.kv_heads, s.heads
    width, n = s.head_dim, s.d_state

    def make(key):
        made = _normals(
            key,
            state=(b, heads, n, width, None),
            old_x=(b, slots, k, width),
            old_dt=(b, slots, heads),
            old_B=(b, slots, k, n),
            x=(b, tokens, k, width),
            dt=(b, tokens, heads),
            A=(heads, None),
            B=(b, tokens, k, n),
            C=(b, tokens, heads, n),
            D=(heads, None),
            dt_bias=(heads, None),
        )
        made["A"] = _decays(made["A"])
        return made | {"num_pending": jnp.full((b,), slots, jnp.int32)}

    call = _multi_step_call(multi_step_api.ssd_multi_step)
    kept = 2 * b * heads * n * width
    numbers = (slots + tokens) * k * (width + n) + tokens * heads * (width + n)
    cost = Cost(4 * kept + 2 * b * numbers)
    names = tuple(multi_step_api.SSD_IMPLEMENTATIONS)
    costs = {"forward": cost}
    return Case("multi_step", name, make, make, call, names, costs, ("state",))


def _multi_step_call(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(inputs, implementation):
        inputs = dict(inputs)
        pending = multi_step_api.Pending(
            *(inputs.pop(n) for n in ("old_x", "old_dt", "old_B"))
        )
        return function(pending=pending, **inputs, implementation=implementation)

    return call


def cached_attention_case(name: str) -> Case:
    """Returns attention of new tokens to a cache, all rows of one length."""
    shape = attention_shapes.LARGE[name]

    def make(s, key):
        kept = (s.batch, s.slots, s.kv_heads, s.head_dim)
        q = (s.batch, s.tokens, s.heads, s.head_dim)
        lengths = jnp.full((s.batch,), s.length, jnp.int32)
        return _normals(key, q=q, k=kept, v=kept) | {"lengths": lengths}

    seen = shape.length + shape.tokens
    pairs = shape.batch * shape.tokens * shape.heads * (shape.length + shape.tokens / 2)
    if shape.window is not None:
        pairs = shape.batch * shape.tokens * shape.heads * shape.window
        seen = shape.window + shape.tokens - 1
    queries = shape.batch * shape.tokens * shape.heads * shape.head_dim
    kept = shape.batch * seen * shape.kv_heads * shape.head_dim
    # Keys and values of the slots that are seen, queries in, outputs out.
    cost = Cost(4 * kept + 4 * queries, pairs, 4 * pairs * shape.head_dim)
    slots, tokens = min(shape.slots, 2048), min(shape.tokens, 512)
    small = shape._replace(
        batch=min(shape.batch, 2),
        tokens=tokens,
        slots=slots,
        length=min(shape.length, slots - tokens),
    )
    return _case(
        "cached_attention",
        name,
        shape,
        make,
        attention_api,
        {"forward": cost},
        small,
        sliding_window=shape.window,
    )


OPS: dict[str, tuple[Callable[[str], Case], Sequence[str], Sequence[str]]] = {
    # Name: the maker of cases, all shapes, and those timed when none is named.
    "selective_scan": (
        selective_scan_case,
        tuple(selective_shapes.LARGE),
        ("paper_8b", "paper_8b_every_2"),
    ),
    "ssd": (ssd_case, tuple(ssd_shapes.LARGE), ("paper_8b",)),
    "causal_conv": (causal_conv_case, tuple(conv_shapes.LARGE), ("paper_8b",)),
    "gated_norm": (gated_norm_case, tuple(norm_shapes.LARGE), ("paper_8b",)),
    "residual_norm": (
        residual_norm_case,
        tuple(residual_shapes.LARGE),
        ("paper_8b",),
    ),
    "cached_attention": (
        cached_attention_case,
        tuple(attention_shapes.LARGE),
        ("llama3_8b", "llama3_8b_k4", "llama3_8b_32k", "llama3_8b_batch"),
    ),
    "multi_step": (
        multi_step_case,
        (
            *multi_step_shapes.LARGE,
            *(f"ssd_{name}" for name in multi_step_shapes.LARGE_SSD),
        ),
        ("mamba_2_8b_k1", "mamba_2_8b_k4", "mamba_2_8b_k8"),
    ),
}
