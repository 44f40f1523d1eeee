"""The benchmark of whole mixers: sizes, costs and parity, on a tiny model."""

import jax
import jax.numpy as jnp
import pytest

from mil_jax import bench_mixers
from mil_jax.shapes import SHAPES
from pallas_kernels import bench

TINY = SHAPES["tiny"]


@pytest.mark.parametrize(
    ("op", "weights"),
    [
        # D = 64, E = 128, X = 64, R = 4: x, B, z, C, out; dt is too narrow to count.
        ("mamba_mixer", 2 * 64 * 64 + 3 * 64 * 128),
        ("mamba2_mixer", 2 * 64 * 64 + 3 * 64 * 128),
    ],
)
def test_cases(op, weights):
    case = bench_mixers.mixer_case(op, TINY, 2, 16)
    assert case.costs["forward"].flops == 2 * 2 * 16 * weights
    inputs = jax.eval_shape(case.make, jax.random.key(0))
    assert inputs["u"].shape == (2, 16, 64) and inputs["u"].dtype == jnp.bfloat16
    assert inputs["z_proj.kernel"].dtype == jnp.bfloat16
    assert inputs["A_log"].dtype == inputs["conv_kernel"].dtype == jnp.float32


def test_parity():
    case = bench_mixers.mixer_case("mamba_mixer", TINY, 1, 8)
    truth = bench.find_truth(case, "forward")
    error, is_green = bench.check(case, "forward", "xla_chunked", truth)
    assert 0 < error < 1e-2 and is_green
