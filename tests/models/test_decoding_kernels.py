"""The decoding kernels inside a model, interpreted, followed beside the oracle."""

import pytest
from checks import stepping, tiny

from mil_jax.config import ComputeConfig
from mil_jax.models import decoder
from pallas_kernels import gpu

pytestmark = pytest.mark.usefixtures("strict_jax")


@pytest.mark.parametrize("kind", ["attention", "mamba", "mamba2", "pure"])
def test_kernels_decode_as_the_oracle(kind, monkeypatch):
    compute = ComputeConfig(layout="decode")
    model = decoder.build(tiny.CONFIGS[kind], tiny.params(kind), compute)
    session = stepping.Session(kind, model=model)
    session.prefill([6, 3, 1], 6)
    monkeypatch.setattr(gpu, "INTERPRET", True)
    with tiny.fresh_traces():
        session.decode(4, [4, 0, 2])
        session.decode(1, [1, 1, 1])
