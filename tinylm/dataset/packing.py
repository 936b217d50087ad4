"""Packing: which documents go into which rows. Pure functions of lengths; they do not touch the tokens.

Lengths are counted in *positions*, that is (input, target) pairs: a document of n tokens has n - 1 of them.

There are two ways to fill rows:
- **Running text** (pretraining) is cut where a row ends. Only the last row is short, and no target is lost, because
  the token at a cut is the last target of one row and the first input of the next.
- **Chats** are not cut. Each goes into the row where it leaves the least room: best-fit decreasing, which needs at
  most 11/9 of the fewest possible rows, plus a constant (Johnson et al. 1974, doi:10.1137/0203025).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Segment:
    """Tokens `start` to `stop` of a document, which fill `stop - start - 1` positions of a row."""

    document: int
    start: int
    stop: int


class RunningTextPacking:
    """Documents end to end, cut into rows of `row_length` positions. Each row is computed independently.

    Args:
        lengths: tokens of each document, [D].
        row_length: positions of a row.
    """

    def __init__(self, lengths: np.ndarray, row_length: int) -> None:
        check_row_length(row_length)
        positions = np.maximum(np.asarray(lengths, dtype=np.int64) - 1, 0)
        self.row_length = row_length
        self.starts = np.concatenate([[0], np.cumsum(positions)])  # [D + 1] first position of each document
        self.num_positions = int(self.starts[-1])

    def __len__(self) -> int:
        return -(-self.num_positions // self.row_length)

    def row(self, index: int) -> list[Segment]:
        """The segments of row `index`, in order."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        begin = index * self.row_length
        end = min(begin + self.row_length, self.num_positions)
        first = int(np.searchsorted(self.starts, begin, side="right")) - 1
        segments = []
        for document in range(first, len(self.starts) - 1):
            start, stop = int(self.starts[document]), int(self.starts[document + 1])
            if start >= end:
                break
            if start < stop:  # a document of one token has no position
                segments.append(Segment(document, max(begin, start) - start, min(end, stop) - start + 1))
        return segments


@dataclass(frozen=True)
class WholePacking:
    """Row r holds the documents `order[row_starts[r] : row_starts[r + 1]]`, uncut."""

    order: np.ndarray
    row_starts: np.ndarray

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    def row(self, index: int) -> np.ndarray:
        """The documents of row `index`."""
        return self.order[self.row_starts[index] : self.row_starts[index + 1]]


def pack_rows(lengths: np.ndarray, row_length: int) -> WholePacking:
    """Best-fit decreasing: the longest document first, each into the row with the least room that is enough for it.

    Rows are grouped by the room left in them, and bit r of one big integer is set if some row has room r. So "the
    least room that is enough" is the lowest set bit from `length` up, and the work per document does not grow with
    the number of rows.

    Args:
        lengths: positions of each document, [D], each from 1 to `row_length`.
        row_length: positions of a row.

    Raises:
        ValueError: a document is empty or longer than a row; these must be cut or dropped before.
    """
    check_row_length(row_length)
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and (lengths.min() < 1 or lengths.max() > row_length):
        raise ValueError(
            f"document lengths run from {lengths.min()} to {lengths.max()} positions; expected 1 to "
            f"{row_length}; cut the documents before packing them"
        )
    longest_first = np.argsort(-lengths, kind="stable")
    row_of = np.empty(len(lengths), dtype=np.int64)
    rows_with_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    rooms = 0  # bit r is set where rows_with_room[r] is not empty
    num_rows = 0
    for document, length in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            rows = rows_with_room[room]
            row = rows.pop()
            if not rows:
                rooms ^= 1 << room
        else:
            room, row = row_length, num_rows
            num_rows += 1
        row_of[document] = row
        left = room - length
        if left:
            if not rows_with_room[left]:
                rooms |= 1 << left
            rows_with_room[left].append(row)
    order = np.argsort(row_of, kind="stable")
    row_starts = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=num_rows))])
    return WholePacking(order, row_starts)


def check_row_length(row_length: int) -> None:
    """Raises ValueError unless a row has at least one position."""
    if row_length < 1:
        raise ValueError(f"max_seq_len is {row_length}; expected at least 1; pass --max_seq_len 512")
