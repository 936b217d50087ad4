"""From token ids to text as it comes: whole characters, and nothing that a stop string may still take back."""

from __future__ import annotations

from collections.abc import Sequence

from tinylm.tokenizer.tokenizer import StreamDecoder, Tokenizer


class TextStream:
    """The text of one answer. The pieces, joined, are the answer's text up to its first stop string.

    The first is the one that is complete first, as if the text came one character at a time: where the tokens'
    borders are makes no difference.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer)
        self._stops = tuple(stop_strings)
        self._held = ""  # the end of the text so far, where a stop string may have begun
        self.is_stopped = False

    def feed(self, token_id: int) -> str:
        """Take the next token and return the text that is certain now (often empty)."""
        # A model may have more rows than its tokenizer has entries: other ids write nothing.
        piece = self._decoder.feed(token_id) if token_id < self._tokenizer.vocab_size else ""
        return self._certain(piece) if piece else ""

    def finish(self) -> str:
        """The rest, when no token follows. Half a character becomes U+FFFD."""
        text = self._certain(self._decoder.flush()) + self._held
        self._held = ""
        return text

    def _certain(self, piece: str) -> str:
        text = self._held + piece
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)[1]]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
