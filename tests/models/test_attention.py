import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from checks import tiny

from mil_jax.config import ComputeConfig
from mil_jax.models import attention

pytestmark = pytest.mark.usefixtures("strict_jax")


def test_attend_by_hand():
    """Two query heads share one kv head; scores of 0 and ln 3 weigh 1 to 3."""
    q = jnp.array([[[[1.0, 0.0], [0.0, 0.0]]]])
    k = jnp.array([[[[0.0, 5.0]], [[np.log(3) * np.sqrt(2), 0.0]], [[99.0, 99.0]]]])
    v = jnp.array([[[[4.0, 0.0]], [[0.0, 8.0]], [[1e6, 1e6]]]])
    visible = jnp.array([[[True, True, False]]])
    actual = attention.attend(q, k, v, visible)
    np.testing.assert_allclose(actual, [[[[1.0, 6.0], [2.0, 4.0]]]], rtol=1e-5)


def test_query_heads_read_their_own_kv_head():
    q = jnp.ones((1, 1, 4, 2))
    v = jnp.array([[[[1.0, 1.0], [2.0, 2.0]]]])
    actual = attention.attend(q, jnp.ones((1, 1, 2, 2)), v, jnp.ones((1, 1, 1), bool))
    np.testing.assert_array_equal(actual[0, 0, :, 0], [1.0, 1.0, 2.0, 2.0])


@pytest.mark.parametrize("window", [1, 2, 5, 13, 14, 100])
def test_window_of_any_size(window):
    """Training and decoding see the same positions, `window` of them."""
    config = dataclasses.replace(tiny.ATTENTION, sliding_window=window)
    model = tiny.build(config, tiny.params("attention"))
    tokens = tiny.tokens(1, 14)
    if window >= 14:
        expected = tiny.forward(tiny.model("attention"), tokens)
        np.testing.assert_array_equal(tiny.forward(model, tokens), expected)
        return
    # Two layers see back 2 (window - 1) tokens; one more changes nothing.
    changed = tokens.copy()
    changed[0, 0] += 1
    difference = np.asarray(tiny.forward(model, tokens) - tiny.forward(model, changed))
    reach = 2 * (window - 1)
    moved = np.abs(difference[0]).max(axis=-1)
    assert (moved[: reach + 1] > 1e-4).all()
    assert (moved[reach + 1 :] == 0).all()


def test_default_implementation():
    assert attention.default_attention(ComputeConfig(attention="cudnn")) == "cudnn"
    assert attention.default_attention(ComputeConfig(dtype="bfloat16")) == "xla"
