"""One training problem on several devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mil_jax import losses, sharding
from mil_jax.config import ComputeConfig
from mil_jax.models import decoder

from . import stacking, tiny
from .compare import assert_trees_close


@functools.cache
def problem(kind):
    """Returns a scanned model's plan, its params and a batch of eight rows."""
    config = stacking.config(kind)
    plan = decoder.Blueprint.create(config, ComputeConfig(remat=True))
    tokens = tiny.tokens(8, 15)
    ids = np.ones((8, 14), np.int32)
    ids[:, 5:] = 2
    ids[::2, 11:] = 0
    return plan, stacking.params(kind), tokens, ids


def loss_and_gradients(kind, mesh):
    """Returns the mean cross-entropy and its gradients per layer."""
    plan, params, tokens, ids = problem(kind)
    weights = plan.place(params, mesh)
    batch = (tokens[:, :-1], tokens[:, 1:], ids)
    if mesh is not None:
        rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        batch = jax.device_put(batch, rows)

    def loss(weights, tokens, labels, ids):
        logits = plan.model(weights)(tokens, ids)
        nll = losses.token_cross_entropy(logits, labels)
        return jnp.mean(nll)

    with sharding.mesh_context(mesh):
        value, grads = jax.jit(jax.value_and_grad(loss))(weights, *batch)
    return value, plan.unstack(grads)


@functools.cache
def one_device(kind):
    value, grads = loss_and_gradients(kind, None)
    return float(value), {name: np.asarray(g) for name, g in grads.items()}


def check_mesh(kind, **sizes):
    mesh = sharding.make_mesh(**sizes)
    value, grads = loss_and_gradients(kind, mesh)
    expected_value, expected = one_device(kind)
    assert abs(float(value) - expected_value) <= 1e-5 * expected_value
    assert_trees_close(grads, expected, rtol=1e-3)


def check_shards(kind, **sizes):
    """Every device holds its own part of the large weights."""
    mesh = sharding.make_mesh(**sizes)
    plan, params, _, _ = problem(kind)
    weights = plan.place(params, mesh)
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    inner = plan.config.ssm.d_inner
    d = plan.config.d_model
    for name, part in {
        f"layers.0::2.{kind}.z_proj.kernel": (2, d // fsdp, inner // tensor),
        f"layers.0::2.{kind}.out_proj.kernel": (2, inner // tensor, d // fsdp),
        "layers.1::2.attn.q_proj.kernel": (2, d // fsdp, 64 // tensor),
        "layers.1::2.mlp.down_proj.kernel": (2, 48 // tensor, d // fsdp),
        "final_norm.scale": (d // fsdp,),
        # 61 tokens do not divide.
        "embed.embedding": (61, d // fsdp),
    }.items():
        shards = weights[name].addressable_shards
        assert len(shards) == 8
        assert {shard.data.shape for shard in shards} == {part}, name
        distinct = {np.asarray(shard.data).tobytes() for shard in shards}
        assert len(distinct) == weights[name].size // np.prod(part), name
        whole = np.asarray(weights[name])
        for shard in shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index])
