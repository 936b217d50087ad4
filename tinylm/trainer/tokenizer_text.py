"""The text that a tokenizer learns from, counted, and a part held out to measure the tokenizer on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tinylm.commandline.terminal import format_count
from tinylm.dataset import tinyworld
from tinylm.tokenizer.split_patterns import cut_text
from tinylm.tokenizer.tokenizer import Tokenizer

SECTION_CHARACTERS = 1 << 13
"""Texts are read in sections of about this size. A text in sections has the same pieces."""

HELD_OUT_EVERY, MOST_HELD_OUT = 100, 128
"""One section in so many is held out, up to so many sections: about a megabyte."""

TINYWORLD_HELD_OUT = 200
"""Stories, and as many chats, of TinyWorld's test split."""


class TextReader:
    """Counts what is read, and holds out one section in a hundred, from the fiftieth on.

    A text of less than about 400 kB keeps all of it to learn from.

    Args:
        limit: stop after the text that reaches this many bytes of UTF-8.
        holds_out: whether to hold out a part.
    """

    def __init__(self, limit: int, holds_out: bool) -> None:
        self.limit, self.holds_out = limit, holds_out
        self.num_texts = self.num_bytes = 0
        self.stopped = False
        self.held_out: list[str] = []
        self.learnt: list[str] = []
        """The first sections to learn from; the tokenizer is measured on them if none is held out."""

    def to_learn_from(self, texts: Iterable[str]) -> Iterator[str]:
        """The sections to learn from, one at a time."""
        num_sections = 0
        for text in texts:
            if self.num_bytes >= self.limit:
                self.stopped = True
                return
            self.num_texts += 1
            self.num_bytes += num_bytes_of(text)
            for section in cut_text(text, SECTION_CHARACTERS):
                num_sections += 1
                is_chosen = num_sections % HELD_OUT_EVERY == HELD_OUT_EVERY // 2
                if self.holds_out and is_chosen and len(self.held_out) < MOST_HELD_OUT:
                    self.held_out.append(section)
                    continue
                if len(self.learnt) < MOST_HELD_OUT:
                    self.learnt.append(section)
                yield section

    def facts(self, tokenizer: Tokenizer) -> dict[str, str]:
        """What was read, and how many bytes of it a token holds."""
        stopped = " (there is more: --max_bytes)" if self.stopped else ""
        measured = self.held_out or self.learnt
        num_tokens = sum(map(len, tokenizer.encode_batch(measured)))
        where = "held-out text" if self.held_out else "the text it learned from"
        texts = "1 text" if self.num_texts == 1 else f"{self.num_texts:,} texts"
        size = format_count(sum(map(num_bytes_of, measured)))
        return {
            "read": f"{self.num_bytes:,} bytes in {texts}{stopped}",
            "bytes per token": f"{sum(map(num_bytes_of, measured)) / num_tokens:.2f}, on {size} bytes of {where}",
        }


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
