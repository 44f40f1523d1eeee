import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mil_jax.models import layers

pytestmark = pytest.mark.usefixtures("strict_jax")


def test_linear_multiplies_from_the_right_and_adds_the_bias():
    linear = layers.Linear(
        (2, 3), ("embed", "mlp"), dtype="float32", rngs=nnx.Rngs(0), use_bias=True
    )
    linear.kernel[...] = jnp.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    linear.bias[...] = jnp.array([0.5, 0.0, -0.5])
    actual = linear(jnp.array([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]]))
    expected = [[[1.5, 2.0, 2.5], [10.5, 20.0, 29.5], [11.5, 22.0, 32.5]]]
    np.testing.assert_array_equal(actual, expected)


def test_linear_computes_in_its_dtype():
    linear = layers.Linear((4, 2), ("embed", "mlp"), dtype="bfloat16", rngs=nnx.Rngs(0))
    assert linear.kernel[...].dtype == jnp.float32
    assert linear.bias is None
    assert linear(jnp.ones((1, 4))).dtype == jnp.bfloat16


def test_embedding_looks_rows_up():
    table = layers.Embedding(5, 3, dtype="bfloat16", rngs=nnx.Rngs(0))
    rows = np.asarray(table.embedding[...].astype(jnp.bfloat16))
    actual = table(jnp.array([[4, 0], [2, 2]]))
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(actual), rows[[[4, 0], [2, 2]]])


def test_parameters_carry_their_axes():
    value = layers.make_param(layers.normal_init, (3, 2), ("a", "b"), nnx.Rngs(0))
    assert value[...].shape == (3, 2)
    assert value[...].dtype == jnp.float32
    assert value.get_metadata()["logical_axes"] == ("a", "b")


def test_uniform_init_stays_within_its_bound():
    drawn = layers.uniform_init(0.25)(jax.random.key(0), (1000,), jnp.float32)
    assert -0.25 <= drawn.min() < -0.24
    assert 0.24 < drawn.max() <= 0.25
