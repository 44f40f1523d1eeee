"""`python -m mil_jax.generate`: answers, files, resuming and what is refused."""

import dataclasses
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from checks import commands, disk, process, tiny

from mil_jax.checkpoint import models, orbax_io
from mil_jax.data.chat import encode_prompt, load_tokenizer
from mil_jax.errors import UserError
from mil_jax.generate import __main__ as command
from mil_jax.generate import decode, draft_vocab, engine, files
from mil_jax.generate.plan import Options, make_plan
from mil_jax.generate.sampler import Sampling

ROOT = Path(__file__).parents[2]
TEACHER = models.resolve("demo_teacher")
CONFIG = dataclasses.replace(
    tiny.CONFIGS["mamba"],
    vocab_size=512,
    eos_token_ids=(5,),
    max_position_embeddings=160,
)
PROMPTS = (
    "Spell the words pig and nut.",
    "Hi",
    "Which is more, four or nine, if you add two to each of them before?",
    "pig",
    "Copy: a b c",
    "one two three four five six seven eight nine ten eleven",
    "nut?",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and a draft near it; random, so that their answers are broken UTF-8 too."""
    path = tmp_path_factory.mktemp("models")
    params = tiny.random_params(CONFIG)
    near = tiny.perturbed(params, 0.02)
    orbax_io.save_model(path / "model", CONFIG, params, assets_from=TEACHER)
    orbax_io.save_model(path / "draft", CONFIG, near, assets_from=TEACHER)
    small = dataclasses.replace(CONFIG, vocab_size=300)
    for name, config in (("other", small), ("same", CONFIG)):
        path.joinpath(name).mkdir()
        text = json.dumps(orbax_io.model_config_to_dict(config))
        path.joinpath(name, orbax_io.CONFIG_FILE).write_text(text)
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TEACHER)


def run(*args):
    """Runs the command in this process; returns its exit status."""
    try:
        command.main(commands.parse(command, *args), ["generate"])
    except SystemExit as end:
        return end.code
    return 0


def refused(*args):
    with pytest.raises(UserError) as caught:
        run(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class TestText:
    def test_cut_before_the_stop_string_that_is_complete_first(self):
        assert engine.cut("one two", ()) == ("one two", False)
        assert engine.cut("one two", ("x",)) == ("one two", False)
        assert engine.cut("one two two", ("two",)) == ("one ", True)
        assert engine.cut("one two", ("two", "one")) == ("", True)
        # Token by token, "b" would have been seen before "ab c".
        assert engine.cut("ab c", ("ab c", "b")) == ("a", True)
        assert engine.cut("ab c", ("c", "b c")) == ("a", True)

    def test_what_may_become_a_stop_string_is_held_back(self):
        assert engine.settled("one tw", ("two",)) == "one "
        assert engine.settled("one tw", ("two", "e two")) == "on"
        assert engine.settled("one two", ("o!",)) == "one tw"
        assert engine.settled("one", ("x",)) == "one"
        assert engine.settled("one\ufffd\ufffd", ()) == "one"

    def test_incomplete_characters_are_left_out(self, tokenizer):
        tokens = tokenizer("a€😀", add_special_tokens=False)["input_ids"]
        texts = [engine.text_of(tokenizer, tokens[:n]) for n in range(len(tokens) + 1)]
        assert sorted(set(texts), key=len) == ["", "a", "a€", "a€😀"]
        assert texts == sorted(texts, key=len)
        assert engine.text_of(tokenizer, [*tokens[:-1], 5]) == "a€"
        # Bytes that never were a character stay visible.
        garbage = tokenizer("😀", add_special_tokens=False)["input_ids"][-1:] * 6
        assert engine.text_of(tokenizer, garbage) == "\ufffd" * 6


def test_widths_are_few_and_not_much_wider():
    widths = [files.padded_width(n) for n in range(1, 2049)]
    assert widths == sorted(widths)
    assert set(widths[:256]) == set(range(32, 257, 32))
    assert len(set(widths)) == 8 + 3 * 4
    for n, width in enumerate(widths, 1):
        assert n <= width < n + max(32, n / 4)


def expected(folder, tokenizer, prompts, count=24, **kwargs):
    """Returns each prompt's tokens, answered alone and in one go."""
    checkpoint = models.load(folder / "model")
    model = tiny.build(checkpoint.config, checkpoint.params)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    rows = []
    for chat in chats:
        prompt = encode_prompt(tokenizer, chat)
        rows += decode.generate(model, [prompt], max_new_tokens=count, **kwargs).rows()
    return rows


class TestPrompt:
    @pytest.mark.parametrize("k", [None, "3", "auto"])
    def test_prints_the_text_and_nothing_else(
        self, folder, tokenizer, capfd, monkeypatch, caplog, k
    ):
        caplog.set_level("INFO", logger="mil_jax.generate")
        monkeypatch.setattr(command, "STREAM_BLOCK", 3)
        pieces = []
        monkeypatch.setattr(
            command,
            "print",
            lambda *a, **k: (pieces.append(a), print(*a, **k)),
            raising=False,
        )
        more = [f"--draft={folder}/draft", f"--k={k}"] if k else []
        args = (f"--model={folder}/model", f"--prompt={PROMPTS[0]}")
        assert run(*args, "--max_new_tokens=24", *more) == 0
        (tokens,) = expected(folder, tokenizer, PROMPTS[:1])
        # The speed is told, and what ended the answer.
        assert tokens[-1] != 5
        assert caplog.messages[-1].endswith("; cut at the limit (max_new_tokens, 24)")
        printed = capfd.readouterr().out
        assert printed == engine.text_of(tokenizer, tokens) + "\n"
        assert len([piece for piece in pieces if piece and piece[0]]) > 2

    def test_a_draft_that_proposes_some_tokens_only(self, folder, tokenizer, tmp_path):
        """What it may propose is read beside it; answers stay the model's."""
        draft = tmp_path / "draft"
        shutil.copytree(folder / "draft", draft)
        (tokens,) = expected(folder, tokenizer, PROMPTS[:1])
        counts = draft_vocab.count([tokens, tokens[:3]], CONFIG.vocab_size)
        draft_vocab.save(draft, draft_vocab.choose(counts, 8, always=(5,)))
        plan = make_plan(Options(f"{folder}/model", str(draft), k=2, max_new_tokens=24))
        assert plan.draft_vocab.size == 8
        assert 5 in plan.draft_vocab
        running = engine.load(plan)
        (answer,) = running.answer([plan.encode(PROMPTS[0])], [0])
        assert answer.text == engine.text_of(tokenizer, tokens)

    def test_stop_string_across_tokens(self, folder, tokenizer, capfd, monkeypatch):
        """Of two tokens, in different blocks: no part of it is ever printed."""
        monkeypatch.setattr(command, "STREAM_BLOCK", 1)
        (tokens,) = expected(folder, tokenizer, PROMPTS[:1])
        texts = [engine.text_of(tokenizer, tokens[:n]) for n in range(25)]
        at = next(
            n for n in range(6, 24) if len(set(map(len, texts[n - 2 : n + 1]))) == 3
        )
        stop = texts[at][len(texts[at - 2]) :]
        whole = texts[-1]
        args = (f"--model={folder}/model", f"--prompt={PROMPTS[0]}")
        run(*args, "--max_new_tokens=24", f"--stop={stop}", "--stop=never said")
        assert capfd.readouterr().out == whole[: whole.index(stop)] + "\n"

    def test_speed(self, folder, caplog, monkeypatch):
        plan = make_plan(
            Options(f"{folder}/model", f"{folder}/draft", k=2, max_new_tokens=9)
        )
        prompts = [plan.encode(prompt) for prompt in PROMPTS[:2]]
        running = engine.load(plan)
        for _ in range(2):
            answers = running.answer([*prompts, prompts[0]], [0, 1, 0], used=2)
        speed = running.speed
        assert len(answers) == 2
        assert speed.prompt_tokens == 2 * sum(prompt.size for prompt in prompts)
        assert speed.tokens == 2 * sum(answer.num_tokens - 1 for answer in answers)
        assert speed.gained == speed.tokens > 0
        assert speed.compile_seconds > speed.seconds > 0
        number = r"[\d,.]+"
        assert re.fullmatch(
            rf"prompt \d+ tokens at {number} tokens/s; answer \d+ tokens at {number} "
            rf"tokens/s; {number} tokens per step; accepted at 1 to 2: \d+% \d+%; "
            rf"compiled in {number} s",
            speed.line(),
        )


class TestSpeed:
    def line(self, **kwargs):
        return re.sub("^.*?tokens/s; .*?tokens/s; ", "", engine.Speed(**kwargs).line())

    def test_only_positions_that_were_drafted_are_told(self):
        accepted, tried = np.array([[3, 1, 0, 0], [4, 4, 2, 0]])
        some = {"num_steps": 4, "gained": 8, "accepted_at": accepted}
        assert self.line(**some, tried_at=tried) == (
            "2.00 tokens per step; accepted at 1 to 3: 75% 25% 0%; compiled in 0.0 s"
        )
        none = "2.00 tokens per step; compiled in 0.0 s"
        assert self.line(**some, tried_at=np.zeros(4)) == none

    def test_nothing_is_told_of_no_steps(self):
        zeros = np.zeros(4)
        line = self.line(num_steps=0, accepted_at=zeros, tried_at=zeros)
        assert line == self.line() == "compiled in 0.0 s"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Good lines of both forms, and every kind of bad one, some blank."""
    path = tmp_path_factory.mktemp("input") / "prompts.jsonl"
    lines = [json.dumps({"id": i, "prompt": p}).encode() for i, p in enumerate(PROMPTS)]
    lines[1] = json.dumps(
        {"messages": [{"role": "user", "content": PROMPTS[1]}]}
    ).encode()
    lines[2:2] = [
        b'{"prompt": "\xff"}',
        b"",
        b'{"prompt": ',
        b'{"id": "q", "text": "Hi"}',
    ]
    lines[8:8] = [
        b'{"id": {"n": 7}, "prompt": ""}',
        json.dumps({"prompt": "long " * 200}).encode(),
        b'{"prompt": "\\ud800"}',
        b'{"messages": [{"role": "user"}]}',
        b"[" * 100_000,
    ]
    path.write_bytes(b"\n".join(lines))
    return path


def answer(folder, source, target, *more):
    return run(
        f"--model={folder}/model",
        f"--input={source}",
        f"--output={target}",
        "--max_new_tokens=24",
        "--batch_size=2",
        *more,
    )


def record_batches(patch):
    """Returns a list that gets the rows and the prompts' sizes of every batch."""
    batches, original = [], engine.Engine.answer

    def wrapped(self, prompts, rows, **kwargs):
        batches.append((tuple(rows), [prompt.size for prompt in prompts]))
        return original(self, prompts, rows, **kwargs)

    patch.setattr(engine.Engine, "answer", wrapped)
    return batches


BATCHES = []  # Of the undisturbed run.


@pytest.fixture(scope="module")
def undisturbed(folder, source, tmp_path_factory):
    target = tmp_path_factory.mktemp("output") / "answers.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BATCHES_PER_CHUNK", 2)
        batches = record_batches(patch)
        assert answer(folder, source, target) == 1
    BATCHES[:] = batches
    return target


