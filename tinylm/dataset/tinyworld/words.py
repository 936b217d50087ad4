"""The vocabulary of TinyWorld, its random streams and its held-out pairs.

All texts of TinyWorld are drawn from the lists in this file. They are small on purpose: a model of three million
parameters sees every entity thousands of times, so it has to learn to *read*, not to remember.
"""

from __future__ import annotations

import hashlib
import random
import re
from functools import lru_cache

SPLITS = ("train", "test")

GIRLS = tuple("Mia Anna Lily Rosa Zoe Ruby Nora Lucy Amy Ivy Jane Maya Eva Molly".split())
BOYS = tuple("Ben Tom Max Sam Leo Jack Finn Paul Hugo Oscar Peter Omar Ravi Ken".split())
NAMES = GIRLS + BOYS

THINGS = tuple(
    "ball kite doll drum book hat cup boat robot lamp key ring coin box bag spoon shell flower".split()
    + "apple cake cookie scarf whistle basket balloon bell umbrella pencil".split()
)
COLOURS = tuple("red blue green yellow white black pink orange".split())
FEELINGS = tuple("happy sad proud tired angry hungry scared excited".split())

# Where somebody is. Towns have one word to find; other places would add "in the".
PLACES = tuple("Rome Paris Oslo Cairo Delhi Lima Tokyo Dublin Athens Berlin Madrid Boston".split())

_OPPOSITE_PAIRS = """hot cold, big small, up down, day night, fast slow, open closed, old new, tall short, wet
dry, full empty, hard soft, light dark, early late, loud quiet, rich poor, strong weak, clean dirty, first
last, left right, good bad, near far, high low, sweet sour, start stop, give take, win lose, north south, summer
winter, morning evening, true false, above below, come go"""
OPPOSITES: dict[str, str] = {}
for _pair in _OPPOSITE_PAIRS.split(","):
    _one, _other = _pair.split()
    OPPOSITES[_one], OPPOSITES[_other] = _other, _one

CATEGORIES = {
    "animal": tuple("dog cat cow horse sheep duck frog lion rabbit bear".split()),
    "food": tuple("apple cake cookie carrot banana sandwich potato".split()),
    "toy": tuple("ball doll kite robot puzzle balloon".split()),
    "tool": tuple("hammer saw spade rake axe ladder".split()),
    "vehicle": tuple("car bus train truck plane ship".split()),
    "instrument": tuple("drum flute piano violin trumpet guitar".split()),
    "plant": tuple("rose tree bush tulip daisy oak".split()),
}
CATEGORY_OF = {word: category for category, words in CATEGORIES.items() for word in words}

# From the lightest to the heaviest.
BY_WEIGHT = tuple("ant bee mouse frog cat dog sheep cow elephant whale".split())

SPELLING_WORDS = tuple(
    dict.fromkeys(w for w in (*THINGS, *CATEGORIES["animal"], *COLOURS, *FEELINGS) if 3 <= len(w) <= 6)
)
LIST_WORDS = tuple(
    dict.fromkeys(w for w in (*THINGS, *CATEGORIES["animal"], *"sun moon star tree fish bird house door".split()))
)


def is_girl(name: str) -> bool:
    """Whether the pronoun of `name` is "she"."""
    return name in GIRLS


def a_or_an(phrase: str) -> str:
    """`phrase` with its indefinite article: "red ball" -> "a red ball", "orange ball" -> "an orange ball"."""
    return ("an " if phrase[0] in "aeio" or phrase == "umbrella" else "a ") + phrase


def capitalise(text: str) -> str:
    """`text` with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def join_and(words: list[str] | tuple[str, ...]) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def num_sentences(text: str) -> int:
    """The number of sentences in `text`, counted by their final marks."""
    return len(re.findall(r"[.!?]\"?(?:\s|$)", text))


def stream(seed: int, split: str, kind: str, i: int) -> random.Random:
    """The random stream of item `i`: the same in every process, machine and Python version.

    Raises: ValueError for an unknown split or a negative index.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}; expected one of {', '.join(SPLITS)}; choose one of them")
    if i < 0:
        raise ValueError(f"item {i}; expected an index of at least 0; count items from 0")
    digest = hashlib.blake2b(f"{seed}/{split}/{kind}/{i}".encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "big"))


@lru_cache(maxsize=1 << 16)
def reserved(kind: str, one: object, other: object) -> bool:
    """Whether the pair (one, other) is held out for the test split; true for about a tenth of all pairs.

    The choice depends on the pair alone, not on the seed: no training set of any seed holds a reserved pair.
    """
    digest = hashlib.blake2b(f"{kind}/{one}/{other}".encode(), digest_size=2).digest()
    return int.from_bytes(digest, "big") < 6554  # 6554 / 65536 = 10%


def reserved_unordered(kind: str, one: object, other: object) -> bool:
    """`reserved` for pairs in which the order does not matter, such as 3 + 4 and 4 + 3."""
    return reserved(kind, *sorted((one, other), key=lambda value: (str(type(value)), value)))


@lru_cache(maxsize=256)
def _pairs(kind: str, ones: tuple, others: tuple, held_out: bool) -> tuple[tuple, ...]:
    """All pairs that are reserved (`held_out`), or all that are not; never empty."""
    pairs = tuple((one, other) for one in ones for other in others if reserved(kind, one, other) == held_out)
    assert pairs, f"no pair of kind {kind!r} for one of the splits: its lists are too short"
    return pairs


def draw_pair(rng: random.Random, split: str, kind: str, ones: tuple, others: tuple) -> tuple:
    """A random (one, other) that is reserved if `split` is "test", and not reserved if it is "train"."""
    return rng.choice(_pairs(kind, ones, others, split != "train"))
