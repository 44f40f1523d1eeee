import jax.numpy as jnp
import numpy as np

from pallas_kernels.norms import rms_norm


def test_by_hand():
    # mean square 12.5; with eps 3.5 the root is 4.
    x = jnp.array([[3.0, -4.0]])
    actual = rms_norm(x, jnp.array([1.0, 2.0]), 3.5)
    np.testing.assert_allclose(actual, [[0.75, -2.0]], rtol=1e-6)


def test_rounds_before_it_scales():
    # Llama's order; the other order gives 1.0078125 * 1.5 rounded once.
    x = jnp.array([1.0, 1.01], jnp.bfloat16)
    scale = jnp.array([1.5, 1.50390625])
    x32 = np.array([1.0, 1.0078125], np.float32)
    normed = (x32 / np.sqrt(np.mean(x32**2))).astype(jnp.bfloat16)
    expected = normed * np.asarray(scale).astype(jnp.bfloat16)
    actual = rms_norm(x, scale, 0.0)
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(actual), expected)


def test_statistics_are_float32():
    # In bfloat16 the sum of 4096 ones stops at 256.
    x = jnp.ones((4096,), jnp.bfloat16)
    actual = rms_norm(x, jnp.ones((4096,)), 0.0)
    np.testing.assert_array_equal(np.asarray(actual, np.float32), 1.0)