class TestFile:
    def test_answers_in_the_order_of_the_lines(self, folder, tokenizer, undisturbed):
        records = read_lines(undisturbed)
        good = [record for record in records if "answer" in record]
        tokens = expected(folder, tokenizer, PROMPTS)
        assert [r["answer"] for r in good] == [
            engine.text_of(tokenizer, row) for row in tokens
        ]
        assert [r["finish"] for r in good] == [
            "eos" if row[-1] == 5 else "length" for row in tokens
        ]
        asked = [r.get("prompt") or r["messages"][0]["content"] for r in good]
        assert asked == list(PROMPTS)
        assert [r.get("id") for r in good] == [0, None, 2, 3, 4, 5, 6]

    def test_bad_lines_are_named_and_the_rest_goes_on(self, undisturbed):
        records = read_lines(undisturbed)
        errors = {r["line"]: r["error"] for r in records if "error" in r}
        assert [i for i, r in enumerate(records) if "error" in r] == [
            2,
            3,
            4,
            7,
            8,
            9,
            10,
            11,
        ]
        parts = {
            3: "not valid JSON ('utf-8' codec can't decode byte 0xff",
            5: "not valid JSON (Expecting value",
            6: "unknown form with the keys id, text",
            9: "the prompt is empty",
            10: "with 24 new ones (max_new_tokens) that exceeds the model's max_position",
            11: "the prompt is not Unicode text",
            12: "message 0 (user) has no text in `content`",
            13: "not valid JSON (nested too deeply)",
        }
        assert list(errors) == list(parts)
        for line, part in parts.items():
            assert part in errors[line]
        ids = {r["line"]: r["id"] for r in records if "error" in r and "id" in r}
        assert ids == {6: "q", 9: {"n": 7}}

    def test_batches_are_sorted_within_chunks_of_lines(self, undisturbed):
        """Chunks of four lines; the good ones are 0, 1, 5, 6, 12, 13 and 14."""
        rows = [set(rows) for rows, _ in BATCHES]
        assert rows == [{0, 1}, {5, 6}, {12, 14}, {13}]
        assert all(sizes == sorted(sizes) for _, sizes in BATCHES)
        assert BATCHES[0][0] == (1, 0)

    @pytest.mark.parametrize("share", [0.0, 0.2, 0.55, 0.999])
    def test_a_killed_run_goes_on(
        self, folder, source, undisturbed, tmp_path, monkeypatch, share
    ):
        """Cut anywhere, inside of lines and chunks; the result is the same to the byte."""
        monkeypatch.setattr(files, "BATCHES_PER_CHUNK", 2)
        whole = undisturbed.read_bytes()
        size = int(share * len(whole))
        assert share == 0.0 or whole[size - 1 : size] != b"\n"
        target = tmp_path / "answers.jsonl"
        target.write_bytes(whole[:size])
        beside = f"{target.name}.options.json"
        shutil.copy(undisturbed.with_name(beside), tmp_path / beside)
        batches, appended, synced = record_batches(monkeypatch), [], []
        append = files._Records.append
        monkeypatch.setattr(
            files._Records,
            "append",
            lambda self, records: (appended.extend(records), append(self, records)),
        )
        sync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda f: (synced.append(f), sync(f)))
        assert answer(folder, source, target) == 1
        assert target.read_bytes() == whole
        assert batches == BATCHES[len(BATCHES) - len(batches) :]
        num_whole = whole[:size].count(b"\n")
        assert len(appended) == 15 - num_whole
        assert len(synced) == 4 - num_whole // 4

    def test_full_disk(self, folder, source, undisturbed, tmp_path, monkeypatch):
        """One line, what was written stays, and with room again it is completed."""
        monkeypatch.setattr(files, "BATCHES_PER_CHUNK", 2)
        target = tmp_path / "answers.jsonl"
        size = undisturbed.stat().st_size * 2 // 3
        with disk.limited(size), pytest.raises(UserError) as error:
            answer(folder, source, target)
        written = target.read_bytes()
        assert written == undisturbed.read_bytes()[:size]
        whole = written[: written.rindex(b"\n")].count(b"\n") + 1
        assert str(error.value) == (
            f"cannot write {target} (File too large); free some space, the same command "
            f"then goes on after line {whole - whole % 4}"
        )
        assert answer(folder, source, target) == 1
        assert target.read_bytes() == undisturbed.read_bytes()

    def test_a_draft_changes_no_answer_and_a_failed_run_goes_on(
        self, folder, source, undisturbed, tmp_path, monkeypatch
    ):
        """It stops in the third batch, the first of the second chunk with prompts."""
        monkeypatch.setattr(files, "BATCHES_PER_CHUNK", 2)
        target = tmp_path / "answers.jsonl"
        draft = (f"--draft={folder}/draft", "--k=2")
        whole = undisturbed.read_bytes().splitlines(keepends=True)
        original, calls = engine.Engine.answer, iter(range(2))

        def failing(self, *args, **kwargs):
            if next(calls, None) is None:
                raise RuntimeError("the device is gone")
            assert self._draft is not None
            return original(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(engine.Engine, "answer", failing)
            with pytest.raises(RuntimeError, match="the device is gone"):
                answer(folder, source, target, *draft)
        assert target.read_bytes() == b"".join(whole[:12])
        batches = record_batches(monkeypatch)
        assert answer(folder, source, target, *draft) == 1
        assert target.read_bytes() == b"".join(whole)
        assert batches == BATCHES[2:]

    def test_ctrl_c_says_how_far_it_came(
        self, folder, source, tmp_path, monkeypatch, caplog
    ):
        monkeypatch.setattr(files, "BATCHES_PER_CHUNK", 2)
        monkeypatch.setattr(
            engine.Engine, "answer", Mock(side_effect=KeyboardInterrupt)
        )
        target = tmp_path / "answers.jsonl"
        with pytest.raises(KeyboardInterrupt):
            answer(folder, source, target)
        assert caplog.messages[-1] == (
            f"{target} holds 0 of 15 lines; the same command goes on from there"
        )

    def test_a_complete_file_needs_no_model(
        self, folder, source, undisturbed, monkeypatch
    ):
        before = undisturbed.read_bytes()
        monkeypatch.setattr(engine, "load", None)
        assert answer(folder, source, undisturbed) == 1
        assert undisturbed.read_bytes() == before

    def test_a_file_of_bad_lines_needs_no_model(
        self, folder, tmp_path, monkeypatch, caplog
    ):
        monkeypatch.setattr(engine, "load", None)
        source = write_lines(tmp_path / "in.jsonl", [{"text": "Hi"}, {"prompt": ""}])
        target = tmp_path / "out.jsonl"
        assert answer(folder, source, target) == 1
        assert [record["line"] for record in read_lines(target)] == [1, 2]
        *lines, last = caplog.messages
        assert [line.partition(": ")[0] for line in lines] == [
            f"{source}, line 1",
            f"{source}, line 2",
        ]
        assert last.startswith("2 of 2 lines of")
        with caplog.at_level("INFO"):
            answer(folder, source, target)
        assert f"{target} was complete already" in caplog.messages

    def test_other_options_are_refused(self, folder, source, undisturbed, tmp_path):
        before = undisturbed.read_bytes()

        def message(*more, source=source):
            with pytest.raises(UserError) as caught:
                answer(folder, source, undisturbed, *more)
            return str(caught.value)

        text = message("--temperature=0.5")
        assert text == (
            f"{undisturbed} holds answers of other options: temperature was 0.0, now 0.5; "
            "choose another --output, or remove it to start over"
        )
        assert "stop was [], now ['x']" in message("--stop=x")
        assert "draft was None" in message(f"--draft={folder}/draft")
        other = write_lines(tmp_path / "other.jsonl", [{"prompt": "Hi"}])
        assert "content of the input was" in message(source=other)
        with undisturbed.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert "another run is writing" in message()
        foreign = write_lines(tmp_path / "foreign.jsonl", [{"answer": "mine"}])
        with pytest.raises(UserError, match="does not say how it was made"):
            answer(folder, source, foreign)
        assert read_lines(foreign) == [{"answer": "mine"}]
        assert undisturbed.read_bytes() == before

    def test_draws_do_not_depend_on_the_batch(self, folder, tmp_path):
        rows = [{"prompt": prompt} for prompt in PROMPTS[:4]]
        source = write_lines(tmp_path / "in.jsonl", rows)
        texts = []
        for i, more in enumerate(
            (["--batch_size=3"], ["--batch_size=2"], ["--seed=1"])
        ):
            target = tmp_path / f"{i}.jsonl"
            assert answer(folder, source, target, "--temperature=1", *more) == 0
            texts.append([record["answer"] for record in read_lines(target)])
        assert texts[0] == texts[1] != texts[2]

    @pytest.mark.parametrize("k", [0, 2])
    def test_stop_strings(self, folder, tokenizer, tmp_path, k):
        """The row that stops is cut there, the other goes on."""
        rows = expected(folder, tokenizer, PROMPTS[:2])
        whole = [engine.text_of(tokenizer, row) for row in rows]
        stop = next(c for c in whole[0] if c not in whole[1])
        source = write_lines(
            tmp_path / "in.jsonl", [{"prompt": p} for p in PROMPTS[:2]]
        )
        target = tmp_path / "out.jsonl"
        draft = [f"--draft={folder}/draft", f"--k={k}"] if k else []
        assert answer(folder, source, target, f"--stop={stop}", *draft) == 0
        first, second = read_lines(target)
        assert first["answer"] == whole[0][: whole[0].index(stop)]
        assert (first["finish"], second["answer"]) == ("stop", whole[1])


class TestRefused:
    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ((), "flag --model is missing"),
            (("--model=m",), "give either --prompt or --input"),
            (
                ("--model=m", "--prompt=a", "--input=b"),
                "give either --prompt or --input",
            ),
            (("--model=m", "--input=b"), "--input and --output belong together"),
            (("--model=m", "--prompt=a", "--output=b"), "--input and --output belong"),
            (("--model=m", "--prompt=a", "--k=2"), "--k needs --draft"),
            (("--model=m", "--prompt=a", "--draft=d", "--k=0"), "k is 0; it must be"),
            (("--model=m", "--prompt=a", "--draft=d", "--k=a"), "--k is 'a'; give a"),
            (("--model=m", "--prompt=a", "--max_new_tokens=0"), "max_new_tokens is 0"),
            (("--model=m", "--prompt=a", "--max_length=0"), "max_length is 0"),
            (("--model=m", "--prompt=a", "--stop="), "a stop string is empty"),
            (("--model=m", "--prompt=a", "--top_p=2"), "top_p is 2.0"),
            (
                ("--model=m", "--prompt=a", "--temperature=nan"),
                "temperature is nan; it",
            ),
            (("--model=m", "--prompt=a", "--seed=4294967296"), "from 0 to 4294967295"),
            (("--model=m", "--prompt=a", "--nochat", "--system=s"), "not with nochat"),
            (("--model=./nope", "--prompt=a"), "no such folder: './nope'"),
        ],
    )
    def test_flags(self, args, message):
        assert message in refused(*args)

    @pytest.fixture(autouse=True)
    def _no_device_work(self, monkeypatch):
        monkeypatch.setattr(engine, "load", None)

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (("--prompt=",), "the prompt is empty"),
            (("--prompt=", "--nochat"), "the prompt is empty"),
            (("--prompt=a", "--max_new_tokens=160"), "embeddings, 160; ask for fewer"),
            (
                ("--prompt=a", "--max_length=9", "--max_new_tokens=6"),
                "max_length, 9; ask",
            ),
            (("--prompt=a", "--max_length=2", "--max_new_tokens=1"), "2; shorten the"),
            (
                ("--prompt=a", "--draft={}/other"),
                "has a vocabulary of 300, the model of 512",
            ),
            (("--input={}/nope.jsonl", "--output={}/out"), "nope.jsonl: No such file"),
            (("--input=/dev/null", "--output={}/out"), "/dev/null holds no lines"),
        ],
    )
    def test_models_and_prompts(self, folder, args, message):
        args = [arg.format(folder) for arg in args]
        assert message in refused(f"--model={folder}/model", *args)
        assert not (folder / "out").exists()

    def test_draft_with_another_tokenizer(self, folder, tmp_path):
        draft = tmp_path / "draft"
        shutil.copytree(folder / "draft", draft)
        file = draft / "tokenizer.json"
        text = file.read_text()
        file.write_text(text.replace('"<|system|>"', '"<|tool|>"'))
        message = refused(f"--model={folder}/model", f"--draft={draft}", "--prompt=Hi")
        assert message.startswith(f"the draft {draft} has another tokenizer")

    def test_more_drafts_than_the_kernel_takes(self, folder):
        models = (f"--model={folder}/model", f"--draft={folder}/draft", "--prompt=Hi")
        assert "at most 19 tokens are drafted a step" in refused(*models, "--k=20")
        assert "at most 19;" in commands.parse(command)["k"].help

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"no array", "is damaged"),
            (np.array([3, 512]), "holds token 512; the model has 512 tokens"),
            (np.array([3, 3]), "does not hold tokens, each once"),
            (np.array([[3, 4]]), "does not hold tokens, each once"),
            (np.array([0.5]), "does not hold tokens, each once"),
        ],
    )
    def test_wrong_tokens_of_a_draft(self, folder, tmp_path, content, message):
        draft = tmp_path / "draft"
        shutil.copytree(folder / "draft", draft)
        file = draft / draft_vocab.FILE
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            np.save(file, content)
        args = (f"--model={folder}/model", f"--draft={draft}", "--prompt=Hi")
        assert message in refused(*args)

    def test_no_tokenizer(self, folder):
        assert refused(f"--model={folder}/same", "--prompt=Hi") == (
            f"cannot load a tokenizer from folder {folder}/same: there is none; copy "
            "tokenizer.json and tokenizer_config.json (or tokenizer.model) of its model "
            "into it"
        )

    def test_folder_near_a_model(self, folder):
        for near in (folder, folder / "model" / "weights"):
            assert refused(f"--model={near}", "--prompt=Hi") == (
                f"{near} is not a model; did you mean {folder}/model?"
            )

    def test_outputs_that_would_be_lost_or_never_end(self, folder, tmp_path):
        source = write_lines(tmp_path / "in.jsonl", [{"prompt": "Hi"}])
        (tmp_path / "link.jsonl").symlink_to(source)
        args = (f"--model={folder}/model", f"--input={source}", "--max_new_tokens=4")
        for target, message in (
            (source, "in.jsonl is the input; choose another --output"),
            (tmp_path / "link.jsonl", "link.jsonl is the input; choose another"),
            (
                folder / "model" / "model_config.json",
                "was made; choose another --output",
            ),
            (folder, "(Is a directory); choose another place"),
            (source / "out.jsonl", "choose another place"),
            ("/dev/zero", "/dev/zero is not a plain file; choose another --output"),
        ):
            said = refused(*args, f"--output={target}")
            assert message in said and "remove" not in said
        assert read_lines(source) == [{"prompt": "Hi"}]

    def test_no_chat_template(self, folder, tmp_path):
        model = tmp_path / "model"
        shutil.copytree(folder / "model", model)
        file = model / "tokenizer_config.json"
        config = json.loads(file.read_text())
        del config["chat_template"]
        file.write_text(json.dumps(config))
        args = (f"--model={model}", "--prompt=Hi")
        assert "has no chat template" in refused(*args, "--chat")
        assert "a system message needs a chat template" in refused(*args, "--system=s")
        plan = make_plan(Options(str(model)))
        assert not plan.is_chat
        with pytest.raises(UserError, match="messages need a chat template"):
            plan.encode([{"role": "user", "content": "Hi"}])


