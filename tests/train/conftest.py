"""Fixtures of the training tests."""

import jax
import pytest

from mil_jax import sharding


def mesh_of(*sizes):
    """Returns a mesh over the first devices."""
    count = sizes[0] * sizes[1] * sizes[2]
    return jax.make_mesh(
        sizes,
        sharding.MESH_AXES,
        devices=jax.devices()[:count],
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
    )


@pytest.fixture(scope="session")
def one_device():
    return mesh_of(1, 1, 1)
