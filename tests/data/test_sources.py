"""Unit tests of the data sources: each format with a small generated file."""

import gzip
import json
import sys
import types

import numpy as np
import pytest

from mil_jax.data import demo_world, row_files
from mil_jax.data.row_files import RowError
from mil_jax.data.sources import conversations, digests, preference_pairs, prompts
from mil_jax.errors import UserError

ROLES = {"u": "user", "a": "assistant", "s": "system"}


def chat(text):
    """ "u:hi a:yo" as messages."""
    turns = [turn.split(":") for turn in text.split()]
    return [{"role": ROLES[role], "content": content} for role, content in turns]


def _write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text(text)
    return str(path)


SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]


def test_digests_are_of_each_files_content(tmp_path):
    first = _write(tmp_path / "a.jsonl", [{"prompt": "one"}])
    _write(tmp_path / "b.jsonl", [{"prompt": "one"}])
    spec = f"{tmp_path}/*.jsonl, demo:train:0:3,tfds:name:train"
    before = digests(spec)
    assert list(before) == [first, f"{tmp_path}/b.jsonl"]
    assert len(set(before.values())) == 1
    _write(tmp_path / "b.jsonl", [{"prompt": "two"}])
    after = digests(spec)
    assert after[first] == before[first] != after[f"{tmp_path}/b.jsonl"]
    with pytest.raises(UserError, match="no file matches '/nope.jsonl'"):
        digests("/nope.jsonl")


class TestConversations:
    @pytest.mark.parametrize(
        "row, expected",
        [
            ({"messages": chat("s:be u:hi a:yo")}, "s:be u:hi a:yo"),
            ({"messages": chat("u:hi a:yo"), "prompt": "hi"}, "u:hi a:yo"),
            ({"conversations": SHAREGPT}, "u:hi a:yo"),
            ({"conversations": SHAREGPT, "system": "be"}, "s:be u:hi a:yo"),
            ({"instruction": "hi", "input": "", "output": "yo"}, "u:hi a:yo"),
            ({"instruction": "hi", "output": "yo", "generator": "x"}, "u:hi a:yo"),
            ({"prompt": "hi", "completion": "yo"}, "u:hi a:yo"),
            ({"prompt": "hi", "response": "yo"}, "u:hi a:yo"),
            (
                {"prompt": chat("s:be u:hi"), "completion": chat("a:yo")},
                "s:be u:hi a:yo",
            ),
            ({"prompt": chat("u:hi"), "completion": "yo"}, "u:hi a:yo"),
            ({"question": "hi", "answer": "yo"}, "u:hi a:yo"),
            (
                {"chosen": "\n\nHuman: hi\n\nAssistant: yo", "rejected": "-"},
                "u:hi a:yo",
            ),
            ({"prompt": "hi", "chosen": chat("u:hi a:yo")}, "u:hi a:yo"),
        ],
    )
    def test_row_forms(self, tmp_path, row, expected):
        (got,) = conversations(_write(tmp_path / "x.jsonl", [row]))
        assert got == chat(expected)

    def test_alpaca_input_follows_the_instruction(self, tmp_path):
        row = {"instruction": "Sum.", "input": "1 2", "output": "3"}
        (got,) = conversations(_write(tmp_path / "x.json", [row]))
        assert got[0]["content"] == "Sum.\n\n1 2"

    @pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json"])
    def test_file_formats(self, tmp_path, name):
        rows = [{"messages": chat(f"u:q{i} a:é{i}漢")} for i in range(5)]
        got = conversations(_write(tmp_path / name, rows))
        assert len(got) == 5
        assert got[3] == chat("u:q3 a:é3漢") == got[-2]
        assert list(got) == [row["messages"] for row in rows]
        assert got[1:3] == [rows[1]["messages"], rows[2]["messages"]]
        with pytest.raises(IndexError):
            got[5]

    def test_parquet(self, tmp_path):
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        rows = [{"messages": chat(f"u:q{i} a:r{i}")} for i in range(7)]
        path = tmp_path / "x.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
        got = conversations(str(path))
        assert len(got) == 7
        assert [got[i] for i in (6, 0, 3)] == [rows[i]["messages"] for i in (6, 0, 3)]
        path.write_bytes(b"no parquet")
        with pytest.raises(UserError, match="is not a Parquet file"):
            conversations(str(path))

    def test_several_paths_and_globs(self, tmp_path):
        for name in ("b1.jsonl", "b2.jsonl", "a.json"):
            _write(tmp_path / name, [{"messages": chat(f"u:q a:{name}")}] * 2)
        spec = f"{tmp_path}/a.json, {tmp_path}/b*.jsonl,demo:test:4:3"
        got = conversations(spec)
        names = [c[-1]["content"] for c in got[:6]]
        assert names == ["a.json"] * 2 + ["b1.jsonl"] * 2 + ["b2.jsonl"] * 2
        assert got[6:] == [demo_world.task("test", i) for i in (4, 5, 6)]
        assert len(got) == 9 and got[8] == got[-1]

    def test_demo(self):
        got = conversations("demo:train:10:20")
        assert len(got) == 20
        assert got[5] == demo_world.task("train", 15)

    def test_tfds(self, monkeypatch):
        rows = [
            {"prompt": b"hi \xc3\xa9", "completion": b"yo"},
            {
                "messages": {
                    "role": np.array([b"user", b"assistant"], object),
                    "content": np.array([b"hi", b"yo"], object),
                }
            },
        ]
        asked = []
        fake = types.ModuleType("tensorflow_datasets")
        fake.data_source = lambda name, split: asked.append((name, split)) or rows
        monkeypatch.setitem(sys.modules, "tensorflow_datasets", fake)
        got = conversations("tfds:some/set:2.0.0:train")
        assert asked == [("some/set:2.0.0", "train")]
        assert got[0][0]["content"] == "hi é"
        assert got[1] == chat("u:hi a:yo")


