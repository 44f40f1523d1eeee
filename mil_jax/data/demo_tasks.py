"""Task families of the demo world: what can be asked, and the right answer to it."""

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")

WORDS = tuple(
    "ant apple bat bee box cat cow cup dog drum duck egg elk fig fox frog goat hat hen "
    "ice ink jam jar key kite lamp lion map milk nest nut owl pear pen pig rat ring "
    "rope ship sun tea tree van wolf yak".split()
)
NAMES = tuple("Ann Ben Eva Ida Kim Leo Max Mia Rob Sam Sue Tom".split())
ANIMALS = tuple(
    "bear bird cat cow dog duck fox frog goat hen lion owl pig rat wolf".split()
)
COLOURS = tuple("black blue brown gray green pink red white".split())
PLACES = tuple("beach castle cave farm forest garden hill lake river village".split())
ITEMS = tuple("apples books cups eggs figs hats keys nuts pens rings".split())
OPPOSITES = {
    a: b
    for pair in (
        "hot cold,big small,old new,fast slow,up down,day night,wet dry,hard soft,"
        "high low,open closed,happy sad,light dark,left right,full empty,early late,"
        "rich poor"
    ).split(",")
    for a, b in (pair.split(), reversed(pair.split()))
}


class Turn(NamedTuple):
    """One question with its only right answer.

    Attributes:
        content: The facts of the question in a fixed form; decides the split.
        prompt: The question as the user words it.
        answer: The right answer.
    """

    content: str
    prompt: str
    answer: str


class Draw:
    """Seeded choices built on `random.Random.random`, whose stream never changes."""

    def __init__(self, *seed: object) -> None:
        """Seeds with the words of `seed`, joined."""
        self._random = random.Random(stable_hash("/".join(map(str, seed)))).random

    def below(self, n: int) -> int:
        """Returns an int in [0, n)."""
        return int(self._random() * n)

    def between(self, low: int, high: int) -> int:
        """Returns an int in [low, high]."""
        return low + self.below(high - low + 1)

    def pick(self, items: Sequence[T]) -> T:
        """Returns one of `items`."""
        return items[self.below(len(items))]

    def some(self, items: Sequence[T], count: int) -> list[T]:
        """Returns `count` different positions of `items` in random order."""
        pool = list(items)
        return [pool.pop(self.below(len(pool))) for _ in range(count)]


