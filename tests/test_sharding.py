import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import generation, meshes, tiny
from jax.sharding import PartitionSpec

from mil_jax import sharding
from mil_jax.config import ComputeConfig
from mil_jax.errors import UserError
from mil_jax.generate import decode
from mil_jax.models import decoder

pytestmark = pytest.mark.usefixtures("strict_jax")

MESHES = [
    ("mamba", {"data": 1, "fsdp": 2, "tensor": 4}),
    ("mamba2", {"data": 2, "fsdp": 4}),
    ("mamba2", {"data": 2, "fsdp": 2, "tensor": 2}),
]


def test_there_are_eight_devices():
    assert jax.device_count() == 8


@pytest.mark.parametrize(
    ("kind", "sizes"), [*MESHES[:2], pytest.param(*MESHES[2], marks=pytest.mark.slow)]
)
def test_loss_and_gradients_are_those_of_one_device(kind, sizes):
    meshes.check_mesh(kind, **sizes)


@pytest.mark.parametrize(("kind", "sizes"), MESHES)
def test_weights_are_split(kind, sizes):
    meshes.check_shards(kind, **sizes)


def test_a_split_model_generates_the_same():
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=4)
    plan = decoder.Blueprint.create(
        tiny.CONFIGS["mamba"], ComputeConfig(scan_layers=False)
    )
    model = plan.model(plan.place(tiny.params("mamba"), mesh))
    expected = [tiny.reference("mamba").greedy(p, 4) for p in generation.PROMPTS]
    with sharding.mesh_context(mesh):
        answers = decode.generate(model, generation.PROMPTS, max_new_tokens=4)
    generation.assert_answers(answers, expected, 4)


def test_axes_by_hand():
    spec = sharding.partition_spec
    assert spec(("embed", "heads")) == PartitionSpec("fsdp", "tensor")
    assert spec(("layers", "d_inner", "d_state")) == PartitionSpec(None, "tensor", None)
    rows = ("data", "fsdp")
    assert spec(("batch", "length", None)) == PartitionSpec(rows, None, None)
    # A mesh axis splits one dimension only.
    assert spec(("batch", "embed")) == PartitionSpec(rows, None)
    assert spec(("embed", "batch")) == PartitionSpec("fsdp", "data")
    assert spec(("heads", "mlp")) == PartitionSpec("tensor", None)


def test_what_does_not_divide_is_replicated():
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=4)

    def spec(axes, shape):
        return sharding.named_sharding(mesh, axes, shape).spec

    assert spec(("vocab", "embed"), (64, 6)) == PartitionSpec("tensor", "fsdp")
    assert spec(("vocab", "embed"), (61, 7)) == PartitionSpec(None, None)
    assert spec(("batch", "length"), (2, 5)) == PartitionSpec(("data", "fsdp"), None)
    assert spec(("batch", "length"), (3, 5)) == PartitionSpec(None, None)


def test_every_weight_has_known_axes():
    for kind in tiny.CONFIGS:
        plan = decoder.Blueprint.create(tiny.CONFIGS[kind], ComputeConfig())
        for axes in plan.logical_axes().values():
            assert set(axes) <= set(sharding.LOGICAL_AXIS_RULES)


def test_constrain_does_nothing_without_a_mesh():
    x = np.ones((8, 4), np.float32)
    assert sharding.constrain(x, ("batch", None)) is x
    mesh = sharding.make_mesh()
    with sharding.mesh_context(mesh):
        pinned = jax.jit(lambda x: sharding.constrain(x, ("batch", None)))(x)
    assert pinned.addressable_shards[0].data.shape == (1, 4)
    assert sharding.constrain(x, ("batch", None)) is x


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (1, 8, 1)),
        ({"tensor": 4}, (1, 2, 4)),
        ({"data": -1, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"data": 2, "fsdp": 2, "tensor": -1}, (2, 2, 2)),
    ],
)
def test_mesh_sizes(sizes, shape):
    mesh = sharding.make_mesh(**sizes)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == shape


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 3},
        {"fsdp": 4},
        {"fsdp": 16},
        {"fsdp": -1, "tensor": -1},
        {"data": 0},
        {"data": -2},
        {"tensor": 16},
    ],
)
def test_wrong_mesh_sizes_are_refused(sizes):
    with pytest.raises(UserError, match="does not match 8 devices"):
        sharding.make_mesh(**sizes)


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 4}, {"fsdp": 4, "tensor": 2}])
def test_rows_run_where_they_lie(sizes):
    """What a kernel is given on a device is that device's rows, with gradients as whole."""
    mesh = sharding.make_mesh(**sizes)
    ways = 8 // sizes.get("tensor", 1)
    seen = []

    def scaled(weight, rows):
        seen.append(rows.shape)
        return weight[None] * rows

    def total(weight, rows):
        return jnp.sum(sharding.by_rows(scaled, weight, rows) ** 2)

    weight, rows = jnp.arange(3.0), jnp.arange(24.0).reshape(8, 3) - 7.0
    expected = jax.grad(total)(weight, rows)
    with sharding.mesh_context(mesh):
        found = jax.jit(jax.grad(total))(weight, rows)
        jax.jit(total)(weight, rows[:3])
    assert list(dict.fromkeys(seen)) == [(8, 3), (8 // ways, 3), (3, 3)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