class TestPrompts:
    @pytest.mark.parametrize(
        "row, expected",
        [
            ({"messages": chat("s:be u:hi a:yo")}, "s:be u:hi"),
            ({"messages": chat("u:hi a:yo u:go a:no a:na")}, "u:hi a:yo u:go"),
            ({"messages": chat("u:hi a:yo u:go")}, "u:hi a:yo u:go"),
            ({"instruction": "hi"}, "u:hi"),
            ({"prompt": "hi"}, "u:hi"),
        ],
    )
    def test_ends_in_a_user_turn(self, tmp_path, row, expected):
        (got,) = prompts(_write(tmp_path / "x.jsonl", [row]))
        assert got == chat(expected)

    def test_demo(self):
        assert prompts("demo:test:0:3")[2] == demo_world.task("test", 2)[:-1]

    def test_no_user_turn(self, tmp_path):
        path = _write(tmp_path / "x.jsonl", [{"messages": chat("s:be a:yo")}])
        with pytest.raises(UserError, match="line 1: no user turn comes before"):
            prompts(path)[0]


class TestPreferencePairs:
    @pytest.mark.parametrize(
        "row, expected",
        [
            (
                {
                    "prompt": "hi",
                    "chosen": chat("u:hi a:yo"),
                    "rejected": chat("u:hi a:no"),
                    "score_chosen": 8.0,
                },
                "u:hi",
            ),
            ({"prompt": "hi", "chosen": "yo", "rejected": "no"}, "u:hi"),
            (
                {
                    "prompt": chat("s:be u:hi"),
                    "chosen": chat("a:yo"),
                    "rejected": chat("a:no"),
                },
                "s:be u:hi",
            ),
            (
                {
                    "conversations": SHAREGPT + [{"from": "human", "value": "go"}],
                    "chosen": {"from": "gpt", "value": "yo"},
                    "rejected": {"from": "gpt", "value": "no"},
                },
                "u:hi a:yo u:go",
            ),
            (
                {
                    "chosen": "\n\nHuman: hi\n\nAssistant: a\n\nHuman: go\n\n"
                    "Assistant: yo",
                    "rejected": "\n\nHuman: hi\n\nAssistant: a\n\nHuman: go\n\n"
                    "Assistant: no",
                },
                "u:hi a:a u:go",
            ),
        ],
    )
    def test_row_forms(self, tmp_path, row, expected):
        (pair,) = preference_pairs(_write(tmp_path / "x.jsonl", [row]))
        assert pair == (chat(expected), "yo", "no")

    def test_demo_has_the_right_and_a_wrong_answer(self):
        for i, pair in enumerate(preference_pairs("demo:train:5:30")):
            conversation = demo_world.task("train", 5 + i)
            assert pair.prompt == conversation[:-1]
            assert demo_world.check(conversation, pair.chosen)
            assert not demo_world.check(conversation, pair.rejected)

    @pytest.mark.parametrize(
        "row, message",
        [
            ({"prompt": "hi", "chosen": "yo"}, "needs `rejected`"),
            ({"chosen": "yo", "rejected": "no"}, "`chosen` is a text without a prompt"),
            (
                {"chosen": chat("u:hi a:yo"), "rejected": chat("u:ho a:no")},
                "do not answer the same prompt",
            ),
            (
                {"prompt": "hi", "chosen": chat("a:x u:hi"), "rejected": "no"},
                "`chosen` does not end in an answer",
            ),
            (
                {"prompt": chat("s:be"), "chosen": "yo", "rejected": "no"},
                "does not end in a user turn",
            ),
        ],
    )
    def test_malformed(self, tmp_path, row, message):
        path = _write(tmp_path / "x.jsonl", [row])
        with pytest.raises(RowError, match=f"x.jsonl, line 1: .*{message}"):
            preference_pairs(path)[0]


