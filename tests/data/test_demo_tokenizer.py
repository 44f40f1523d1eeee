"""Unit and property tests of the demo tokenizer."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mil_jax
from mil_jax.data import chat, demo_tokenizer, demo_world

COMMITTED = Path(mil_jax.__file__).parent / "assets" / "demo_teacher"


@pytest.fixture(scope="module")
def tokenizer():
    return chat.load_tokenizer(COMMITTED)


def test_rebuild_gives_the_committed_bytes(tmp_path, capsys):
    demo_world.main(["--build-tokenizer", str(tmp_path)])
    assert "wrote the demo tokenizer" in capsys.readouterr().out
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"tokenizer.json", "tokenizer_config.json"}
    for name in written:
        assert (tmp_path / name).read_bytes() == (COMMITTED / name).read_bytes(), name


def test_vocabulary(tokenizer):
    assert len(tokenizer) == demo_tokenizer.VOCAB_SIZE == 512
    ids = tokenizer.convert_tokens_to_ids(list(demo_tokenizer.SPECIAL_TOKENS))
    assert ids == [0, 1, 2, 3, 4, 5]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id) == (0, 1)
    assert tokenizer.eos_token == "<|end|>"


def test_digits_are_single_tokens(tokenizer):
    ids = tokenizer("12 + 345 = 357.", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([i]) for i in ids] == [
        *("1", "2", " +", " ", "3", "4", "5", " =", " ", "3", "5", "7", ".")
    ]


def test_loads_next_to_a_llama_config(tokenizer, tmp_path):
    for path in COMMITTED.glob("tokenizer*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 512}')
    beside = chat.load_tokenizer(tmp_path)
    text = "One day  Tom went\nto 42 lakes."
    assert beside(text)["input_ids"] == tokenizer(text)["input_ids"]


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_round_trips(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_chats_fit_in_128_tokens(tokenizer):
    lengths = [
        len(chat.encode_chat(tokenizer, demo_world.task(split, i)).tokens)
        for split in demo_world.SPLITS
        for i in range(1000)
    ]
    assert max(lengths) <= 128
    assert sum(length <= 80 for length in lengths) > 0.8 * len(lengths)


def test_length_table_names_every_family(tmp_path):
    table = demo_tokenizer.length_table(COMMITTED, count=3)
    assert [line.split()[0] for line in table.splitlines()] == [
        *("family", *demo_world.FAMILIES, "all")
    ]
