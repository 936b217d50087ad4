"""Running text: tokenised once, split honestly, every token a target once."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest

from tinylm.dataset.pretrain_dataset import PretrainDataset, load_pretrain_data
from tinylm.dataset.splits import hold_out_documents, hold_out_items

TEXTS = ["The boat.", "", "A longer text about the sea.\n\nAnd boats\n", "ü", "x" * 50]


def reference(texts: list[str], tokenizer) -> list[list[int]]:
    """Documents as they are learnt: <|endoftext|> before and after them; nothing of an empty one."""
    end = tokenizer.endoftext_id
    return [[end, *tokenizer.encode(text), end] for text in texts if text]


def test_rows_rebuild_the_documents_exactly(tokenizer) -> None:
    documents = reference(TEXTS, tokenizer)
    dataset = PretrainDataset.from_texts(TEXTS, tokenizer, 11)
    inputs, targets = [], []
    for index in range(len(dataset)):
        row = dataset.row(index)
        assert len(row) == 11 or index == len(dataset) - 1
        restarts = np.flatnonzero(np.diff(row.document_ids)) + 1
        for piece in np.split(np.arange(len(row)), restarts):
            assert row.position_ids[piece].tolist() == list(range(len(piece)))
            assert row.input_ids[piece][1:].tolist() == row.targets[piece][:-1].tolist()  # shifted once
        inputs += row.input_ids.tolist()
        targets += row.targets.tolist()
    assert inputs == [token for ids in documents for token in ids[:-1]]
    assert targets == [token for ids in documents for token in ids[1:]]
    assert dataset.num_targets == len(targets)


def test_only_the_first_piece_of_a_document_begins_with_endoftext(tokenizer) -> None:
    dataset = PretrainDataset.from_texts(TEXTS, tokenizer, 5)
    rows = [dataset.row(index) for index in range(len(dataset))]
    begun = sum(int((row.input_ids == tokenizer.endoftext_id).sum()) for row in rows)
    pieces = sum(int(row.document_ids[-1]) + 1 for row in rows)
    assert begun == 4 < pieces
    assert all(row.position_ids[row.input_ids == tokenizer.endoftext_id].sum() == 0 for row in rows)


def test_a_document_begins_as_the_maker_of_the_tokenizer_begins_a_text(tokenizer) -> None:
    """With <s>, or with two tokens, of which rows of 3 positions may hold one."""
    for start in ([7], [9, 7]):
        theirs = copy.copy(tokenizer)
        theirs.document_start = start
        dataset = PretrainDataset.from_texts(TEXTS, theirs, 3)
        rows = [dataset.row(index) for index in range(len(dataset))]
        documents = [[*start, *tokenizer.encode(text), tokenizer.endoftext_id] for text in TEXTS if text]
        assert [token for row in rows for token in row.targets] == [token for ids in documents for token in ids[1:]]
        assert [token for row in rows for token in row.input_ids] == [token for ids in documents for token in ids[:-1]]
        assert dataset.num_bytes == sum(len(text.encode()) for text in TEXTS)
        assert dataset.fingerprint != PretrainDataset.from_texts(TEXTS, tokenizer, 3).fingerprint


def test_only_the_last_row_is_padded_and_eos_is_a_target(tokenizer) -> None:
    """The end of a document was once masked wherever pad and end were the same id."""
    dataset = PretrainDataset.from_texts(TEXTS, tokenizer, 11)
    batch = dataset.collate([dataset.row(index) for index in range(len(dataset))])
    assert (batch.targets == -100).any(dim=1).tolist() == [False] * (len(dataset) - 1) + [True]
    assert int((batch.targets == tokenizer.endoftext_id).sum()) == 4
    assert batch.count == dataset.num_targets


def test_num_bytes_is_that_of_the_scored_text(tokenizer) -> None:
    dataset = PretrainDataset.from_texts(TEXTS, tokenizer, 11)
    assert dataset.num_bytes == sum(len(text.encode()) for text in TEXTS)
    whole = PretrainDataset.from_texts(["ünü one two three " * 20], tokenizer, 11)
    train, held = whole.split(0.2, seed=0)
    assert held is not None and train.num_before.tolist() == [1] and held.num_before.tolist() == [0]
    cut = tokenizer.token_bytes(int(held.row(0).input_ids[0]))  # seen by both, scored by training alone
    text = "ünü one two three " * 20
    assert train.num_bytes + held.num_bytes + len(cut) == len(text.encode())


def test_whole_documents_are_held_out(tokenizer) -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 400)
    (starts, kept), (held_starts, held) = hold_out_documents(lengths, 0.1, seed=3)
    assert sorted([*starts, *held_starts]) == (np.cumsum(lengths) - lengths).tolist()
    assert 0.09 < held.sum() / lengths.sum() <= 0.1 and kept.sum() + held.sum() == lengths.sum()
    again = hold_out_documents(lengths, 0.1, seed=3)[1][0]
    assert held_starts.tolist() == again.tolist() != hold_out_documents(lengths, 0.1, seed=4)[1][0].tolist()
    assert hold_out_documents(lengths, 0.0, seed=3)[1][1].size == 0


def test_the_end_of_a_single_document_is_held_out(tokenizer) -> None:
    dataset = PretrainDataset.from_texts(["one two three four five " * 20], tokenizer, 16)
    train, held = dataset.split(0.1, seed=0)
    assert held is not None
    tokens = dataset.shards.tokens
    cut = len(tokens) - int(0.1 * len(tokens))
    assert [row for row in train.shards.tokens[: train.lengths[0]]] == tokens[:cut].tolist()
    first = held.row(0)
    assert first.input_ids[0] == tokens[cut] and held.num_targets == len(tokens) - cut - 1
    assert train.fingerprint != held.fingerprint != dataset.fingerprint


def test_validation_from_its_own_file(tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three " * 30)
    (tmp_path / "b.txt").write_text("four five")
    train, held = load_pretrain_data(
        str(tmp_path / "a.txt"), tokenizer, 16, tmp_path / "cache", validation_path=str(tmp_path / "b.txt")
    )
    assert held is not None
    assert held.row(0).input_ids.tolist() == [tokenizer.endoftext_id, *tokenizer.encode("four five")]
    assert train.num_targets == len(reference(["one two three " * 30], tokenizer)[0]) - 1
    assert load_pretrain_data(str(tmp_path / "a.txt"), tokenizer, 16, tmp_path / "c", validation_fraction=0)[1] is None


def test_items_are_held_out() -> None:
    train, held = hold_out_items(list(range(100)), 0.1, seed=1)
    assert len(held) == 10 and sorted(train + held) == list(range(100))
    assert hold_out_items([1], 0.5, seed=1) == ([1], [])
    assert hold_out_items([1, 2], 0.01, seed=1)[1] != []
    with pytest.raises(ValueError, match="validation_fraction is 1"):
        hold_out_items([1, 2], 1, seed=1)


def test_text_without_a_target_is_refused(tokenizer) -> None:
    for texts in ([], ["", ""]):
        with pytest.raises(ValueError, match="has no token"):
            PretrainDataset.from_texts(texts, tokenizer, 8)