class TestPlan:
    def test_prompts(self, tokenizer):
        plan = make_plan(Options("demo_teacher", system="Be brief."))
        user = {"role": "user", "content": "Hi"}
        system = {"role": "system", "content": "Be brief."}
        whole = encode_prompt(tokenizer, [system, user]).tolist()
        assert plan.encode("Hi").tolist() == plan.encode([user]).tolist() == whole
        own = [{"role": "system", "content": "Be long."}, user]
        assert plan.encode(own).tolist() == encode_prompt(tokenizer, own).tolist()
        raw = make_plan(Options("demo_teacher", chat=False)).encode("Hi").tolist()
        assert raw == tokenizer("Hi")["input_ids"]

    def test_an_answer_ends_with_the_tokens_of_model_and_tokenizer(self):
        plan = make_plan(Options("demo_teacher"))
        config = dataclasses.replace(plan.config, eos_token_ids=(7,))
        assert dataclasses.replace(plan, config=config).eos_ids == (5, 7)

    def test_a_draft_with_fewer_positions_is_told_of_once(
        self, folder, tmp_path, caplog
    ):
        draft = tmp_path / "draft"
        draft.mkdir()
        config = dataclasses.replace(CONFIG, max_position_embeddings=40)
        text = json.dumps(orbax_io.model_config_to_dict(config))
        draft.joinpath(orbax_io.CONFIG_FILE).write_text(text)
        options = Options(f"{folder}/model", str(draft), max_new_tokens=34)
        plan = make_plan(options)
        assert plan.encode("Hi").size == 6
        assert not caplog.messages
        plan = make_plan(dataclasses.replace(options, max_new_tokens=35))
        plan.encode("Hi")
        plan.encode("Hi")
        assert caplog.messages == [
            f"the draft {draft} knows 40 positions (max_position_embeddings); beyond them "
            "fewer of its tokens may be accepted"
        ]

    def test_models_without_attention_have_no_positions(self):
        plan = make_plan(Options("demo_teacher", max_new_tokens=5000))
        config = dataclasses.replace(tiny.CONFIGS["pure"], vocab_size=512)
        assert dataclasses.replace(plan, config=config).encode("Hi").size


