import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from checks import oracle, tiny
from checks.compare import assert_close

from mil_jax.config import RopeScaling
from mil_jax.models import rope
from pallas_kernels.cached_attention import rotation

pytestmark = pytest.mark.usefixtures("strict_jax")


def test_frequencies_by_hand():
    actual = rope.inverse_frequencies(8, 10000.0, None)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, [1.0, 0.1, 0.01, 0.001], rtol=1e-6)


def test_scaled_frequencies_by_hand():
    """One wavelength is kept, one lies between, two are stretched fourfold."""
    scaling = RopeScaling(
        factor=4.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=100,
    )
    actual = rope.inverse_frequencies(8, 10000.0, scaling)
    # Wavelengths 6.28, 62.8, 628, 6283; kept below 25, stretched above 100.
    share = (100 / (20 * math.pi) - 1) / 3
    between = (1 - share) * 0.1 / 4 + share * 0.1
    np.testing.assert_allclose(actual, [1.0, between, 0.0025, 0.00025], rtol=1e-5)


@pytest.mark.parametrize("scaling", [None, RopeScaling(8.0, 1.0, 4.0, 16)])
def test_rotation_is_the_formula(scaling):
    config = dataclasses.replace(tiny.ATTENTION, rope_scaling=scaling)
    x = np.random.default_rng(0).standard_normal((1, 200, 2, 16)).astype(np.float32)
    frequencies = rope.inverse_frequencies(16, config.rope_theta, scaling)
    positions = jnp.arange(200)[None]
    angles = rotation.cos_and_sin(positions, frequencies)
    actual = rotation.rotate(jnp.asarray(x), *angles)
    heads = [oracle.rotate(x[0, :, h].astype(np.float64), config) for h in range(2)]
    # The angle itself is float32: 200 radians are good to 1e-5.
    assert_close(actual[0], np.stack(heads, axis=1), atol=1e-4)


def test_rotation_keeps_the_dtype():
    x = jnp.ones((1, 2, 1, 4), jnp.bfloat16)
    frequencies = rope.inverse_frequencies(4, 100.0, None)
    angles = rotation.cos_and_sin(jnp.array([[0, 1]]), frequencies)
    assert rotation.rotate(x, *angles).dtype == jnp.bfloat16


def test_segment_positions_by_hand():
    ids = jnp.array([[1, 1, 1, 2, 2, 0], [0, 0, 3, 3, 3, 3], [5, 6, 7, 7, 0, 0]])
    expected = [[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3], [0, 0, 0, 1, 0, 1]]
    np.testing.assert_array_equal(rope.segment_positions(ids), expected)
