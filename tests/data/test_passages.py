"""Unit tests of chats from text: forms, the split, limits and bad files."""

import json

import pytest

from mil_jax.checkpoint import models
from mil_jax.data import passages, sources
from mil_jax.data.chat import encode_prompt, load_tokenizer
from mil_jax.errors import UserError


def test_text_is_cut_into_passages(tmp_path):
    words = [f"w{i}" for i in range(passages.PASSAGE_WORDS + 100)]
    file = tmp_path / "notes.txt"
    file.write_text("\n".join(words))
    first, second = passages.read([str(file)])
    cut, end = passages.PROMPT_WORDS, passages.PASSAGE_WORDS
    assert [m["role"] for m in first] == ["user", "assistant"]
    assert first[0]["content"] == " ".join(words[:cut])
    assert first[1]["content"] == " ".join(words[cut:end])
    assert second[0]["content"] == " ".join(words[end : end + cut])
    assert second[1]["content"].endswith("w259")


def test_too_short_a_rest_is_left_out(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("word " * (passages.PASSAGE_WORDS + passages.PROMPT_WORDS))
    assert len(passages.read([str(file)])) == 1
    file.write_text("word " * 10)
    assert passages.read([str(file)]) == []


def test_of_chats_the_first_turn_is_kept(tmp_path):
    turns = ["system", "user", "assistant", "user", "assistant"]
    row = {"messages": [{"role": r, "content": f"{r}{i}"} for i, r in enumerate(turns)]}
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps(row) + "\n" + '{"question": "a", "answer": "b"}\n')
    first, second = passages.read([str(file)])
    assert [m["content"] for m in first] == ["system0\nuser1", "assistant2"]
    assert [m["content"] for m in second] == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), (b"\xff\xfe caf\xe9", "is not UTF-8")],
)
def test_bad_text(tmp_path, content, message):
    file = tmp_path / "notes.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        passages.read([str(file)])
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_no_prompt_is_in_both_parts():
    chats = sources.conversations("demo:train:0:600")
    parts = passages.split([*chats, *chats])
    trained = {chat[0]["content"] for chat in parts.train}
    held_out = {chat[0]["content"] for chat in parts.held_out}
    assert not trained & held_out
    assert len(parts.train) + len(parts.held_out) == 1200
    assert 0.04 < len(parts.held_out) / 1200 < 0.14


def test_short_prompts():
    tokenizer = load_tokenizer(models.resolve("demo_teacher"))
    chats = list(sources.conversations("demo:train:0:60"))
    sizes = [len(encode_prompt(tokenizer, chat[:-1])) for chat in chats]
    limit = sorted(sizes)[30]
    found = passages.short(chats, tokenizer, limit)
    assert found == [c for c, n in zip(chats, sizes, strict=True) if n <= limit]


def test_written_chats_are_read_again(tmp_path):
    chats = [*sources.conversations("demo:train:0:9")]
    chats.append(
        [{"role": "user", "content": "é\n"}, {"role": "assistant", "content": ""}]
    )
    path = tmp_path / "new" / "chats.jsonl"
    passages.write(path, chats)
    assert list(sources.conversations(str(path))) == chats
    assert [p.name for p in path.parent.iterdir()] == ["chats.jsonl"]
