"""Whether a written story is right: its words, its length, its end, and one name for each person.

Models of this size like to write "Anna and Anna were in Rome. Anna gave Anna the ball.": every word asked for is
there, and the text makes no sense.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tinylm.dataset.tinyworld.words import NAMES, num_sentences

_NAME = re.compile(rf"\b(?:{'|'.join(NAMES)})\b")
_JOINED = re.compile(rf"{_NAME.pattern}(?:(?:, | and ){_NAME.pattern})+")
"""Names in a row: "Anna and Ben", "Anna, Ben and Leo"."""
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[.!?]\")\s+")
_INTRODUCTION = 2
"""A story of TinyWorld names all its people in its first two sentences."""


def is_story(text: str, words: Iterable[str]) -> bool:
    """Whether `text` contains every one of `words`, has at least three sentences, ends with the final mark of a
    sentence, and gives each person one name.
    """
    found = set(re.findall(r"[a-z]+", text.lower()))
    return (
        all(word.lower() in found for word in words)
        and num_sentences(text) >= 3
        and bool(re.search(r"[.!?]\"?$", text))
        and has_one_name_each(text)
    )


def has_one_name_each(text: str) -> bool:
    """Whether different people have different names, and nobody has a second one.

    Two people have one name where names in a row repeat one ("Anna and Anna"), or where somebody does something to
    themself: a sentence names one person only, and twice ("Anna gave Anna the ball"). Somebody has a second name where
    a name turns up that the first two sentences do not introduce.
    """
    sentences = _SENTENCE_END.split(text)
    named = [_NAME.findall(sentence) for sentence in sentences]
    introduced = {name for names in named[:_INTRODUCTION] for name in names}
    rows = [_NAME.findall(row) for row in _JOINED.findall(text)]
    return (
        introduced.issuperset(name for names in named for name in names)
        and all(len(set(row)) == len(row) for row in rows)
        and not any(len(names) > 1 and len(set(names)) == 1 for names in named)
    )
