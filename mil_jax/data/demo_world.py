"""A small world of chat tasks with exact answers, for demos, tests and quick runs.

`task(split, index)` returns one conversation out of an endless, seeded stream with
random access. Every task states its own facts (numbers, words, names), and exactly one
answer is right. The splits are disjoint in their facts: each content (say, one list of
words) belongs to "train" or "test" by a stable hash, whatever the family or the
phrasing of the question.

To write the tokenizer of this world:

    python -m mil_jax.data.demo_world --build-tokenizer DIR
"""

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

from mil_jax.data.demo_tasks import (
    ANIMALS,
    COLOURS,
    NAMES,
    OPPOSITES,
    PLACES,
    SINGLE_FAMILIES,
    WORDS,
    Draw,
    Turn,
    join,
    stable_hash,
    word_list,
    words_content,
)
from mil_jax.data.types import Conversation
from mil_jax.errors import UserError

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
TEST_SHARE = 10  # one content in this many belongs to the test split
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer in one line.",
    "Be short and exact.",
)


class Sample(NamedTuple):
    """A conversation and the name of the family that it was drawn from."""

    family: str
    conversation: Conversation


def split_of(content: str) -> Split:
    """Returns the split that owns a content."""
    return "test" if stable_hash(content) % TEST_SHARE == 0 else "train"


# Two of these fit in one chat of at most 128 tokens.
_SHORT = tuple(
    name
    for name in SINGLE_FAMILIES
    if name not in ("story", "opposites", "sort_numbers")
)
# Families drawn more often than once in a round: the two sums and the longest answers.
_WEIGHTS = {"addition": 2, "subtraction": 2, "story": 3, "two_tasks": 2, "follow_up": 2}


def _owned_turn(draw: Draw, split: Split, family: str) -> Turn:
    """Draws turns of a family until one belongs to the split."""
    while True:
        turn = SINGLE_FAMILIES[family](draw)
        if split_of(turn.content) == split:
            return turn


def _two_tasks(draw: Draw, split: Split) -> list[Turn]:
    """Two short tasks that have nothing to do with each other, one after the other."""
    return [_owned_turn(draw, split, family) for family in draw.some(_SHORT, 2)]


def _follow_up(draw: Draw, split: Split) -> list[Turn]:
    """A list to keep in mind, then a question about it."""
    while True:
        words = word_list(draw, 3, 5)
        content = words_content(words)
        if split_of(content) == split:
            break
    opening = draw.pick(
        (
            f"Keep this list in mind: {join(words)}.",
            f"Repeat this list: {join(words)}.",
            f"My list is {join(words)}. What is my list?",
        )
    )
    question, answer = draw.pick(
        (
            ("Now reverse it.", f"Reversed: {join(words[::-1])}."),
            ("Say it backwards.", f"Reversed: {join(words[::-1])}."),
            ("Which word is first?", f"The first word is {words[0]}."),
            ("Which word is last?", f"The last word is {words[-1]}."),
            ("How many words is that?", f"The list has {len(words)} words."),
        )
    )
    return [
        Turn(content, opening, f"The list is {join(words)}."),
        Turn(content, question, answer),
    ]


CHAT_FAMILIES: dict[str, Callable[[Draw, Split], list[Turn]]] = {
    "two_tasks": _two_tasks,
    "follow_up": _follow_up,
}
FAMILIES = (*SINGLE_FAMILIES, *CHAT_FAMILIES)
_ROUND = tuple(name for name in FAMILIES for _ in range(_WEIGHTS.get(name, 1)))


def sample(split: Split, index: int, family: str | None = None) -> Sample:
    """Returns conversation `index` of a split and its family.

    Args:
        split: "train" or "test".
        index: Any int >= 0; the same index always gives the same conversation.
        family: Draw from this family only (another stream than that of all families).

    Raises:
        UserError: The split, index or family does not exist.
    """
    if split not in SPLITS:
        raise UserError(f"demo split {split!r} does not exist; use 'train' or 'test'")
    if index < 0:
        raise UserError(f"demo task index {index} is negative; indices start at 0")
    if family is not None and family not in FAMILIES:
        raise UserError(
            f"demo family {family!r} does not exist; families: {', '.join(FAMILIES)}"
        )
    draw = Draw(split, family or "all", index)
    name = family or draw.pick(_ROUND)
    messages: Conversation = []
    if draw.below(10) == 0:
        messages.append({"role": "system", "content": draw.pick(SYSTEM_PROMPTS)})
    if name in CHAT_FAMILIES:
        turns = CHAT_FAMILIES[name](draw, split)
    else:
        turns = [_owned_turn(draw, split, name)]
    for turn in turns:
        messages.append({"role": "user", "content": turn.prompt})
        messages.append({"role": "assistant", "content": turn.answer})
    return Sample(name, messages)


