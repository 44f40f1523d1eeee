"""Times the operations on this device, after it has checked them.

python -m pallas_kernels.bench --op selective_scan --shape paper_8b \
    --out benchmarks/results/kernels_h200.json

An implementation is compared with `reference` on random inputs, values and gradients;
while that is red there is no time to print. A time is the median over calls that rotate
among inputs larger than the L2 cache, and counts the kernels only, not the gaps between
them. Floors and peers' times: see `Cost` and `PEERS`.
"""

import argparse
import glob
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import recording
from pallas_kernels.bench_cases import OPS, PEAKS, Case, Peaks

PASSES = ("forward", "forward_backward")
# Inputs of one measurement are this many times larger than the L2 cache.
L2_BYTES = 60e6
WARM_UP = 3


# Milliseconds of other people's kernels at the same shapes in bfloat16, quoted: measured
# on an H200 with PyTorch 2.11 (cuDNN in JAX: 0.11.2) in November 2026, not in this run.
PEERS = {
    ("selective_scan", "paper_8b", "forward"): ("mamba_ssm CUDA", 1.316),
    ("selective_scan", "paper_8b", "forward_backward"): ("mamba_ssm CUDA", 6.25),
    ("ssd", "paper_8b", "forward"): ("mamba_ssm Triton", 0.826),
    ("ssd", "paper_8b", "forward_backward"): ("mamba_ssm Triton", 4.67),
    ("causal_conv", "paper_8b", "forward"): ("causal_conv1d CUDA", 0.125),
    ("multi_step", "mamba_2_8b_k1", "forward"): ("original Triton", 0.002),
    ("multi_step", "mamba_2_8b_k4", "forward"): ("original Triton", 0.005),
    ("multi_step", "mamba_2_8b_k8", "forward"): ("original Triton", 0.009),
    ("cached_attention", "llama3_8b", "forward"): ("cuDNN in JAX", 0.0113),
    ("cached_attention", "llama3_8b_32k", "forward"): ("cuDNN in JAX", 0.0394),
    ("cached_attention", "llama3_8b_batch", "forward"): ("cuDNN in JAX", 0.962),
    ("cached_attention", "llama3_8b_chunk", "forward"): ("cuDNN in JAX", 1.746),
    ("mamba_mixer", "paper_8b", "forward"): ("original", 6.59),
    ("mamba_mixer", "paper_8b", "forward_backward"): ("original", 19.9),
    ("mamba2_mixer", "paper_8b", "forward"): ("original", 4.14),
    ("mamba2_mixer", "paper_8b", "forward_backward"): ("original", 14.7),
}


def _is_float(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jnp.floating)


def pass_function(case: Case, pass_: str, implementation: str) -> Callable[..., Any]:
    """Returns a function of inputs and cotangents that runs one pass."""
    if pass_ == "forward":
        return lambda inputs, cotangents: case.call(inputs, implementation)

    def forward_backward(inputs, cotangents):
        floats = {k: v for k, v in inputs.items() if _is_float(v)}
        rest = {k: v for k, v in inputs.items() if k not in floats}
        outputs, pull = jax.vjp(
            lambda floats: case.call(floats | rest, implementation), floats
        )
        return outputs, pull(cotangents)[0]

    return forward_backward


def _cotangents(case: Case, inputs: Any, key: jax.Array) -> Any:
    """Random cotangents of the outputs."""
    like = jax.eval_shape(lambda i: case.call(i, case.implementations[-1]), inputs)
    leaves, tree = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    return tree.unflatten(
        [
            jax.random.normal(k, leaf.shape, leaf.dtype)
            for k, leaf in zip(keys, leaves, strict=True)
        ]
    )


class Truth(NamedTuple):
    """Random inputs and cotangents of one pass and what the reference makes of them."""

    inputs: Any
    cotangents: Any
    expected: Any


def find_truth(case: Case, pass_: str) -> Truth:
    """Returns the reference's results in float32, at the case's small size."""
    key, other = jax.random.split(jax.random.key(0))
    inputs = jax.jit(case.make_small)(key)
    cotangents = _cotangents(case, inputs, other)
    exact = jax.tree.map(
        lambda v: v.astype(jnp.float32) if _is_float(v) else v, (inputs, cotangents)
    )
    # Nobody times the reference: searching the fastest products for it would take minutes.
    options = {"xla_gpu_autotune_level": 0} if jax.default_backend() == "gpu" else {}
    reference = pass_function(case, pass_, "reference")
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(reference, compiler_options=options)(*exact)
    return Truth(inputs, cotangents, expected)


