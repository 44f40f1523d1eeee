"""Times whole Mamba mixers, projections included, at the shapes of Llama-3-8B.

python -m mil_jax.bench_mixers --out benchmarks/results/kernels_h200.json

The rows go beside those of `pallas_kernels.bench`, which says how they are checked and
timed: "auto" runs the fastest kernels, "xla_chunked" the scans in plain XLA.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mil_jax.config import ComputeConfig, ModelConfig, SSMConfig
from mil_jax.models.mamba import MambaMixer
from mil_jax.models.mamba2 import Mamba2Mixer
from mil_jax.models.ssm import SSMMixer
from mil_jax.shapes import SHAPES
from pallas_kernels import bench
from pallas_kernels.bench_cases import Case, Cost

MIXERS: dict[str, type[SSMMixer]] = {
    "mamba_mixer": MambaMixer,
    "mamba2_mixer": Mamba2Mixer,
}
BATCH, LENGTH = 8, 2048
# About 1.5 times what an H200 finds.
TOLERANCE = {"forward": 6e-3, "forward_backward": 1e-2}
# Where the skip D x outweighs the recurrence, D only scales what the gated norm normalises
# anyway: its gradient is a small rest of large terms, whose bfloat16 rounding is as large as
# elsewhere.
LOOSE = {"mamba_mixer": {}, "mamba2_mixer": {"D": 6e-2}}
IMPLEMENTATIONS = ("auto", "xla_chunked", "reference")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 1 if a parity is red."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", action="append", choices=MIXERS, help="default: both")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--out", help="JSON file that gets the rows")
    args = parser.parse_args(argv)
    bench.separate_kernels()
    config = SHAPES["llama3_8b"]
    cases = [
        functools.partial(mixer_case, op, config, BATCH, LENGTH)
        for op in args.op or MIXERS
    ]
    rows = bench.run(cases, args.repetitions, args.out)
    return int(any("ms" not in row for row in rows))


def mixer_case(op: str, teacher: ModelConfig, batch: int, length: int) -> Case:
    """Returns a mixer that takes the place of the teacher's attention."""
    config = _with_ssm(op, teacher)

    def build(key: jax.Array, compute: ComputeConfig) -> SSMMixer:
        return MIXERS[op](config, compute, rngs=nnx.Rngs(key))

    def make(key: jax.Array, batch: int, length: int) -> dict[str, Any]:
        weights, hidden = jax.random.split(key)
        _, state = nnx.split(build(weights, ComputeConfig()))
        named = {
            ".".join(map(str, path)): _stored(value[...])
            for path, value in nnx.to_flat_state(state)
        }
        shape = (batch, length, config.d_model)
        return named | {"u": jax.random.normal(hidden, shape, jnp.bfloat16)}

    def call(inputs: dict[str, Any], implementation: str) -> jax.Array:
        weights = dict(inputs)
        u = weights.pop("u")
        compute = ComputeConfig(dtype=u.dtype.name, implementation=implementation)
        abstract = nnx.eval_shape(lambda: build(jax.random.key(0), compute))
        graphdef, state = nnx.split(abstract)
        flat = [
            (path, value.replace(weights[".".join(map(str, path))]))
            for path, value in nnx.to_flat_state(state)
        ]
        return nnx.merge(graphdef, nnx.from_flat_state(flat))(u)

    flops = 2 * batch * length * _matrix_values(make, length)
    kept = 4 * batch * length * config.d_model
    costs = {
        "forward": Cost(kept, 0.0, flops),
        "forward_backward": Cost(3 * kept, 0.0, 3 * flops),
    }
    full = functools.partial(make, batch=batch, length=length)
    small = functools.partial(make, batch=1, length=min(length, 256))
    return Case(
        op,
        "paper_8b",
        full,
        small,
        call,
        IMPLEMENTATIONS,
        costs,
        tolerance=TOLERANCE,
        loose=LOOSE[op],
    )


def _with_ssm(op: str, teacher: ModelConfig) -> ModelConfig:
    """The teacher's architecture with the sizes of its mixers."""
    heads = teacher.n_heads * teacher.head_dim
    is_first = op == "mamba_mixer"
    ssm = SSMConfig(
        d_state=16 if is_first else teacher.head_dim,
        dt_rank=-(-teacher.d_model // 16) if is_first else 0,
        d_inner=heads,
        d_xb=teacher.n_kv_heads * teacher.head_dim,
    )
    return dataclasses.replace(teacher, ssm=ssm)


def _stored(value: jax.Array) -> jax.Array:
    """Projections in bfloat16, everything small in float32."""
    return value.astype(jnp.bfloat16) if _is_projection(value) else value


def _is_projection(value: jax.Array) -> bool:
    """Neither a vector, nor taps [W, E], nor A [E, N]."""
    return value.ndim == 2 and min(value.shape) > 16


def _matrix_values(make: Any, length: int) -> int:
    """Weights that a token meets in projections."""
    made = jax.eval_shape(lambda: make(jax.random.key(0), 1, length))
    return sum(v.size for name, v in made.items() if name != "u" and _is_projection(v))


if __name__ == "__main__":
    sys.exit(main())
