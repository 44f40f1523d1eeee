"""Unit tests of chat encoding: expected tokens and masks are written out by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

import mil_jax
from mil_jax.data import chat, demo_world
from mil_jax.errors import UserError

FOLDER = Path(mil_jax.__file__).parent / "assets" / "demo_teacher"

ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token "
    "+ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}"
    "{{ m['content'] + eos_token + ' ' }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}"
    "{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
LAST_ONLY = (
    "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
THINKING = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>think:' }}{% endif %}"
)


@pytest.fixture
def tokenizer():
    return chat.load_tokenizer(FOLDER)


class SlowTokenizer:
    """The same tokenizer without offsets, as slow tokenizers are."""

    is_fast = False

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __call__(self, text, **kwargs):
        assert "return_offsets_mapping" not in kwargs
        return self._tokenizer(text, **kwargs)

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


def _turns(*contents, system=None):
    roles = ("user", "assistant") * len(contents)
    messages = [
        {"role": r, "content": c} for r, c in zip(roles, contents, strict=False)
    ]
    return ([{"role": "system", "content": system}] if system else []) + messages


THREE_TURNS = _turns(
    *("Add 1 and 2.", "1 + 2 = 3.", "Reverse cat, dog.", "dog, cat."),
    *("What is 9 - 9?", "9 - 9 = 0."),
    system="Be short.",
)
# Every token of the rendered chat; answers (with a loss) stand in lines of their own.
PROMPT_1 = "<|bos|> <|system|> B e _sh ort . <|end|> <|user|> A d d _ 1 _and _ 2 . "
PROMPT_1 += "<|end|> <|assistant|>"
ANSWER_1 = "1 _+ _ 2 _= _ 3 . <|end|>"
PROMPT_2 = "<|user|> Reverse _cat , _dog . <|end|> <|assistant|>"
ANSWER_2 = "d o g , _cat . <|end|>"
PROMPT_3 = "<|user|> What _is _ 9 _- _ 9 ? <|end|> <|assistant|>"
ANSWER_3 = "9 _- _ 9 _= _ 0 . <|end|>"


def _expected(*pieces):
    """Returns tokens and mask; "_" stands for a space, "$" for a newline."""
    tokens, mask = [], []
    for text, has_loss in pieces:
        tokens += [piece.replace("_", " ").replace("$", "\n") for piece in text.split()]
        mask += [has_loss] * len(text.split())
    return tokens, mask


def _pieces(tokenizer, tokens):
    return [tokenizer.decode([int(t)]) for t in tokens]


class TestEncodeChat:
    @pytest.mark.parametrize("is_slow", [False, True])
    def test_three_turns_token_by_token(self, tokenizer, is_slow):
        tokens, mask = _expected(
            *((PROMPT_1, False), (ANSWER_1, True), (PROMPT_2, False)),
            *((ANSWER_2, True), (PROMPT_3, False), (ANSWER_3, True)),
        )
        encoder = SlowTokenizer(tokenizer) if is_slow else tokenizer
        example = chat.encode_chat(encoder, THREE_TURNS)
        assert _pieces(tokenizer, example.tokens) == tokens
        assert example.loss_mask.tolist() == mask
        assert example.tokens.dtype == np.int32 and example.loss_mask.dtype == bool

    def test_prompt_is_the_part_before_the_answer(self, tokenizer):
        for index in range(50):
            conversation = demo_world.task("train", index)
            whole = chat.encode_chat(tokenizer, conversation)
            prompt = chat.encode_prompt(tokenizer, conversation[:-1])
            answer = whole.tokens[len(prompt) :]
            assert whole.tokens[: len(prompt)].tolist() == prompt.tolist()
            assert whole.loss_mask[len(prompt) :].all()
            text = conversation[-1]["content"] + "<|end|>"
            assert tokenizer.decode(answer) == text

    def test_zephyr_template_ends_answers_at_eos(self, tokenizer):
        tokenizer.chat_template = ZEPHYR
        example = chat.encode_chat(tokenizer, _turns("hat?", "hen.", "cup?", "cow."))
        tokens, mask = _expected(
            ("<|user|> $ h at ? <|end|> $ <|assistant|>", False),
            ("$ he n . <|end|>", True),
            ("$ <|user|> $ c up ? <|end|> $ <|assistant|>", False),
            ("$ c ow . <|end|>", True),
            ("$", False),
        )
        assert _pieces(tokenizer, example.tokens) == tokens
        assert example.loss_mask.tolist() == mask

    def test_mistral_template_without_generation_prompt(self, tokenizer):
        tokenizer.chat_template = MISTRAL
        example = chat.encode_chat(tokenizer, _turns("ox", "12", "ow", "34"))
        answers = _pieces(tokenizer, example.tokens[example.loss_mask])
        assert answers == ["1", "2", "<|end|>", "3", "4", "<|end|>"]
        with pytest.raises(UserError, match=r"turns \[system, user\]: Only user and"):
            chat.encode_prompt(tokenizer, _turns("ox", system="no"))

    def test_template_without_special_tokens_keeps_all_it_writes(self, tokenizer):
        tokenizer.chat_template = PLAIN
        example = chat.encode_chat(tokenizer, _turns("1", "2", "3", "4"))
        answers = _pieces(tokenizer, example.tokens[example.loss_mask])
        assert answers == ["2", "\n", "4", "\n"]

    def test_token_across_the_end_of_an_answer_has_no_loss(self, tokenizer):
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}"
        tokenizer.chat_template += "{% endfor %}"
        example = chat.encode_chat(tokenizer, _turns("hat", "1", "the"))
        assert _pieces(tokenizer, example.tokens)[-3:] == ["1", " the", " "]
        assert example.loss_mask.tolist()[-3:] == [True, False, False]

    def test_unicode_answers_are_covered_whole(self, tokenizer):
        example = chat.encode_chat(tokenizer, _turns("é 漢", "¿漢🙂 é?", "ß", "ok 字"))
        answers = tokenizer.decode(example.tokens[example.loss_mask])
        assert answers == "¿漢🙂 é?<|end|>ok 字<|end|>"

    def test_tokenizer_that_adds_bos_does_not_double_it(self, tokenizer):
        plain = chat.encode_chat(tokenizer, THREE_TURNS)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", 1)]
        )
        assert tokenizer("hat")["input_ids"][0] == 1
        example = chat.encode_chat(tokenizer, THREE_TURNS)
        assert example.tokens.tolist() == plain.tokens.tolist()
        assert (example.tokens == 1).sum() == 1
        prompt = chat.encode_prompt(tokenizer, THREE_TURNS[:-1])
        assert (prompt == 1).sum() == 1

    def test_max_length_keeps_the_start(self, tokenizer):
        whole = chat.encode_chat(tokenizer, THREE_TURNS)
        cut = chat.encode_chat(tokenizer, THREE_TURNS, max_length=25)
        assert cut.tokens.tolist() == whole.tokens[:25].tolist()
        assert cut.loss_mask.tolist() == whole.loss_mask[:25].tolist()

    def test_slow_and_fast_masks_agree(self, tokenizer):
        slow = SlowTokenizer(tokenizer)
        for index in range(30):
            conversation = demo_world.task("test", index)
            a = chat.encode_chat(tokenizer, conversation)
            b = chat.encode_chat(slow, conversation)
            assert a.tokens.tolist() == b.tokens.tolist()
            assert a.loss_mask.tolist() == b.loss_mask.tolist()


class TestEncodePair:
    def test_only_the_last_answer_has_a_loss(self, tokenizer):
        prompt = _turns("hat", "cup", "hen")
        pair = chat.encode_pair(tokenizer, prompt, "12", "345")
        chosen, rejected = pair
        assert _pieces(tokenizer, chosen.tokens[chosen.loss_mask]) == [
            *("1", "2", "<|end|>")
        ]
        assert _pieces(tokenizer, rejected.tokens[rejected.loss_mask]) == [
            *("3", "4", "5", "<|end|>")
        ]
        start = int(chosen.loss_mask.argmax())
        expected = chat.encode_prompt(tokenizer, prompt)
        assert chosen.tokens[:start].tolist() == expected.tolist()
        assert rejected.tokens[:start].tolist() == expected.tolist()


class TestErrors:
    @pytest.mark.parametrize(
        "template, message",
        [
            (LAST_ONLY, r"at message 1 \(assistant\) it changes once later turns"),
            (
                THINKING,
                r"at message 1 \(assistant\) its generation prompt is no prefix",
            ),
        ],
    )
    def test_rewriting_template(self, tokenizer, template, message):
        tokenizer.chat_template = template
        with pytest.raises(UserError, match=message):
            chat.encode_chat(tokenizer, THREE_TURNS[1:])

    def test_slow_tokenizer_that_merges_across_the_border(self, tokenizer):
        tokenizer.chat_template = PLAIN.replace("': '", "':'").replace("t: '", "t:'")
        messages = _turns("1", " owl")
        slow = SlowTokenizer(tokenizer)
        assert chat.encode_chat(slow, messages).loss_mask.sum() == 2
        tokenizer.chat_template = PLAIN
        with pytest.raises(UserError, match="merges tokens across the border"):
            chat.encode_chat(slow, _turns("1", "owl"))

    @pytest.mark.parametrize(
        "messages, message",
        [
            ([], "has no messages"),
            ([{"role": "tool", "content": "x"}], "message 0 has role 'tool'"),
            ([{"role": "user", "content": None}], r"message 0 \(user\) has no text"),
            ([{"role": "assistant", "content": "x"}], "message 0 is an assistant turn"),
        ],
    )
    def test_malformed_messages(self, tokenizer, messages, message):
        with pytest.raises(UserError, match=message):
            chat.encode_chat(tokenizer, messages)

    def test_prompt_with_an_answer(self, tokenizer):
        with pytest.raises(UserError, match="ends in an assistant turn"):
            chat.encode_prompt(tokenizer, _turns("a", "b"))


class TestLoadTokenizer:
    def test_missing_folder(self, tmp_path):
        with pytest.raises(UserError, match="gone does not exist; give one with"):
            chat.load_tokenizer(tmp_path / "gone")

    def test_folder_without_tokenizer(self, tmp_path):
        with pytest.raises(UserError, match="cannot load a tokenizer from folder"):
            chat.load_tokenizer(tmp_path)

    @pytest.mark.parametrize(
        "key, message",
        [("chat_template", "has no chat template"), ("eos_token", "no EOS token")],
    )
    def test_incomplete_for_chats(self, tmp_path, key, message):
        config = json.loads((FOLDER / "tokenizer_config.json").read_text())
        del config[key]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "tokenizer.json").write_bytes(
            (FOLDER / "tokenizer.json").read_bytes()
        )
        with pytest.raises(UserError, match=message):
            chat.load_tokenizer(tmp_path)
        assert len(chat.load_tokenizer(tmp_path, needs_chat_template=False)) == 512