def task(split: Split, index: int) -> Conversation:
    """Returns conversation `index` of a split, ending in the right answer."""
    return sample(split, index).conversation


def right_answer(conversation: Conversation) -> str:
    """Returns the last answer of a conversation made by `task`."""
    if not conversation or conversation[-1]["role"] != "assistant":
        raise UserError(
            "the conversation does not end in an assistant turn; pass the whole "
            "conversation that `task` returned"
        )
    return conversation[-1]["content"]


def check(conversation: Conversation, answer: str) -> bool:
    """Returns whether `answer` is the last answer of `conversation`, word for word.

    White space around the answer does not count.
    """
    return answer.strip() == right_answer(conversation)


_GROUPS = (WORDS, NAMES, ANIMALS, COLOURS, PLACES)


def wrong_answer(conversation: Conversation, seed: int) -> str:
    """Returns an answer of the right form with one slip in it.

    The slip is a number that is a little off, two neighbours of a list in the wrong
    order, or a word swapped for another of its kind.
    """
    right = right_answer(conversation)
    draw = Draw("wrong", seed, right)
    slips = [_wrong_number, _wrong_order, _wrong_word]
    for slip in draw.some(slips, len(slips)):
        wrong = slip(draw, right)
        if wrong != right:
            return wrong
    raise UserError(f"no slip fits the answer {right!r}; is it from the demo world?")


def _replace(text: str, match: re.Match[str], new: str) -> str:
    return text[: match.start()] + new + text[match.end() :]


def _wrong_number(draw: Draw, right: str) -> str:
    """Moves the last number (the result, where there is one) by 1 to 3."""
    numbers = list(re.finditer(r"\d+", right))
    if not numbers:
        return right
    off = draw.between(1, 3)
    value = int(numbers[-1].group())
    return _replace(right, numbers[-1], str(value - off if value > 3 else value + off))


def _wrong_order(draw: Draw, right: str) -> str:
    """Swaps two neighbours of the list in the answer."""
    found = re.search(r"(?:\w+, )+\w+(?=\.$)", right)
    if not found:
        return right
    items = found.group().split(", ")
    i = draw.below(len(items) - 1)
    items[i], items[i + 1] = items[i + 1], items[i]
    return _replace(right, found, join(items))


def _wrong_word(draw: Draw, right: str) -> str:
    """Swaps one known word for another one of its kind."""
    # Elsewhere, "day" or "high" belongs to the fixed part of the answer.
    opposites = right.startswith("The opposite of")
    groups = (tuple(OPPOSITES),) if opposites else _GROUPS
    spots = [
        (match, group)
        for match in re.finditer(r"[A-Za-z]{2,}", right)
        for group in groups
        if match.group() in group
    ]
    if not spots:
        return right
    match, group = draw.pick(spots)
    return _replace(right, match, draw.pick([w for w in group if w != match.group()]))


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the world's tokenizer or prints the lengths of its conversations."""
    from mil_jax.data import demo_tokenizer

    parser = argparse.ArgumentParser(description="Demo world tools.")
    parser.add_argument("--build-tokenizer", metavar="DIR", help="write the tokenizer")
    parser.add_argument("--lengths", metavar="DIR", help="token lengths per family")
    args = parser.parse_args(argv)
    if args.build_tokenizer:
        demo_tokenizer.build_tokenizer(args.build_tokenizer)
        print(f"wrote the demo tokenizer to {args.build_tokenizer}")
    if args.lengths:
        print(demo_tokenizer.length_table(args.lengths))


if __name__ == "__main__":
    main()
