import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from checks import tiny

from mil_jax import bench_decode, shapes
from mil_jax.config import ComputeConfig
from mil_jax.errors import UserError
from mil_jax.generate.sampler import Sampling
from mil_jax.models import decoder

ARGS = ["--shape=tiny", "--dtype=float32", "--prompt=16", "--tokens=3"]


def test_rows(tmp_path, monkeypatch):
    """Plain, speculative and adaptive rows; a second run takes their places."""
    monkeypatch.setattr(bench_decode, "REPETITIONS", 2)
    out = tmp_path / "decode.json"
    args = [*ARGS, f"--out={out}", "--k=2", "--draft-vocab=64", "--tokens-per-step=2"]
    assert bench_decode.main([*args, "--adaptive"]) == 0
    rows = {row["mode"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {"plain", "speculative", "adaptive"}
    for row in rows.values():
        assert (row["model"], row["batch"], row["prompt"]) == ("tiny_mamba_50", 1, 16)
        assert row["tok_s"] > 0
    parts = ("draft_ms", "verify_ms", "speedup")
    assert [rows["plain"][part] for part in parts] == [None] * 3
    assert [rows["adaptive"][part] for part in parts[:2]] == [None] * 2
    fast = rows["speculative"]
    assert (fast["k"], fast["draft"]) == (2, "2 layers, head of 64")
    parts = ("draft_ms", "verify_ms", "sampling_ms", "rest_ms")
    assert sum(fast[part] for part in parts) == pytest.approx(fast["step_ms"], abs=1e-3)
    expected = fast["tokens_per_step"] * fast["plain_ms"] / fast["step_ms"]
    assert fast["speedup"] == pytest.approx(expected, rel=1e-2, abs=1e-3)


def test_batches_and_prompts_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_decode, "REPETITIONS", 1)
    out = tmp_path / "decode.json"
    args = [*ARGS, f"--out={out}", "--k=0", "--batch=3", "--attention=1"]
    assert bench_decode.main([*args, "--read"]) == 0
    assert bench_decode.main([*args, "--prefill-only", "--chunk=8"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["model"], row["mode"], row["speedup"]) for row in rows] == [
        ("tiny", "plain", None),
        ("tiny", "prefill", None),
    ]


def test_recorded_rows_have_the_parts_of_a_step():
    path = Path(__file__).parents[1] / "benchmarks/results/decode_h200.json"
    for row in json.loads(path.read_text())["rows"]:
        parts = [row[name] for name in ("draft_ms", "verify_ms", "speedup")]
        if row["mode"] in ("plain", "prefill"):
            assert parts == [None] * 3
        else:
            assert min(parts) > 0


def test_more_tokens_than_a_step_makes_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench_decode.main([*ARGS, "--k=2", "--tokens-per-step=3.5"])
    assert "k gives 1 to k + 1" in capsys.readouterr().err


@pytest.mark.parametrize("mean", [1.0, 2.2, 3.0, 5.0])
def test_drafts_are_accepted_by_lot(mean):
    p = bench_decode.acceptance_of(mean, 4)
    assert sum(p**i for i in range(5)) == pytest.approx(mean)
    rows = 4000
    keys = jax.random.split(jax.random.key(0), rows)
    logits = np.zeros((rows, 5, 7), np.float32)
    drafts = np.ones((rows, 4), np.int32)
    verdict = bench_decode.lot(keys, logits, None, drafts, Sampling(), probability=p)
    assert np.mean(verdict.num_accepted) + 1 == pytest.approx(mean, abs=0.12)


def test_weights_are_those_of_the_layout():
    config = dataclasses.replace(tiny.CONFIGS["mamba"])
    compute = ComputeConfig(param_dtype="bfloat16", layout="decode")
    model = decoder.freeze(bench_decode.random_model(config, compute, 0))
    abstract = decoder.Blueprint.create(config, compute).abstract()
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in abstract.values())
    assert bench_decode.weight_bytes(model) == size
    table = tiny.VOCAB * config.d_model * 2
    assert bench_decode.weight_bytes(model, head_only_read=True) == size - table


@pytest.mark.parametrize(
    ("share", "kinds"),
    [(0.5, "mama"), (0.25, "mmma"), (1, "aaaa"), (0, "mmmm")],
)
def test_hybrids(share, kinds):
    names = {"m": "mamba2", "a": "attention"}
    config = shapes.hybrid(shapes.SHAPES["tiny"], "mamba2", share)
    assert config.layer_types == tuple(names[kind] for kind in kinds)
    if config.is_hybrid:
        assert (config.ssm.d_state, config.ssm.d_inner, config.ssm.d_xb) == (
            32,
            128,
            64,
        )
    assert shapes.keep(config, 2).layer_types == config.layer_types[:2]


def test_a_share_that_cannot_be_had():
    with pytest.raises(UserError, match="attention is 0.4"):
        shapes.hybrid(shapes.SHAPES["tiny"], "mamba", 0.4)
