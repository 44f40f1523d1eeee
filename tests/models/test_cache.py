import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from checks import tiny

from mil_jax.config import ComputeConfig
from mil_jax.errors import UserError
from mil_jax.models import cache as cache_lib
from mil_jax.models.cache import init_cache

pytestmark = pytest.mark.usefixtures("strict_jax")

SIZES = {"batch": 3, "max_length": 10, "max_step": 4}


def test_rows_are_written_and_taken_at_their_own_place():
    buffer = jnp.zeros((2, 5), jnp.int32)
    values = jnp.array([[1, 2], [3, 4]])
    written = cache_lib.write_rows(buffer, values, jnp.array([0, 3]))
    np.testing.assert_array_equal(written, [[1, 2, 0, 0, 0], [0, 0, 0, 3, 4]])
    taken = cache_lib.take_rows(written, jnp.array([1, 2]), 3)
    np.testing.assert_array_equal(taken, [[2, 0, 0], [0, 3, 4]])


def test_keep_counts_from_the_committed_state():
    cache = init_cache(tiny.CONFIGS["mamba"], ComputeConfig(), **SIZES)
    assert cache.lengths.tolist() == [0, 0, 0]
    cache = dataclasses.replace(cache, lengths=jnp.array([5, 6, 7]))
    kept = cache.keep(jnp.array([0, 1, 4]))
    assert kept.lengths.tolist() == [5, 7, 11]
    assert kept.num_pending.tolist() == [0, 1, 4]
    fewer = kept.keep(jnp.array([0, 0, 2]))
    assert fewer.lengths.tolist() == [5, 6, 9]
    assert fewer.num_pending.tolist() == [0, 0, 2]


def test_slots_leave_room_for_a_step():
    for kind in ("attention", "mamba2"):
        cache = init_cache(tiny.CONFIGS[kind], ComputeConfig(), **SIZES)
        slots = {layer.k.shape[1] for layer in cache.layers if hasattr(layer, "k")}
        assert slots == {14}


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "pure"])
def test_ssm_cache_is_not_repeated_and_its_state_is_float32(kind):
    config, compute = tiny.CONFIGS[kind], ComputeConfig(dtype="bfloat16")
    layer = init_cache(config, compute, **SIZES).layers[config.ssm_layers[0]]
    states = {"mamba": (3, 64, 8), "mamba2": (3, 4, 16, 16), "pure": (3, 64, 8)}
    channels = {"mamba": 32, "mamba2": 2 * 32 + 64, "pure": 64}
    inputs = {"mamba": (3, 4, 64), "mamba2": (3, 4, 2, 16), "pure": (3, 4, 64)}
    groups = {"mamba": (3, 4, 4, 8), "mamba2": (3, 4, 2, 16), "pure": (3, 4, 1, 8)}
    assert layer.state.shape == states[kind]
    assert layer.state.dtype == jnp.float32
    assert layer.window.shape == (3, 3, channels[kind])
    assert layer.pending_window.shape == (3, 4, channels[kind])
    assert layer.pending.x.shape == inputs[kind]
    assert layer.pending.B.shape == groups[kind]
    assert layer.pending.x.dtype == layer.window.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["batch", "max_length", "max_step"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(UserError, match=f"{name} is 0"):
        init_cache(tiny.CONFIGS["mamba"], ComputeConfig(), **(SIZES | {name: 0}))