def test_as_a_command(tmp_path, folder):
    """A line about the model, one per bad line, one about speed; exit status 1."""
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "Hi"}, {"text": "Hi"}])
    target = tmp_path / "out" / "answers.jsonl"
    args = [f"--model={folder}/model", f"--input={source}", f"--output={target}"]
    done = subprocess.run(
        [sys.executable, "-m", "mil_jax.generate", *args, "--max_new_tokens=4"],
        cwd=ROOT,
        env=process.environment("") | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    lines = done.stderr.replace("\r", "\n").splitlines()
    messages = [
        line for line in lines if line.strip() and not line.startswith("generate:")
    ]
    assert messages[0].startswith(f"{source}, line 2: unknown form with the keys text")
    assert messages[1].startswith(f"reading {folder}/model; ")
    assert messages[2].startswith("prompt 6 tokens at ")
    assert messages[3:] == [
        f"1 of 2 lines of {target} have an error instead of an answer"
    ]
    assert [set(r) for r in read_lines(target)] == [
        {"prompt", "answer", "finish"},
        {"line", "error"},
    ]


def test_sampling_is_passed_on():
    args = ("--model=demo_teacher", "--temperature=0.5", "--top_k=3", "--top_p=0.9")
    options = command.read_options(commands.parse(command, *args))
    assert options.sampling == Sampling(temperature=0.5, top_k=3, top_p=0.9)
