"""Packing against its definition: every position once, no row too long, the rows of best-fit decreasing."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm.dataset.packing import RunningTextPacking, pack_rows


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 17))
def test_running_text_covers_every_target_once_and_in_order(lengths: list[int], row_length: int) -> None:
    packing = RunningTextPacking(np.array(lengths, dtype=np.int64), row_length)
    seen = []
    for index in range(len(packing)):
        pieces = packing.row(index)
        size = sum(piece.stop - piece.start - 1 for piece in pieces)
        assert size == row_length or (index == len(packing) - 1 and 0 < size < row_length)
        seen += [(piece.document, t) for piece in pieces for t in range(piece.start + 1, piece.stop)]
    assert seen == [(document, t) for document, n in enumerate(lengths) for t in range(1, n)]


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(1, n), max_size=60))))
def test_whole_documents_each_in_one_row_and_no_row_too_long(case: tuple[int, list[int]]) -> None:
    row_length, lengths = case
    packing = pack_rows(np.array(lengths, dtype=np.int64), row_length)
    rows = [packing.row(index).tolist() for index in range(len(packing))]
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[document] for document in row) <= row_length for row in rows)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 24), min_size=1, max_size=60))
def test_equals_a_plain_best_fit_decreasing(lengths: list[int]) -> None:
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(24 - length)
    packing = pack_rows(np.array(lengths), 24)
    used = [24 - sum(lengths[document] for document in packing.row(i)) for i in range(len(packing))]
    assert sorted(used) == sorted(rooms)


def test_over_long_and_empty_documents_are_refused() -> None:
    for lengths in ([3, 9], [0, 3]):
        with pytest.raises(ValueError, match="expected 1 to 8"):
            pack_rows(np.array(lengths), 8)
    with pytest.raises(ValueError, match="max_seq_len is 0"):
        pack_rows(np.array([1]), 0)


def test_a_hundred_thousand_documents_in_a_moment() -> None:
    """A packer that scans its open rows needs minutes here; ours a fraction of a second. Counted is the work of this
    process, with room for a slow and busy machine."""
    lengths = np.random.default_rng(0).integers(1, 2049, 100_000)
    start = time.process_time()
    packing = pack_rows(lengths, 2048)
    assert time.process_time() - start < 60
    assert lengths.sum() / (len(packing) * 2048) > 0.99
