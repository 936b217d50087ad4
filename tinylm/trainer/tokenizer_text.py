"""The text that a tokenizer learns from, counted, and a part held out to measure the tokenizer on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tinylm.dataset import tinyworld
from tinylm.tokenizer.split_patterns import cut_text

SECTION_CHARACTERS = 1 << 13
"""Texts are read in sections of about this size. A text in sections has the same pieces."""

HELD_OUT_EVERY = 100
"""One section in so many is held out."""

MOST_HELD_OUT, MOST_KEPT = 128, 1024
"""Sections that are held out of one part of the data, about a megabyte, and of all."""

MAX_PARTS, OTHERS = 1000, "(others)"
"""Parts with a name of their own in the report; the field that names them may differ in each record."""

TINYWORLD_HELD_OUT = 200
"""Stories, and as many chats, of TinyWorld's test split."""

NamedText = tuple[str, str]
"""The name of a part of the data, such as a file or a language, and a text of it."""


@dataclass
class Kept:
    """Sections of one part of the data."""

    held_out: list[str] = field(default_factory=list)
    learnt: list[str] = field(default_factory=list)
    """The first sections to learn from; the tokenizer is measured on them if none is held out."""


class TextReader:
    """Counts what is read, and holds out one section in a hundred, from the fiftieth on.

    Data of less than about 400 kB is learnt whole.

    Args:
        limit: stop after the text that reaches this many bytes of UTF-8.
        holds_out: whether to hold out a part.
    """

    def __init__(self, limit: int, holds_out: bool) -> None:
        self.limit, self.holds_out = limit, holds_out
        self.num_texts = self.num_bytes = self.num_held_out = self.num_learnt = 0
        self.stopped = False
        self.parts: dict[str, Kept] = {}

    def to_learn_from(self, texts: Iterable[NamedText]) -> Iterator[str]:
        """The sections to learn from, one at a time."""
        num_sections = 0
        for name, text in self.read(texts):
            part = self.parts[name]
            for section in cut_text(text, SECTION_CHARACTERS):
                num_sections += 1
                is_chosen = num_sections % HELD_OUT_EVERY == HELD_OUT_EVERY // 2
                has_room = len(part.held_out) < MOST_HELD_OUT and self.num_held_out < MOST_KEPT
                if self.holds_out and is_chosen and has_room:
                    part.held_out.append(section)
                    self.num_held_out += 1
                    continue
                if len(part.learnt) < MOST_HELD_OUT and (self.num_learnt < MOST_KEPT or not part.learnt):
                    part.learnt.append(section)
                    self.num_learnt += 1
                yield section

    def read(self, texts: Iterable[NamedText]) -> Iterator[NamedText]:
        """The texts up to the limit, counted."""
        for name, text in texts:
            if self.num_bytes >= self.limit:
                self.stopped = True
                return
            self.num_texts += 1
            self.num_bytes += num_bytes_of(text)
            name = name if name in self.parts or len(self.parts) < MAX_PARTS else OTHERS
            self.parts.setdefault(name, Kept())
            yield name, text

    def to_measure(self) -> Iterator[NamedText]:
        """What is held out of each part, or else the beginning of what was learnt from it."""
        for name, part in self.parts.items():
            yield from ((name, section) for section in part.held_out or part.learnt)

    def words(self) -> str:
        """What was read, in words."""
        texts = "1 text" if self.num_texts == 1 else f"{self.num_texts:,} texts"
        return f"{self.num_bytes:,} bytes in {texts}{' (there is more: --max_bytes)' if self.stopped else ''}"


def tinyworld_texts(num_documents: int, split: str = "train") -> Iterator[str]:
    """Stories, and the turns of chats, each after its role, as in the chat template.

    If the roles were not in the text, each would be several tokens in every turn: "as", "s", "ist", "ant".
    """
    yield from tinyworld.pretrain_documents(num_documents, split)
    for item in tinyworld.conversations(num_documents, split):
        yield from (f"{message['role']}\n{message['content']}" for message in item.messages)


def num_bytes_of(text: str) -> int:
    """The bytes of a text in UTF-8."""
    return len(text.encode("utf-8", errors="replace"))