def stable_hash(text: str) -> int:
    """Returns 64 bits that depend on the text alone, in every process and version."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def join(items: Sequence[object]) -> str:
    """Returns "a, b, c"."""
    return ", ".join(map(str, items))


def word_list(draw: Draw, low: int, high: int) -> list[str]:
    """Returns `low` to `high` different words."""
    return draw.some(WORDS, draw.between(low, high))


def words_content(words: Sequence[str]) -> str:
    """Returns the content of all questions about this list of words."""
    return "words " + " ".join(words)


def _addition(draw: Draw) -> Turn:
    a, b = draw.between(1, 99), draw.between(1, 99)
    name, item = draw.pick(NAMES), draw.pick(ITEMS)
    prompt = draw.pick(
        (
            f"What is {a} + {b}?",
            f"What is {a} plus {b}?",
            f"Add {a} and {b}.",
            f"Find the sum of {a} and {b}.",
            f"{name} has {a} {item} and gets {b} more. How many {item} are there now?",
        )
    )
    return Turn(f"add {min(a, b)} {max(a, b)}", prompt, f"{a} + {b} = {a + b}.")


def _subtraction(draw: Draw) -> Turn:
    b, a = sorted((draw.between(1, 99), draw.between(1, 99)))
    name, item = draw.pick(NAMES), draw.pick(ITEMS)
    prompt = draw.pick(
        (
            f"What is {a} - {b}?",
            f"What is {a} minus {b}?",
            f"Take {b} away from {a}.",
            f"{name} has {a} {item} and loses {b}. How many {item} are left?",
        )
    )
    return Turn(f"subtract {a} {b}", prompt, f"{a} - {b} = {a - b}.")


def _compare(draw: Draw) -> Turn:
    a, b = draw.some(range(1, 100), 2)
    larger, prompt = draw.pick(
        (
            (True, f"Which number is larger, {a} or {b}?"),
            (True, f"Of {a} and {b}, which is larger?"),
            (False, f"Which number is smaller, {a} or {b}?"),
            (False, f"Of {a} and {b}, which is smaller?"),
        )
    )
    first, second = (max(a, b), min(a, b)) if larger else (min(a, b), max(a, b))
    word = "larger" if larger else "smaller"
    content = f"compare {min(a, b)} {max(a, b)}"
    return Turn(content, prompt, f"{first} is {word} than {second}.")


def _copy(draw: Draw) -> Turn:
    words = word_list(draw, 3, 7)
    prompt = draw.pick(
        (
            f"Repeat this list: {join(words)}.",
            f"Copy these words: {join(words)}.",
            f"Say these words again: {join(words)}.",
            f"My list is {join(words)}. What is my list?",
        )
    )
    return Turn(words_content(words), prompt, f"The list is {join(words)}.")


def _reverse(draw: Draw) -> Turn:
    words = word_list(draw, 3, 5)
    prompt = draw.pick(
        (
            f"Reverse this list: {join(words)}.",
            f"Say these words backwards: {join(words)}.",
            f"Write {join(words)} in reverse order.",
            f"Turn this list around: {join(words)}.",
        )
    )
    return Turn(words_content(words), prompt, f"Reversed: {join(words[::-1])}.")


def _sort_numbers(draw: Draw) -> Turn:
    numbers = draw.some(range(1, 31), draw.between(3, 5))
    text = join(numbers)
    descending, prompt = draw.pick(
        (
            (False, f"Sort these numbers: {text}."),
            (False, f"Sort {text} from low to high."),
            (False, f"Put these numbers in order: {text}."),
            (True, f"Sort {text} from high to low."),
            (True, f"Sort these numbers, largest first: {text}."),
        )
    )
    lead = "From high to low" if descending else "From low to high"
    answer = f"{lead}: {join(sorted(numbers, reverse=descending))}."
    return Turn(f"numbers {join(numbers)}", prompt, answer)


def _sort_words(draw: Draw) -> Turn:
    letters = draw.some(sorted({word[0] for word in WORDS}), draw.between(3, 4))
    words = [draw.pick([w for w in WORDS if w[0] == letter]) for letter in letters]
    prompt = draw.pick(
        (
            f"Sort these words: {join(words)}.",
            f"Put these words in the order of the alphabet: {join(words)}.",
            f"Sort {join(words)} by first letter.",
            f"Write {join(words)} from a to z.",
        )
    )
    return Turn(words_content(words), prompt, f"From a to z: {join(sorted(words))}.")


def _lookup(draw: Draw) -> Turn:
    count = draw.between(3, 4)
    names, values = draw.some(NAMES, count), draw.some(COLOURS, count)
    which = draw.below(count)
    name, value = names[which], values[which]
    likes = join([f"{n} likes {v}" for n, v in zip(names, values, strict=True)])
    pairs = join([f"{n}: {v}" for n, v in zip(names, values, strict=True)])
    prompt = draw.pick(
        (
            f"{likes}. What does {name} like?",
            f"{likes}. Tell me what {name} likes.",
            f"Here is what people like. {pairs}. What does {name} like?",
            f"Look at this list. {pairs}. Find {name}.",
        )
    )
    return Turn(f"likes {pairs}", prompt, f"{name} likes {value}.")


def _count(draw: Draw) -> Turn:
    kinds = draw.some(WORDS, draw.between(2, 3))
    target, total = kinds[0], draw.between(4, 6)
    words = [target, *(draw.pick(kinds) for _ in range(total - 1))]
    words = draw.some(words, total)
    times = words.count(target)
    prompt = draw.pick(
        (
            f"How many times is {target} in this list? {join(words)}.",
            f"Count the word {target}: {join(words)}.",
            f"Here is a list: {join(words)}. How often does it say {target}?",
            f"In {join(words)}, how many times do you see {target}?",
        )
    )
    unit = "time" if times == 1 else "times"
    answer = f"The list has {target} {times} {unit}."
    return Turn(words_content(words), prompt, answer)


def _position(draw: Draw) -> Turn:
    words = word_list(draw, 3, 6)
    place = draw.pick(("first", "second", "last"))
    prompt = draw.pick(
        (
            f"What is the {place} word of this list? {join(words)}.",
            f"Here is a list: {join(words)}. Which word is {place}?",
            f"Find the {place} word: {join(words)}.",
            f"Of {join(words)}, which is the {place} one?",
        )
    )
    word = words[{"first": 0, "second": 1, "last": -1}[place]]
    return Turn(words_content(words), prompt, f"The {place} word is {word}.")


def _story(draw: Draw) -> Turn:
    name, animal = draw.pick(NAMES), draw.pick(ANIMALS)
    place, colour = draw.pick(PLACES), draw.pick(COLOURS)
    mood = draw.pick(("happy", "sad", "funny"))
    prompt = draw.pick(
        (
            f"Tell a {mood} story about {name}, a {colour} {animal} and a {place}.",
            f"Write a {mood} story. Hero: {name}. Animal: {colour} {animal}. "
            f"Place: {place}.",
            f"I want a {mood} story where {name} meets a {colour} {animal} "
            f"at the {place}.",
            f"Make up a {mood} story with a {place}, a {colour} {animal} and {name}.",
        )
    )
    start = f"One day {name} went to the {place} and met a {colour} {animal}."
    end = {
        "happy": f"The {animal} was kind, and {name} gave it a home. They were happy.",
        "sad": f"The {animal} was lost and alone. {name} had to leave the {place} and "
        "was sad.",
        "funny": f"The {animal} took the hat of {name} and ran away. Now the {colour} "
        f"{animal} wears a hat.",
    }[mood]
    content = f"story {mood} {name} {animal} {place} {colour}"
    return Turn(content, prompt, f"{start} {end}")


def _opposites(draw: Draw) -> Turn:
    words = draw.some(tuple(OPPOSITES), draw.between(2, 3))
    listed = join(words[:-1]) + f" and {words[-1]}"
    prompt = draw.pick(
        (
            f"What are the opposites of {listed}?",
            f"Name the opposites of {listed}.",
            f"Give me the opposites of {listed}.",
            f"I say {listed}. What is the opposite of each word?",
        )
    )
    pairs = [f"the opposite of {word} is {OPPOSITES[word]}" for word in words]
    return Turn("opposites " + " ".join(words), prompt, f"{_capital(join(pairs))}.")


def _spell(draw: Draw) -> Turn:
    first, second = draw.some([word for word in WORDS if len(word) <= 4], 2)
    prompt = draw.pick(
        (
            f"Spell the words {first} and {second}.",
            f"How do you spell {first} and {second}?",
            f"Spell {first}, then spell {second}.",
        )
    )
    answer = (
        f"The word {first} is {'-'.join(first)}, and {second} is {'-'.join(second)}."
    )
    return Turn(f"spell {first} {second}", prompt, answer)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


SINGLE_FAMILIES: dict[str, Callable[[Draw], Turn]] = {
    "addition": _addition,
    "subtraction": _subtraction,
    "compare": _compare,
    "copy": _copy,
    "reverse": _reverse,
    "sort_numbers": _sort_numbers,
    "sort_words": _sort_words,
    "lookup": _lookup,
    "count": _count,
    "position": _position,
    "story": _story,
    "opposites": _opposites,
    "spell": _spell,
}
