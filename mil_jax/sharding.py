"""From logical axis names to a device mesh."""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mil_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")

# Each logical axis is split over at most one mesh axis; None replicates. Weights are split
# over both fsdp (their input or output width) and tensor (heads, channels, vocabulary).
LOGICAL_AXIS_RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "length": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "d_inner": "tensor",
    "d_xb": "tensor",
    "conv_channels": None,
    "ssm_heads": None,
    "d_state": None,
    "dt_rank": None,
    "conv": None,
    "layers": None,
    "packed": "tensor",
}

_current_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar(
    "mil_jax_mesh", default=None
)


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1) -> Mesh:
    """Returns a mesh over all devices of all processes.

    Args:
        data: Copies of the model.
        fsdp: Shards of the weights over the batch's devices; -1 takes the devices left.
        tensor: Shards of heads, channels and vocabulary.

    Raises:
        UserError: The sizes do not multiply to the number of devices.
    """
    count = jax.device_count()
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) == 1:
        known = math.prod(s for s in sizes if s != -1)
        sizes[sizes.index(-1)] = count // max(known, 1)
    if min(sizes) < 1 or math.prod(sizes) != count:
        raise UserError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} does not match {count} "
            "devices; the product must be that number, and one size may be -1"
        )
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


@contextlib.contextmanager
def mesh_context(mesh: Mesh | None) -> Iterator[None]:
    """Makes `mesh` the one that `constrain` refers to while tracing."""
    token = _current_mesh.set(mesh)
    try:
        yield
    finally:
        _current_mesh.reset(token)


def current_mesh() -> Mesh | None:
    """Returns the mesh of `mesh_context`."""
    return _current_mesh.get()


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Returns the mesh axes of an array whose dimensions have these logical names."""
    used: set[str] = set()
    entries = []
    for axis in axes:
        rule = None if axis is None else LOGICAL_AXIS_RULES[axis]
        names = (rule,) if isinstance(rule, str) else tuple(rule or ())
        free = tuple(name for name in names if name not in used)
        used.update(free)
        entries.append(free[0] if len(free) == 1 else free or None)
    return PartitionSpec(*entries)


def named_sharding(
    mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]
) -> NamedSharding:
    """Returns the sharding of an array; a dimension that does not divide is replicated."""
    spec = []
    for entry, size in zip(partition_spec(axes), shape, strict=True):
        names = (entry,) if isinstance(entry, str) else tuple(entry or ())
        ways = math.prod(mesh.shape[name] for name in names)
        spec.append(entry if size % ways == 0 else None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Pins the sharding of an activation under `mesh_context`; else returns it as it is."""
    mesh = _current_mesh.get()
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, named_sharding(mesh, axes, x.shape))


def by_rows(fn: Callable[[Any, Any], Any], replicated: Any, rows: Any) -> Any:
    """Returns `fn(replicated, rows)`, each device running the rows that lie on it.

    Under `mesh_context` the batch axes are split by hand, which a kernel needs; any other
    mesh axis is left to the compiler. A batch that does not divide is left to it as a whole.

    Args:
        fn: Treats every row of a batch on its own.
        replicated: Tree of arrays that all rows need.
        rows: Tree of arrays whose first axis is the batch, as that of the result.
    """
    mesh = _current_mesh.get()
    axes = LOGICAL_AXIS_RULES["batch"]
    ways = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes)
    if ways == 1 or jax.tree.leaves(rows)[0].shape[0] % ways:
        return fn(replicated, rows)
    split = PartitionSpec(axes)
    return jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=(PartitionSpec(), split),
        out_specs=split,
        axis_names=set(axes),
        check_vma=False,
    )(replicated, rows)
