"""The measurement of acceptance: its data, models and tables, and what it refuses."""

import json

import numpy as np
import pytest
from checks import commands, tiny

from mil_jax import acceptance
from mil_jax import measure_acceptance as command
from mil_jax.errors import UserError
from mil_jax.generate import decode


def run(*args):
    """Runs the command in this process."""
    command.main(commands.parse(command, *args), ["measure_acceptance"])


def _row(**changes):
    row = {"world": "demo", "recipe": "", "measure": "acceptance"}
    row |= {"target": "mamba2_50", "draft_layers": 2, "k": 4, "temperature": 0.0}
    return row | {"tokens_per_step": 3.0} | changes


def _timed(**changes):
    row = {"model": "llama3_8b_mamba2_50", "mode": "speculative", "batch": 1, "k": 4}
    row |= {"draft": "2 layers, head of 32768", "step_ms": 5.0, "plain_ms": 4.0}
    return row | {"tokens_per_step": 3.0} | changes


class TestTables:
    def test_tokens_per_step(self):
        rows = [
            _row(),
            _row(k=2, tokens_per_step=2.25),
            _row(draft_layers=1, tokens_per_step=1.5),
            _row(measure="quality", k=None, draft_layers=None),
        ]
        assert acceptance.acceptance_table(rows).splitlines()[2:] == [
            "| world | target | draft | T | K=2 | K=4 |",
            "| --- | --- | --- | --- | ---: | ---: |",
            "| demo | mamba2_50 | 1 layer | 0.0 |  | 1.50 |",
            "| demo | mamba2_50 | 2 layers | 0.0 | 2.25 | 3.00 |",
        ]

    def test_speed_up_at_the_times_of_a_large_model(self):
        """3 tokens in 5 ms, against one in 4 ms."""
        (line,) = acceptance.speedup_table([_row()], [_timed()]).splitlines()[4:]
        assert line == (
            "| demo | mamba2_50 | llama3_8b_mamba2_50 | 2 layers, head of 32768 | 0.0 | 4 "
            "| 3.00 | 5.00 | 4.00 | 2.40 |"
        )

    @pytest.mark.parametrize(
        "changes",
        [
            {"mode": "plain", "k": 0},
            {"batch": 64},
            {"k": 5},
            {"model": "llama3_8b_mamba_50"},
            {"model": "llama3_8b"},
            {"draft": "1 layers"},
            {"draft": "mamba_130m"},
        ],
    )
    def test_only_equals_are_combined(self, changes):
        assert acceptance.speedup_table([_row()], [_timed(**changes)]) == ""

    def test_a_pure_mamba_is_no_teacher(self):
        times = [_timed(model="mamba_2_8b")]
        assert acceptance.speedup_table([_row(target="teacher")], times) == ""

    def test_the_teacher_is_the_large_model_itself(self):
        text = acceptance.speedup_table(
            [_row(target="teacher")], [_timed(model="llama3_8b")]
        )
        assert "| demo | teacher | llama3_8b |" in text

    def test_the_nearest_acceptance_is_taken(self):
        times = [_timed(tokens_per_step=2.0, step_ms=9.0), _timed()]
        assert "| 5.00 | 4.00 | 2.40 |" in acceptance.speedup_table([_row()], times)


def test_repeated_ngrams():
    rows = [np.array([1, 2, 1, 2, 1]), np.array([1, 2, 3]), np.array([7])]
    # 4 pairs of which 2 differ, and 2 that differ; one token has no pair.
    assert acceptance.distinct_ngrams(rows, 2) == 0.75
    assert acceptance.distinct_ngrams([], 4) == 1.0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_acceptance_of_a_draft_that_is_the_target(temperature):
    target = tiny.model("attention")
    prompts = list(tiny.tokens(3, 5))
    plain = decode.generate(target, prompts, max_new_tokens=9).rows()
    row = acceptance.measure(target, target, prompts, 3, temperature, 9, plain)
    # One token comes from the prompt, the other eight from two steps of four.
    assert row["tokens_per_step"] == 4.0 and row["steps"] == 6
    assert row["accepted_at"] == [1.0, 1.0, 1.0]
    assert row["new_tokens"] == 27 and row["prompts"] == 3
    greedy = (3, 0.0) if temperature == 0 else (None, None)
    assert (row.get("equal_to_plain"), row.get("largest_gap")) == greedy


