import dataclasses

import numpy as np
import pytest
from checks import tiny

from mil_jax.config import ComputeConfig
from mil_jax.models import attention

pytestmark = pytest.mark.usefixtures("strict_jax")


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