def check(
    case: Case, pass_: str, implementation: str, truth: Truth
) -> tuple[float, bool]:
    """Returns the largest relative error in norm, and whether all are in bounds.

    Gradients with a bound of their own count for the second only.
    """
    function = jax.jit(pass_function(case, pass_, implementation))
    found = function(truth.inputs, truth.cotangents)

    @jax.jit
    def error(found, expected):
        found, expected = found.astype(jnp.float32), expected.astype(jnp.float32)
        return jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)

    errors = jax.tree.map(error, found, truth.expected)
    own = {}
    if pass_ == "forward_backward":
        errors, gradients = errors
        own = {k: float(gradients[k]) for k in case.loose if k in gradients}
        errors = errors, {k: v for k, v in gradients.items() if k not in own}
    common = [float(e) for e in jax.tree.leaves(errors)]
    worst = math.inf if any(map(math.isnan, common)) else max(common)
    is_green = worst <= case.tolerance[pass_]
    return worst, is_green and all(v <= case.loose[k] for k, v in own.items())


def input_sets(case: Case, calls: int) -> list[tuple[Any, Any]]:
    """Returns pairs of inputs and cotangents that do not fit in the L2 cache."""
    make = jax.jit(case.make)
    like = jax.tree.leaves(jax.eval_shape(case.make, jax.random.key(0)))
    size = sum(v.size * v.dtype.itemsize for v in like)
    count = min(max(3, math.ceil(2 * L2_BYTES / size)), calls)
    if case.donated:
        count = calls
    keys = jax.random.split(jax.random.key(1), count + 1)
    inputs = [make(key) for key in keys[1:]]
    cotangents = _cotangents(case, inputs[0], keys[0])
    return [(i, cotangents) for i in inputs]


def device_ms(case: Case, pass_: str, implementation: str, repetitions: int) -> float:
    """Returns the median over calls of the milliseconds that their kernels take.

    The profiler names every kernel's duration; on a CPU, or where it loses kernels, a
    call's wall time is taken.
    """
    function = pass_function(case, pass_, implementation)
    compiled = jax.jit(
        lambda donated, rest, cotangents: function(donated | rest, cotangents),
        donate_argnums=0,
    )
    sets = input_sets(case, repetitions + WARM_UP)

    def call(i):
        inputs, cotangents = sets[i % len(sets)]
        donated = {k: v for k, v in inputs.items() if k in case.donated}
        rest = {k: v for k, v in inputs.items() if k not in donated}
        return compiled(donated, rest, cotangents)

    for i in range(WARM_UP):
        jax.block_until_ready(call(i))
    timed = range(WARM_UP, WARM_UP + repetitions)
    if jax.default_backend() == "cpu":
        return statistics.median(_host_ms(call, i) for i in timed)
    _raise_clocks()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for i in timed:
                out = call(i)
            jax.block_until_ready(out)
        durations = _kernel_durations(folder)
    if not durations or len(durations) % repetitions:
        found = f"{len(durations)} kernels in {repetitions} calls"
        if case.donated:
            raise RuntimeError(f"{case.op}: the profiler saw {found}")
        # It drops events of programs with very many kernels, which are slow ones.
        print(f"{case.op}: the profiler saw {found}; wall time is taken instead")
        return statistics.median(_host_ms(call, i) for i in timed)
    each = len(durations) // repetitions
    calls = [sum(durations[i : i + each]) for i in range(0, len(durations), each)]
    return statistics.median(calls) / 1e6


def _host_ms(call: Callable[[int], Any], i: int) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call(i))
    return 1e3 * (time.perf_counter() - start)


def _raise_clocks() -> None:
    """Keeps the device busy for some tens of milliseconds."""
    a = jnp.ones((8192, 8192), jnp.bfloat16)
    for _ in range(20):
        a = jnp.dot(a, a) * 1e-4
    a.block_until_ready()


def _kernel_durations(folder: str) -> list[float]:
    """Nanoseconds of the first GPU's kernels and copies, in the order they ran."""
    events = []
    for path in glob.glob(f"{folder}/**/*.xplane.pb", recursive=True):
        for plane in jax.profiler.ProfileData.from_file(path).planes:
            if plane.name != "/device:GPU:0":
                continue
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    events += [(e.start_ns, e.duration_ns) for e in line.events]
    return [duration for _, duration in sorted(events)]


