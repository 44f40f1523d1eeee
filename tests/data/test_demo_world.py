"""Unit and property tests of the demo world: right answers, wrong answers, splits."""

import hashlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mil_jax.data import demo_world
from mil_jax.data.demo_tasks import COLOURS, NAMES, OPPOSITES, PLACES, WORDS, Draw
from mil_jax.errors import UserError


def _last_turn(family, index, split="train"):
    conversation = demo_world.sample(split, index, family).conversation
    return conversation[-2]["content"], conversation[-1]["content"]


def _words_of(prompt):
    """The listed words of a prompt: the longest run of words joined by commas."""
    prompt = re.sub(", (which|how) .*", "", prompt)
    return max(re.findall(r"\w+(?:, \w+)+", prompt), key=len).split(", ")


def _numbers_of(prompt):
    return [int(n) for n in re.findall(r"\d+", prompt)]


def _solve(family, prompt):
    """Answers a prompt by reading it again, without the code of the generator."""
    if family in ("addition", "subtraction"):
        a, b = _numbers_of(prompt)
        if prompt.startswith("Take"):
            a, b = b, a
        if family == "addition":
            return f"{a} + {b} = {a + b}."
        return f"{a} - {b} = {a - b}."
    if family == "compare":
        low, high = sorted(_numbers_of(prompt))
        if "larger" in prompt:
            return f"{high} is larger than {low}."
        return f"{low} is smaller than {high}."
    if family == "sort_numbers":
        high_first = "from high" in prompt or "largest first" in prompt
        numbers = sorted(_numbers_of(prompt), reverse=high_first)
        lead = "From high to low" if high_first else "From low to high"
        return f"{lead}: {', '.join(map(str, numbers))}."
    if family == "copy":
        return f"The list is {', '.join(_words_of(prompt))}."
    if family == "reverse":
        return f"Reversed: {', '.join(reversed(_words_of(prompt)))}."
    if family == "sort_words":
        return f"From a to z: {', '.join(sorted(_words_of(prompt)))}."
    if family == "count":
        target = re.search(r"is (\w+) in|word (\w+):|say (\w+)\?|see (\w+)\?", prompt)
        (word,) = [w for w in target.groups() if w]
        times = _words_of(prompt).count(word)
        return f"The list has {word} {times} time{'s' * (times != 1)}."
    if family == "position":
        place = re.search("first|second|last", prompt).group()
        index = {"first": 0, "second": 1, "last": -1}[place]
        return f"The {place} word is {_words_of(prompt)[index]}."
    if family == "lookup":
        name = re.search(r"(?:does|me what|Find) (\w+)(?: likes?|\.)", prompt)[1]
        colour = re.search(rf"{name}(?: likes|:) (\w+)", prompt)[1]
        return f"{name} likes {colour}."
    raise AssertionError(family)


class TestAnswers:
    @pytest.mark.parametrize(
        "family",
        [
            "addition",
            "subtraction",
            "compare",
            "sort_numbers",
            "copy",
            "reverse",
            "sort_words",
            "count",
            "position",
            "lookup",
        ],
    )
    def test_recomputed_from_the_prompt(self, family):
        for index in range(300):
            prompt, answer = _last_turn(family, index)
            assert answer == _solve(family, prompt), prompt

    def test_opposites_are_symmetric_and_used(self):
        assert len(OPPOSITES) == 32
        assert all(OPPOSITES[OPPOSITES[word]] == word for word in OPPOSITES)
        assert OPPOSITES["hot"] == "cold"
        prompt, answer = _last_turn("opposites", 0)
        asked = [w for w in re.findall(r"\w+", prompt) if w in OPPOSITES]
        told = re.findall(r"opposite of (\w+) is (\w+)", answer)
        assert [a for a, _ in told] == asked
        assert all(OPPOSITES[a] == b for a, b in told)

    def test_stories_use_every_fact_of_the_prompt(self):
        for index in range(100):
            prompt, answer = _last_turn("story", index)
            for fact in re.findall(r"[A-Z]?\w+", prompt):
                if fact in (*NAMES, *PLACES, *COLOURS):
                    assert fact in answer, (fact, prompt)

    def test_one_prompt_has_one_answer(self):
        answers = {}
        for index in range(20_000):
            conversation = demo_world.task("train", index)
            question = str(conversation[:-1])
            assert answers.setdefault(question, conversation[-1]) == conversation[-1]

    def test_follow_up_refers_to_the_first_list(self):
        for index in range(200):
            messages = demo_world.sample("test", index, "follow_up").conversation
            words = _words_of(messages[-4]["content"])
            question, answer = messages[-2]["content"], messages[-1]["content"]
            if question in ("Now reverse it.", "Say it backwards."):
                assert answer == f"Reversed: {', '.join(words[::-1])}."
            elif question == "How many words is that?":
                assert answer == f"The list has {len(words)} words."
            else:
                which = words[0] if "first" in question else words[-1]
                assert answer.endswith(f" {which}.")


