"""The skills of TinyWorld that need no story: numbers, word lists, letters, word knowledge, manners.

Each function draws one `Question`. A training question never contains a reserved pair: neither its subject with its
wording, nor its two numbers or words. A test question always contains one.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from tinylm.dataset.tinyworld import phrases
from tinylm.dataset.tinyworld.plots import Question
from tinylm.dataset.tinyworld.words import (
    BY_WEIGHT,
    CATEGORIES,
    CATEGORY_OF,
    COLOURS,
    LIST_WORDS,
    NAMES,
    OPPOSITES,
    SPELLING_WORDS,
    a_or_an,
    capitalise,
    draw_pair,
    reserved,
    reserved_unordered,
)

ASSISTANT_NAME = "Tiny"


def number_pair(rng: random.Random, kind: str, held_out: bool = False) -> tuple[int, int]:
    """Two numbers up to 12 for "plus", or their sum and the second one for "minus"; reserved pairs if `held_out`."""
    while True:
        a, b = rng.randint(1, 12), rng.randint(1, 12)
        pair = (a, b) if kind == "plus" else (a + b, b)
        if reserved_unordered(kind, *pair) == held_out:
            return pair


def _arithmetic(rng: random.Random, split: str, kind: str, forms: tuple[str, ...]) -> tuple[str, int, int]:
    """(question, a, b). One in three test questions is about a reserved pair; the others are about a pair that training
    never asks for in these words.
    """
    held_out = split != "train" and rng.random() < 1 / 3
    while True:
        (a, b), form = number_pair(rng, kind, held_out), rng.choice(forms)
        if held_out or reserved(f"{kind} asked", form, (a, b)) == (split != "train"):
            return form.format(a=a, b=b), a, b


def _addition(rng: random.Random, split: str) -> Question:
    text, a, b = _arithmetic(rng, split, "plus", phrases.ADDITION)
    wrong = tuple(f"{a} plus {b} is {a + b + off}." for off in (1, -1, 10))
    return Question("addition", text, (f"{a} plus {b} is {a + b}.",), wrong)


def _subtraction(rng: random.Random, split: str) -> Question:
    text, a, b = _arithmetic(rng, split, "minus", phrases.SUBTRACTION)
    wrong = tuple(f"{a} minus {b} is {value}." for value in (a - b + 1, a - b + 2, abs(a - b - 1)) if value != a - b)
    return Question("subtraction", text, (f"{a} minus {b} is {a - b}.",), wrong)


def times(n: int) -> str:
    return "1 time" if n == 1 else f"{n} times"


def word_list(rng: random.Random, split: str, kind: str, n: int) -> list[str]:
    """`n` different words. In the test split some neighbours in the list are a reserved pair, in training none."""
    while True:
        words = rng.sample(LIST_WORDS, n)
        if any(reserved(kind, *pair) for pair in zip(words, words[1:], strict=False)) == (split != "train"):
            return words


def _counting(rng: random.Random, split: str) -> Question:
    if rng.random() < 0.35:
        by_length = rng.choice(_LENGTHS)
        word, form = draw_pair(rng, split, "letters", _WORDS_OF_LENGTH[by_length], phrases.COUNT_LETTERS)
        wrong = tuple(f"The word {word} has {by_length + off} letters." for off in (1, -1))
        return Question("counting", form.format(word=word), (f"The word {word} has {by_length} letters.",), wrong)
    count = rng.randint(1, 4)
    word, other, third = words = word_list(rng, split, "count", 3)
    items = [word] * count + [rng.choice((other, third)) for _ in range(rng.randint(1, 3))]
    rng.shuffle(items)
    key = " ".join(items)
    if reserved("count list", word, key) != (split != "train"):
        return _counting(rng, split)
    text = rng.choice(phrases.COUNT_WORDS).format(word=words[0], words=", ".join(items))
    wrong = tuple(f"The word {word} comes {times(n)}." for n in (count - 1, count + 1) if n > 0)
    return Question("counting", text, (f"The word {word} comes {times(count)}.",), wrong)


def _comparing(rng: random.Random, split: str) -> Question:
    numbers = rng.random() < 0.6
    while True:
        if numbers:
            a, b = sorted(rng.sample(range(1, 31), 2))
        else:
            a, b = sorted(rng.sample(range(len(BY_WEIGHT)), 2))
        if reserved_unordered("numbers" if numbers else "weights", a, b) == (split != "train"):
            break
    up = rng.random() < 0.5
    winner, loser = (b, a) if up else (a, b)
    one, other = (a, b) if rng.random() < 0.5 else (b, a)
    if numbers:
        more = "bigger" if up else "smaller"
        text = rng.choice(phrases.COMPARE_NUMBERS[more]).format(a=one, b=other)
        right, false = str(winner), str(loser)
    else:
        more = "heavier" if up else "lighter"
        names = [a_or_an(BY_WEIGHT[k]) for k in range(len(BY_WEIGHT))]
        text = rng.choice(phrases.COMPARE_WEIGHTS).format(a=names[one], b=names[other], more=more)
        right, false = names[winner], names[loser]
    answers = (capitalise(f"{right} is {more} than {false}."),)
    return Question("comparing", text, answers, (capitalise(f"{false} is {more} than {right}."),))


def _listing(items: list) -> str:
    return ", ".join(str(item) for item in items)


def _sorting(rng: random.Random, split: str) -> Question:
    if rng.random() < 0.7:
        n = rng.choices((3, 4, 5), (0.5, 0.35, 0.15))[0]
        while True:
            items: list = rng.sample(range(1, 21), n)
            pairs = zip(items, items[1:], strict=False)
            held_out = any(reserved_unordered("sort", *pair) for pair in pairs)
            if held_out == (split != "train") and items != sorted(items):
                break
        forms = phrases.SORT_NUMBERS
    else:
        while True:
            items = word_list(rng, split, "sort", 3)
            if len({word[0] for word in items}) == 3 and items != sorted(items):
                break
        forms = phrases.SORT_WORDS
    answer = sorted(items)
    wrong = (_listing(items) + ".", _listing([answer[1], answer[0], *answer[2:]]) + ".")
    return Question("sorting", rng.choice(forms).format(items=_listing(items)), (_listing(answer) + ".",), wrong)


def _reversing(rng: random.Random, split: str) -> Question:
    items = word_list(rng, split, "reverse", rng.choices((3, 4, 5), (0.5, 0.35, 0.15))[0])
    wrong = (_listing(items) + ".", _listing([items[0], *items[:0:-1]]) + ".")
    text = rng.choice(phrases.REVERSE).format(items=_listing(items))
    return Question("reversing", text, (_listing(items[::-1]) + ".",), wrong)


def spelled(word: str) -> str:
    return f"The word {word} is spelled {'-'.join(word)}."


def _spelling(rng: random.Random, split: str) -> Question:
    word, form = draw_pair(rng, split, "spell", SPELLING_WORDS, phrases.SPELL)
    swapped = word[0] + word[2] + word[1] + word[3:]
    letters = word[:-1] if swapped == word else swapped
    wrong = (f"The word {word} is spelled {'-'.join(letters)}.",)
    return Question("spelling", form.format(word=word), (spelled(word),), wrong)


def _opposites(rng: random.Random, split: str) -> Question:
    word, form = draw_pair(rng, split, "opposite", tuple(OPPOSITES), phrases.OPPOSITE)
    other = rng.choice([w for w in OPPOSITES if w not in (word, OPPOSITES[word])])
    wrong = (f"The opposite of {word} is {other}.",)
    return Question("opposites", form.format(word=word), (f"The opposite of {word} is {OPPOSITES[word]}.",), wrong)


def _categories(rng: random.Random, split: str) -> Question:
    word, form = draw_pair(rng, split, "category", tuple(CATEGORY_OF), phrases.CATEGORY)
    category = CATEGORY_OF[word]
    other = rng.choice([name for name in CATEGORIES if name != category])
    pair = [category, other] if rng.random() < 0.5 else [other, category]
    text = form.format(a_word=a_or_an(word), one=a_or_an(pair[0]), other=a_or_an(pair[1]))
    right, false = (capitalise(f"{a_or_an(word)} is {a_or_an(name)}.") for name in (category, other))
    return Question("categories", text, (right,), (false,))


def _greeting(rng: random.Random, split: str) -> Question:
    name, form = draw_pair(rng, split, "hello", NAMES, phrases.HELLO)
    other = rng.choice([n for n in NAMES if n != name])
    answers = (f"Hello, {name}! It is nice to meet you.", f"Nice to meet you, {name}!")
    return Question("greeting", form.format(name=name), answers, (f"Hello, {other}! It is nice to meet you.",))


def identity_answers(name: str) -> tuple[str, ...]:
    return (
        f"I am {name}, a tiny language model.",
        f"My name is {name}.",
        "I am a tiny language model.",
        "I can tell stories and answer questions.",
    )


def identity_question(rng: random.Random, split: str, name: str = ASSISTANT_NAME) -> Question:
    kind = rng.randrange(len(phrases.IDENTITY))
    lead_in, text = draw_pair(rng, split, "identity", phrases.LEAD_INS, phrases.IDENTITY[kind])
    answers = identity_answers(name)
    wrong = identity_answers(rng.choice(NAMES))[kind] if kind < 2 else answers[5 - kind]
    return Question("identity", lead_in + text, (answers[kind],), (wrong,))


def _capitals(rng: random.Random, split: str) -> Question:
    word, form = draw_pair(rng, split, "capitals", CAPITAL_WORDS, phrases.CAPITALS)
    right, other = word.upper(), rng.choice(CAPITAL_WORDS).upper()
    wrong = (word.lower() + ".",) if other == right else (other + ".", word.lower() + ".")
    return Question("capitals", form.format(word=word), (right + ".", right), wrong)


_LENGTHS = (3, 4, 5, 6)
_WORDS_OF_LENGTH = {n: tuple(word for word in SPELLING_WORDS if len(word) == n) for n in _LENGTHS}
CAPITAL_WORDS = (*NAMES, *COLOURS)

CLOSED: dict[str, Callable[[random.Random, str], Question]] = {
    "addition": _addition,
    "subtraction": _subtraction,
    "counting": _counting,
    "comparing": _comparing,
    "sorting": _sorting,
    "spelling": _spelling,
    "reversing": _reversing,
    "opposites": _opposites,
    "categories": _categories,
    "greeting": _greeting,
    "identity": identity_question,
    "capitals": _capitals,
}
