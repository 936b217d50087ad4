"""Held-out data: which part of a corpus is used for validation. It depends only on the data, a share and a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")
Spans = tuple[np.ndarray, np.ndarray]
"""(starts [D], lengths [D]) of documents in a corpus, in tokens."""


def hold_out_items(items: Sequence[Item], fraction: float, seed: int) -> tuple[list[Item], list[Item]]:
    """(training, held out) chats or pairs, both in their original order.

    Held out is `fraction` of the items, rounded, but at least one of two or more; nothing if `fraction` is 0.
    """
    check_fraction(fraction)
    if fraction == 0 or len(items) < 2:
        return list(items), []
    number = min(max(1, round(fraction * len(items))), len(items) - 1)
    held = np.zeros(len(items), dtype=bool)
    held[_order(len(items), seed)[:number]] = True
    train = [item for item, out in zip(items, held, strict=True) if not out]
    return train, [item for item, out in zip(items, held, strict=True) if out]


def hold_out_documents(lengths: np.ndarray, fraction: float, seed: int) -> tuple[Spans, Spans]:
    """(training, held out) spans of a corpus, which together contain every token once.

    Documents are held out in a random order (from `seed`), as long as they have at most `fraction` of the tokens
    together. If every document is longer than that (one big file, a few books), the end of the longest is held out
    instead: the same share of all tokens, but at most half of that document.

    Args:
        lengths: tokens of each document, [D].
        fraction: share of the tokens, from 0 to below 1; 0 holds nothing out.
    """
    check_fraction(fraction)
    lengths = np.asarray(lengths, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    budget = int(fraction * lengths.sum())
    held = np.zeros(len(lengths), dtype=bool)
    left = budget
    for document in _order(len(lengths), seed).tolist():
        if 0 < lengths[document] <= left:
            held[document] = True
            left -= int(lengths[document])
    if held.any() or budget == 0:
        return (starts[~held], lengths[~held]), (starts[held], lengths[held])
    longest = int(np.argmax(lengths))
    tail = min(budget, int(lengths[longest]) // 2)
    kept = lengths.copy()
    kept[longest] -= tail
    return (starts, kept), (starts[[longest]] + kept[longest], np.array([tail], dtype=np.int64))


def check_fraction(fraction: float) -> None:
    """Raises ValueError unless 0 <= fraction < 1."""
    if not 0 <= fraction < 1:
        raise ValueError(
            f"validation_fraction is {fraction}; expected a share from 0 to below 1; pass --validation_fraction 0.01"
        )


def _order(number: int, seed: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=seed % 2**64)).permutation(number)