class TestCheck:
    def test_only_the_exact_answer_passes(self):
        conversation = demo_world.task("train", 3)
        right = conversation[-1]["content"]
        assert demo_world.check(conversation, right)
        assert demo_world.check(conversation, f" {right}\n")
        assert not demo_world.check(conversation, right[:-1])
        assert not demo_world.check(conversation, right.upper())

    def test_prompt_without_answer_is_an_error(self):
        with pytest.raises(UserError, match="does not end in an assistant turn"):
            demo_world.check(demo_world.task("train", 3)[:-1], "x")

    @pytest.mark.parametrize("family", demo_world.FAMILIES)
    def test_wrong_answers_are_wrong_stable_and_varied(self, family):
        for index in range(50):
            conversation = demo_world.sample("train", index, family).conversation
            wrong = [demo_world.wrong_answer(conversation, seed) for seed in range(8)]
            assert not any(demo_world.check(conversation, answer) for answer in wrong)
            assert wrong[0] == demo_world.wrong_answer(conversation, 0)
            assert len(set(wrong)) > 1


class TestSplits:
    def test_prompts_of_test_never_occur_in_train(self):
        def prompts(split, count):
            return {str(demo_world.task(split, i)[:-1]) for i in range(count)}

        def questions(split, count):
            follow_ups = (
                "Now reverse it.|Say it backwards.|Which word|How many words is"
            )
            return {
                message["content"]
                for i in range(count)
                for message in demo_world.task(split, i)
                if message["role"] == "user"
                and not re.match(follow_ups, message["content"])
            }

        train, test = prompts("train", 10_000), prompts("test", 3_000)
        assert len(test) > 2_000
        assert not train & test
        assert not questions("train", 10_000) & questions("test", 3_000)

    def test_a_list_stays_in_its_split_whatever_is_asked_about_it(self):
        lists = {
            split: {
                tuple(_words_of(_last_turn(family, i, split)[0]))
                for family in ("copy", "reverse", "position")
                for i in range(1500)
            }
            for split in demo_world.SPLITS
        }
        assert not lists["train"] & lists["test"]

    @pytest.mark.parametrize("family", ["addition", "compare"])
    def test_numbers_stay_in_their_split_in_any_order_and_wording(self, family):
        pairs = {
            split: {
                tuple(sorted(_numbers_of(_last_turn(family, i, split)[0])))
                for i in range(1500)
            }
            for split in demo_world.SPLITS
        }
        assert not pairs["train"] & pairs["test"]

    def test_split_hash_is_stable(self):
        digest = hashlib.blake2b(b"words ant bat", digest_size=8).digest()
        is_test = int.from_bytes(digest, "big") % 10 == 0
        assert (demo_world.split_of("words ant bat") == "test") == is_test
        share = [demo_world.split_of(f"add {i}") for i in range(5000)].count("test")
        assert 400 < share < 600

    def test_tasks_are_pinned(self):
        """The stream must not move between versions: trained weights depend on it."""
        assert demo_world.task("train", 0) == PINNED["train"]
        assert demo_world.task("test", 7) == PINNED["test"]

    @settings(max_examples=50, deadline=None)
    @given(st.sampled_from(demo_world.SPLITS), st.integers(0, 10**9))
    def test_random_access_is_pure(self, split, index):
        conversation = demo_world.task(split, index)
        assert conversation == demo_world.task(split, index)
        roles = [m["role"] for m in conversation if m["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)

    def test_every_family_occurs(self):
        seen = {demo_world.sample("test", i).family for i in range(1000)}
        assert seen == set(demo_world.FAMILIES)


class TestErrors:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            (("valid", 0), "demo split 'valid' does not exist"),
            (("train", -1), "index -1 is negative"),
            (
                ("train", 0, "poems"),
                "family 'poems' does not exist; families: addition",
            ),
        ],
    )
    def test_message(self, arguments, message):
        with pytest.raises(UserError, match=message):
            demo_world.sample(*arguments)

    def test_wrong_answer_of_a_foreign_chat(self):
        chat = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "Hm!"},
        ]
        with pytest.raises(UserError, match="no slip fits"):
            demo_world.wrong_answer(chat, 0)


def test_draw_some_returns_different_items():
    for seed in range(100):
        items = Draw("x", seed).some(WORDS, 5)
        assert len(set(items)) == 5


PINNED = {
    "train": [
        {"role": "user", "content": "Give me the opposites of small and dry."},
        {
            "role": "assistant",
            "content": "The opposite of small is big, the opposite of dry is wet.",
        },
    ],
    "test": [
        {"role": "user", "content": "Say these words backwards: dog, yak, hat, jam."},
        {"role": "assistant", "content": "Reversed: jam, hat, yak, dog."},
    ],
}
