"""The benchmark: parity before speed, medians, floors, tables and merged files."""

import json

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import bench, bench_cases


def make_case(**changes):
    """A case of two implementations; "wrong" differs from the reference."""

    def make(key):
        x, y = jax.random.normal(key, (2, 8, 4))
        return {"x": x, "state": y, "count": jnp.array(2, jnp.int32)}

    def call(inputs, implementation):
        factor = {"reference": 2.0, "xla": 2.0, "wrong": 2.1}[implementation]
        x, state = inputs["x"], inputs["state"]
        return x * factor * state * inputs["count"].astype(x.dtype), state + x

    costs = dict.fromkeys(bench.PASSES, bench_cases.Cost(4.8e9, 1.0, 1.0))
    case = bench_cases.Case(
        "op", "shape", make, make, call, ("wrong", "xla", "reference"), costs
    )
    return case._replace(**changes)


def test_no_time_while_parity_is_red():
    rows = bench.measure(make_case(), repetitions=2)
    by_name = {(r["implementation"], r["pass"]): r for r in rows}
    assert len(by_name) == len(rows) == 4
    for pass_ in bench.PASSES:
        wrong, right = by_name["wrong", pass_], by_name["xla", pass_]
        assert 0.02 < wrong["error"] < 0.1 and "ms" not in wrong
        assert right["error"] < 1e-6 and right["ms"] > 0
        assert right["xla_ms"] == wrong["xla_ms"] == right["ms"]
    text = bench.table(rows)
    assert text.count("PARITY IS RED") == 2 and text.count("1.00x") == 2


def test_gradients_count_for_parity():
    case = make_case(implementations=("lossy", "reference"))
    honest = case.call

    def call(inputs, implementation):
        if implementation == "lossy":
            inputs = inputs | {"x": jax.lax.stop_gradient(inputs["x"])}
        return honest(inputs, "reference")

    rows = bench.measure(case._replace(call=call), repetitions=2)
    assert [row["error"] < 1e-6 for row in rows] == [True, False]
    assert not any("ms" in row for row in rows)


@pytest.mark.parametrize(("bound", "is_green"), [(0.1, True), (0.01, False)])
def test_a_gradient_with_a_bound_of_its_own(bound, is_green):
    case = make_case(implementations=("close", "reference"), loose={"x": bound})
    honest = case.call

    def call(inputs, implementation):
        if implementation == "close":
            # The value of x itself, its gradient 1.05 of what it was.
            x = inputs["x"]
            inputs = inputs | {"x": 1.05 * x - jax.lax.stop_gradient(0.05 * x)}
        return honest(inputs, "reference")

    case = case._replace(call=call)
    truth = bench.find_truth(case, "forward_backward")
    error, found = bench.check(case, "forward_backward", "close", truth)
    assert error < 1e-6 and found == is_green
    rows = bench.measure(case, repetitions=1)
    assert all(("ms" in row) == is_green for row in rows)


def test_donated_inputs_are_fresh_in_every_call():
    case = make_case(donated=("state",), implementations=("xla", "reference"))
    assert bench.device_ms(case, "forward", "xla", 3) > 0


def test_implementations_that_do_not_run_have_no_row(capsys):
    def call(inputs, implementation):
        if implementation == "xla":
            raise NotImplementedError("needs a GPU")
        return inputs["x"]

    case = make_case(call=call, implementations=("xla", "reference"))
    assert bench.measure(case, repetitions=1) == []
    assert "xla does not run here: needs a GPU" in capsys.readouterr().out


def test_floors():
    peaks = bench_cases.PEAKS["H200"]
    assert bench_cases.Cost(4.8e9).floor_ms(peaks) == pytest.approx(1.0)
    assert bench_cases.Cost(4.8e9, 8.4e9).floor_ms(peaks) == pytest.approx(2.0)
    assert bench_cases.Cost(0.0, 0.0, 780e9).floor_ms(peaks) == pytest.approx(1.0)
    assert bench_cases.Cost(1.0).floor_ms(None) is None


@pytest.mark.parametrize(
    ("op", "shape", "pass_", "floor_ms"),
    [
        # By hand: 18 exponentials a channel and token, and bytes at 4.8 TB/s.
        ("selective_scan", "paper_8b", "forward", 8 * 2048 * 4096 * 18 / 4.2e9),
        ("causal_conv", "paper_8b", "forward", 8 * 2048 * 4096 * 4 / 4.8e9),
        ("multi_step", "mamba_2_8b_k1", "forward", 2.4e-4),
    ],
)
def test_floors_of_the_operations(op, shape, pass_, floor_ms):
    case = bench.OPS[op][0](shape)
    found = case.costs[pass_].floor_ms(bench_cases.PEAKS["H200"])
    assert found == pytest.approx(floor_ms, rel=0.02)


def test_every_shape_has_a_case():
    for make, every, default in bench.OPS.values():
        assert set(default) <= set(every)
        for name in every:
            case = make(name)
            inputs = jax.eval_shape(case.make, jax.random.key(0))
            assert "reference" in case.implementations and inputs
            assert set(case.costs) <= set(bench.PASSES)
            assert max(case.tolerance[pass_] for pass_ in case.costs) <= 1e-2


def test_command_line_merges_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MIL_JAX_COMMIT", "abc")
    small = make_case(implementations=("xla", "reference"))
    monkeypatch.setitem(
        bench.OPS,
        "op",
        (lambda name: small._replace(shape=name), ("a", "b"), ("a",)),
    )
    out = tmp_path / "folder" / "rows.json"
    argv = ["--op", "op", "--repetitions", "1", "--out", str(out)]
    assert bench.main(argv) == 0
    first = json.loads(out.read_text())
    assert first["commit"] == "abc" and set(first["versions"]) == {"jax", "jaxlib"}
    assert set(first) == {"device", "versions", "commit", "date", "rows"}
    fields = ("op", "pass", "shape", "implementation", "ms", "floor_ms", "xla_ms")
    assert all(tuple(row) == (*fields, "commit", "date") for row in first["rows"])
    assert bench.main([*argv, "--shape", "a", "--shape", "b"]) == 0
    monkeypatch.setenv("MIL_JAX_COMMIT", "def")
    assert bench.main([*argv, "--shape", "b"]) == 0
    merged = json.loads(out.read_text())
    rows = merged["rows"]
    # The header tells of the newest run only: a row says which code it is from.
    assert merged["commit"] == "def"
    assert len(rows) == 4
    assert {(r["shape"], r["pass"]): r["commit"] for r in rows} == {
        (shape, pass_): commit
        for shape, commit in (("a", "abc"), ("b", "def"))
        for pass_ in bench.PASSES
    }
    assert "vs XLA" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench.main(["--op", "op", "--shape", "c"])


def test_red_parity_is_the_exit_status(monkeypatch):
    red = make_case(implementations=("wrong", "reference"))
    monkeypatch.setitem(bench.OPS, "op", (lambda name: red, ("a",), ("a",)))
    assert bench.main(["--op", "op", "--repetitions", "1"]) == 1
