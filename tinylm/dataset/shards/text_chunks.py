"""Documents -> chunks of text -> arrays of token ids. Free of torch, for worker processes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

CHUNK_CHARACTERS = 1 << 20
"""Text sent to a worker at a time: about half a second of work."""

PIECE_CHARACTERS = 1 << 13
"""Long documents are tokenised in pieces of this size: a fifth faster than whole, and on all cores."""

# Here the split pattern always cuts: no piece of it runs from a newline into a character that is not blank.
# So a long document is tokenised in parts, with the same result.
_SAFE_CUT = re.compile(r"\n(?=\S)")

Piece = tuple[str, bool]
"""Part of a document, and whether the document ends with it."""

Part = tuple[np.ndarray, np.ndarray]
"""Tokens of a chunk, and where in it documents end."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type that holds every token id."""
    return np.dtype(np.uint16) if vocab_size <= 1 << 16 else np.dtype(np.uint32)


def chunks_of(texts: Iterable[str]) -> Iterator[list[Piece]]:
    """Pieces of documents, about CHUNK_CHARACTERS together."""
    chunk: list[Piece] = []
    size = 0
    for text in texts:
        for piece in pieces_of(text):
            chunk.append(piece)
            size += len(piece[0])
            if size >= CHUNK_CHARACTERS:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk


def pieces_of(text: str) -> Iterator[Piece]:
    """A document in pieces of about PIECE_CHARACTERS, cut where that changes no token."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        cut = _SAFE_CUT.search(text, start + PIECE_CHARACTERS)
        if cut is None:
            break
        yield text[start : cut.end()], False
        start = cut.end()
    yield text[start:], True


def encode_chunk(tokenizer: Any, chunk: list[Piece]) -> Part:
    """Tokens of a chunk, with <|endoftext|> after each document that ends in it, and where those end."""
    parts: list[np.ndarray] = []
    ends = []
    size = 0
    dtype = token_dtype(tokenizer.vocab_size)
    for ids, (_, is_end) in zip(tokenizer.encode_batch([text for text, _ in chunk]), chunk, strict=True):
        if is_end:
            ids.append(tokenizer.endoftext_id)
        parts.append(np.array(ids, dtype=dtype))
        size += len(ids)
        if is_end:
            ends.append(size)
    tokens = np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)
    return tokens, np.array(ends, dtype=np.int64)


def encode_chunk_of(tokenizer: Any, chunk: tuple[Any, list[Piece]]) -> tuple[Any, Part]:
    """The same for a chunk that says what it is of."""
    return chunk[0], encode_chunk(tokenizer, chunk[1])