def test_where_answers_part():
    """The gap is that of the logits behind the last token that both have."""
    model, prompts = tiny.model("attention"), list(tiny.tokens(3, 5))
    plain = decode.generate(model, prompts, max_new_tokens=6).rows()
    others = [row.copy() for row in plain]
    others[1][3] = (others[1][3] + 1) % tiny.VOCAB
    others[1][4] = (others[1][4] + 1) % tiny.VOCAB
    (gap,) = acceptance.divergences(model, prompts, plain, others)
    read = np.concatenate([prompts[1], plain[1][:3]])
    logits = np.asarray(tiny.forward(model, read[None]))[0, -1]
    assert gap == pytest.approx(logits[plain[1][3]] - logits[others[1][3]], rel=1e-4)
    assert gap > 0
    assert acceptance.divergences(model, prompts, plain, plain) == []


def test_tables_of_rows_on_record(tmp_path, capsys):
    rows, times = tmp_path / "rows.json", tmp_path / "times.json"
    rows.write_text(json.dumps({"rows": [_row(), _row(recipe="other", k=2)]}))
    times.write_text(json.dumps({"rows": [_timed()]}))
    run(f"--show={rows}", f"--step_times={times}")
    shown = capsys.readouterr().out
    assert "| K=4 |" in shown and "K=2" not in shown and "| 2.40 |" in shown


class TestRefused:
    @pytest.mark.parametrize(
        ("flag", "message"),
        [
            ("--targets=mamba_60", "--targets names 'mamba_60'; expected teacher"),
            ("--drafts=0", "--drafts is 0; give numbers from 1"),
            ("--ks=2,x", "--ks is 2,x; give numbers from 1"),
            ("--temperatures=-1", "--temperatures is -1; give numbers from 0"),
            ("--set=draft", "--set=draft is not understood; write STAGE.KEY=VAL"),
            ("--set=draft.nope=1", "unknown config key stage.nope"),
            ("--set=draft.length.x=1", "--set=draft.length.x: length has no keys"),
            ("--world=text", "--world=text needs --text=FILE"),
            ("--show=setup.py", "setup.py is no file of measurements (JSONDecode"),
            ("--show=/nope", "/nope is no file of measurements (FileNotFound"),
            ("--config=nope.py", "config nope.py does not exist"),
        ],
    )
    def test_wrong_flags(self, tmp_path, flag, message):
        with pytest.raises(UserError) as error:
            run(f"--workdir={tmp_path}", "--tiny", flag)
        assert message in str(error.value) and "\n" not in str(error.value)

    def test_text_without_short_prompts(self, tmp_path):
        file = tmp_path / "long.jsonl"
        row = {"prompt": "word " * 99, "completion": "yes"}
        file.write_text((json.dumps(row) + "\n") * 3)
        args = ["--world=text", f"--text={file}", f"--workdir={tmp_path}"]
        args.append("--tokenizer=mil_jax/assets/demo_teacher")
        with pytest.raises(UserError, match="have no prompt of up to 64 tokens"):
            run(*args)

    def test_other_texts_in_the_same_folder(self, tmp_path):
        note = tmp_path / "data" / "texts.json"
        note.parent.mkdir()
        note.write_text('["text", "a.txt"]')
        with pytest.raises(UserError, match="holds work on other texts; choose ano"):
            run(f"--workdir={tmp_path}")


@pytest.mark.slow
def test_the_whole_command(tmp_path, capsys):
    """Every stage on tiny models; a second start measures nothing again."""
    args = [f"--workdir={tmp_path / 'work'}", f"--out={tmp_path / 'out.json'}"]
    args += ["--tiny", "--targets=mamba2_50", "--drafts=1", "--ks=2", "--prompts=3"]
    args += ["--threads=1", f"--step_times={tmp_path / 'times.json'}"]
    (tmp_path / "times.json").write_text(
        json.dumps({"rows": [_timed(k=2, draft="1 layers")]})
    )
    for _ in range(2):
        run(*args)
        first = (tmp_path / "out.json").read_text()
        rows = json.loads(first)["rows"]
        assert [row["measure"] for row in rows] == ["quality"] + ["acceptance"] * 2
        shown = capsys.readouterr().out
        assert "| demo | mamba2_50 | 1 layer | 0.8 |" in shown
        assert "| demo | mamba2_50 | llama3_8b_mamba2_50 | 1 layers |" in shown
    assert "tokens per step\n" not in shown  # No row was measured again.
    assert (tmp_path / "work" / "mamba2_50" / "draft_1" / "draft" / "model").is_dir()