def peaks() -> Peaks | None:
    """Returns this device's rates, None for one that is not known."""
    kind = jax.devices()[0].device_kind
    return next((p for name, p in PEAKS.items() if name in kind), None)


def measure(case: Case, repetitions: int = 50) -> list[dict[str, Any]]:
    """Returns a row for every pass and implementation of a case, the reference apart.

    A row has `error`; it has `ms` only if no pass of its implementation is red.
    """
    rows = []
    truths = {pass_: find_truth(case, pass_) for pass_ in case.costs}
    for name in case.implementations:
        if name == "reference":
            continue
        try:
            checks = {p: check(case, p, name, truth) for p, truth in truths.items()}
        except NotImplementedError as reason:
            print(f"{case.op}: {name} does not run here: {reason}")
            continue
        is_green = all(is_in_bounds for _, is_in_bounds in checks.values())
        for pass_, cost in case.costs.items():
            row = {"op": case.op, "pass": pass_, "shape": case.shape}
            row |= {"implementation": name, "error": checks[pass_][0], "cost": cost}
            row["floor_ms"] = cost.floor_ms(peaks())
            if is_green:
                row["ms"] = device_ms(case, pass_, name, repetitions)
            rows.append(row)
    xla = {r["pass"]: r.get("ms") for r in rows if r["implementation"][:3] == "xla"}
    return [row | {"xla_ms": xla.get(row["pass"])} for row in rows]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Returns rows as text, one line each."""
    head = (
        "op",
        "shape",
        "pass",
        "implementation",
        "error",
        "ms",
        "MB",
        "G exp",
        "GFLOP",
        "floor",
        "of floor",
        "vs XLA",
        "vs peer (quoted)",
    )
    lines = [head]
    for row in rows:
        ms, floor, xla_ms, cost = (
            row.get(k) for k in ("ms", "floor_ms", "xla_ms", "cost")
        )
        peer = PEERS.get((row["op"], row["shape"], row["pass"]))
        lines.append(
            (
                row["op"],
                row["shape"],
                row["pass"],
                row["implementation"],
                f"{row['error']:.1e}",
                "PARITY IS RED" if ms is None else _number(ms),
                _number(cost.bytes / 1e6),
                _number(cost.exps / 1e9),
                _number(cost.flops / 1e9),
                _number(floor),
                "-" if not (ms and floor) else f"{100 * floor / ms:.0f}%",
                "-" if not (ms and xla_ms) else f"{xla_ms / ms:.2f}x",
                "-" if not (ms and peer) else f"{peer[1] / ms:.2f}x {peer[0]}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(v.ljust(w) for v, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def record(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes timed rows to a JSON file, in place of its rows of the same names."""
    key = ("op", "pass", "shape", "implementation")
    fields = (*key, "ms", "floor_ms", "xla_ms")
    new = [{k: row[k] for k in fields} for row in rows if "ms" in row]
    recording.record(path, recording.describe_run(), new, key)


def run(
    cases: Iterable[Callable[[], Case]], repetitions: int, out: str | None
) -> list[dict[str, Any]]:
    """Measures cases one by one, prints their rows and merges them into `out`."""
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, {recording.commit()}", flush=True)
    rows = []
    for make in cases:
        found = measure(make(), repetitions)
        print(table(found), flush=True)
        if out:
            record(Path(out), found)
        rows += found
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 1 if a parity is red."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", action="append", choices=OPS, help="default: all")
    parser.add_argument("--shape", action="append", help="a name in the op's shapes.py")
    parser.add_argument("--repetitions", type=int, default=50)
    parser.add_argument("--out", help="JSON file that gets the rows")
    args = parser.parse_args(argv)
    separate_kernels()
    cases = []
    for op in args.op or OPS:
        make, every, default = OPS[op]
        names = [n for n in args.shape if n in every] if args.shape else default
        cases += [lambda make=make, name=name: make(name) for name in names]
    if not cases:
        parser.error(f"no operation has a shape named {' or '.join(args.shape)}")
    rows = run(cases, args.repetitions, args.out)
    return int(any("ms" not in row for row in rows))


def separate_kernels() -> None:
    """Keeps kernels out of CUDA graphs, which the profiler sees as one event."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_enable_command_buffer" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_command_buffer=".strip()


if __name__ == "__main__":
    sys.exit(main())
