"""The decoding kernels inside a model, interpreted, followed beside the oracle."""

import numpy as np
import pytest
from checks import stepping, tiny

from mil_jax.config import ComputeConfig
from mil_jax.generate import speculative
from mil_jax.models import decoder
from pallas_kernels import gpu
from pallas_kernels.mamba_step import pallas_triton

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


def test_a_pure_model_drafts_and_verifies_through_kernels(monkeypatch):
    """The target's tokens, whether a step's tokens are committed, kept or dropped."""
    compute = ComputeConfig(layout="decode")
    config, params = tiny.CONFIGS["pure"], tiny.params("pure")
    target = decoder.build(config, params, compute)
    # Right at times: its tokens are accepted as well as dropped.
    draft = decoder.build(config, tiny.perturbed(params, 0.15), compute)
    prompt = tiny.tokens(1, 5)[0]
    expected = tiny.reference("pure").greedy(prompt, 9)
    ran = set()
    monkeypatch.setattr(gpu, "INTERPRET", True)
    record = pallas_triton._call

    def call(kernel, *args, **kwargs):
        ran.add(kernel.func.__name__)
        return record(kernel, *args, **kwargs)

    monkeypatch.setattr(pallas_triton, "_call", call)
    with tiny.fresh_traces():
        answers, stats = speculative.generate(
            target, draft, [prompt], k=2, max_new_tokens=9, eos_ids=()
        )
    assert ran == {"_convolve_kernel", "_recur_kernel"}
    np.testing.assert_array_equal(answers.rows()[0], expected[:9])
    assert 1 < stats.tokens_per_step < 3
