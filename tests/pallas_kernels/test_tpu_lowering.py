"""The chunked XLA forms of the scans, forward and backward, lower for a TPU."""

import functools

import jax
import pytest

from pallas_kernels import bench, bench_cases


@pytest.mark.parametrize("pass_", bench.PASSES)
@pytest.mark.parametrize("shape", ["paper_8b_training", "paper_8b_packed"])
@pytest.mark.parametrize(
    "make", [bench_cases.selective_scan_case, bench_cases.ssd_case]
)
def test_chunked_scans_lower(make, shape, pass_):
    case = make(shape)
    inputs = jax.eval_shape(case.make, jax.random.key(0))
    outputs = jax.eval_shape(
        functools.partial(case.call, implementation="xla_chunked"), inputs
    )
    function = jax.jit(bench.pass_function(case, pass_, "xla_chunked"))
    exported = jax.export.export(function, platforms=("tpu",))(inputs, outputs)
    assert exported.platforms == ("tpu",)
    # Plain XLA: no kernel that only one kind of device has.
    text = exported.mlir_module()
    assert "stablehlo.while" in text and "custom_call" not in text