class TestErrors:
    def test_malformed_lines_are_named(self, tmp_path):
        path = tmp_path / "x.jsonl"
        good = json.dumps({"messages": chat("u:hi a:yo")})
        bad = [
            ('{"messages": [', "not valid JSON"),
            ("[1]", "expected an object, got list"),
            ('{"messages": []}', "`messages` is not a list of turns"),
            ('{"messages": {"role": "user"}}', "`messages` is not a list of turns"),
            ('{"messages": ["hi"]}', "turn 0 of `messages` is not an object"),
            ('{"messages": [{"role": "cat", "content": "x"}]}', "unknown role 'cat'"),
            ('{"messages": [{"role": [], "content": "x"}]}', r"unknown role \[\]"),
            ('{"messages": [{"role": "user"}]}', "turn 0 of `messages` has no text"),
            ('{"messages": [{"role": "user", "content": "x"}]}', "has no answer"),
            ('{"instruction": 5, "output": "x"}', "`instruction` is missing or not a"),
            ('{"text": "x"}', "unknown form with the keys text"),
        ]
        path.write_text("\n\n".join([good, *(line for line, _ in bad), good]))
        got = conversations(str(path))
        assert len(got) == len(bad) + 2
        assert got[0] == got[-1] == chat("u:hi a:yo")
        for i, (_, message) in enumerate(bad, start=1):
            with pytest.raises(
                RowError, match=f"x.jsonl, line {2 * i + 1}: .*{message}"
            ):
                got[i]

    def test_bad_bytes(self, tmp_path):
        path = tmp_path / "x.jsonl"
        path.write_bytes(b'{"prompt": "\xff", "completion": "x"}\r\n')
        with pytest.raises(UserError, match="line 1: not valid JSON .*utf-8"):
            conversations(str(path))[0]

    def test_json_files(self, tmp_path):
        path = tmp_path / "x.json"
        path.write_text('[\n{"a": 1},\n{"b" 2}]')
        with pytest.raises(UserError, match="x.json, line 3: not valid JSON"):
            conversations(str(path))
        path.write_text('{"a": 1}\n{"a": 2}')
        with pytest.raises(UserError, match="line 2: .*JSON lines .jsonl"):
            conversations(str(path))
        path.write_text('{"a": 1}')
        with pytest.raises(UserError, match="is not a list of objects"):
            conversations(str(path))
        path.write_text('[{"prompt": "x", "completion": "y"}, 3]')
        with pytest.raises(UserError, match="entry 2: expected an object, got int"):
            conversations(str(path))[1]

    def test_broken_gzip(self, tmp_path):
        path = tmp_path / "x.jsonl.gz"
        path.write_bytes(gzip.compress(b'{"a": 1}\n' * 100)[:-10])
        with pytest.raises(UserError, match="is no whole gzip file"):
            conversations(str(path))

    @pytest.mark.parametrize(
        "spec, message",
        [
            ("", "the data spec is empty"),
            ("nowhere/*.jsonl", r"no file matches 'nowhere/\*.jsonl'"),
            ("demo:valid:0:5", "is not demo:SPLIT:START:COUNT"),
            ("demo:train:0", "is not demo:SPLIT:START:COUNT"),
            ("demo:train:0:0", "is not demo:SPLIT:START:COUNT"),
            ("tfds:set", "is not tfds:NAME:SPLIT"),
        ],
    )
    def test_specs(self, spec, message):
        with pytest.raises(UserError, match=message):
            conversations(spec)

    def test_empty_and_unknown_files(self, tmp_path):
        (tmp_path / "x.jsonl").write_text("\n \n")
        with pytest.raises(UserError, match="x.jsonl holds no rows"):
            conversations(str(tmp_path / "x.jsonl"))
        (tmp_path / "x.csv").write_text("a,b")
        with pytest.raises(UserError, match="x.csv has an unknown format; supported"):
            conversations(str(tmp_path / "x.csv"))

    @pytest.mark.parametrize(
        "module, spec",
        [("pyarrow", "{}/x.parquet"), ("tensorflow_datasets", "tfds:set:train")],
    )
    def test_missing_packages(self, tmp_path, monkeypatch, module, spec):
        (tmp_path / "x.parquet").write_bytes(b"")
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=rf"needs {module}; .*mil_jax\[data\]"):
            conversations(spec.format(tmp_path))


@pytest.mark.parametrize("start", ["", "\n", '{"n": 0}\n'])
def test_a_mark_of_utf8_at_the_beginning_is_no_text(tmp_path, start):
    path = tmp_path / "rows.jsonl"
    path.write_text(start + '{"n": 1}', "utf-8-sig")
    rows = row_files.JsonLines(path)
    last = len(rows) - 1
    assert (rows[0]["n"], rows[last]["n"]) == (1 - last, 1)
    assert rows.line(last) == 1 + start.count("\n")
    path.write_text('[{"n": 1}]', "utf-8-sig")
    assert row_files.JsonArray(path)[0] == {"n": 1}
    path.write_text("", "utf-8-sig")
    assert len(row_files.JsonLines(path)) == 0
