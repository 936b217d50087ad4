"""Running text: tokenised once, split honestly, every token a target once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tinylm.dataset import token_shards
from tinylm.dataset.pretrain_dataset import PretrainDataset, load_pretrain_data
from tinylm.dataset.splits import hold_out_documents, hold_out_items
from tinylm.dataset.token_shards import (
    cached_token_shards,
    open_token_shards,
    tokenize_texts,
    write_token_shards,
)
from tinylm.tokenizer.tokenizer import Tokenizer

TEXTS = ["The boat.", "", "A longer text about the sea.\n\nAnd boats\n", "ü", "x" * 50]


def reference(texts: list[str], tokenizer) -> list[list[int]]:
    return [[*tokenizer.encode(text), tokenizer.endoftext_id] for text in texts]


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


def test_only_the_last_row_is_padded_and_eos_is_a_target(tokenizer) -> None:
    """The end of a document was once masked wherever pad and end were the same id."""
    dataset = PretrainDataset.from_texts(TEXTS, tokenizer, 11)
    batch = dataset.collate([dataset.row(index) for index in range(len(dataset))])
    assert (batch.targets == -100).any(dim=1).tolist() == [False] * (len(dataset) - 1) + [True]
    assert int((batch.targets == tokenizer.endoftext_id).sum()) == 4
    assert batch.count == dataset.num_targets


def test_num_bytes_is_that_of_the_scored_text(tokenizer) -> None:
    dataset = PretrainDataset.from_texts(TEXTS, tokenizer, 11)
    first = sum(len(tokenizer.token_bytes(ids[0])) for ids in reference(TEXTS, tokenizer) if len(ids) > 1)
    assert dataset.num_bytes == sum(len(text.encode()) for text in TEXTS) - first


def test_long_documents_cut_in_pieces_give_the_same_tokens(monkeypatch) -> None:
    tokenizer = Tokenizer.train(["a\n\nb\n\n\nc.\n\nd!\n\n" * 9], vocab_size=290)
    assert len(tokenizer.encode("\n\n")) == 1  # a cut between the two would show
    monkeypatch.setattr(token_shards, "PIECE_CHARACTERS", 3)
    monkeypatch.setattr(token_shards, "CHUNK_CHARACTERS", 7)
    text = "One.\nTwo  \n  three\n\n\nfour!\n\n \n five\r\nsix\n\tseven\n...\neight\u2028\nnine\x1c\nten" * 5
    assert len(list(token_shards._pieces(text))) > 10
    shards = tokenize_texts([text, "b"], tokenizer)
    assert shards.tokens.tolist() == sum(reference([text, "b"], tokenizer), [])


def test_shards_on_disk_equal_those_in_memory(tokenizer, tmp_path: Path) -> None:
    write_token_shards(TEXTS, tokenizer, tmp_path / "shards")
    disk, memory = open_token_shards(tmp_path / "shards"), tokenize_texts(TEXTS, tokenizer)
    assert isinstance(disk.tokens, np.memmap) and disk.tokens.dtype == np.uint16
    assert disk.tokens.tolist() == memory.tokens.tolist() == sum(reference(TEXTS, tokenizer), [])
    assert disk.offsets.tolist() == memory.offsets.tolist()
    assert disk.fingerprint == memory.fingerprint
    assert token_shards.token_dtype(70_000) == np.uint32


def test_worker_processes_write_the_same_shards(tokenizer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(token_shards, "CHUNK_CHARACTERS", 20)
    done: list[tuple[int, int]] = []
    write_token_shards(TEXTS * 3, tokenizer, tmp_path / "shards", 2, lambda *numbers: done.append(numbers))
    assert open_token_shards(tmp_path / "shards").fingerprint == tokenize_texts(TEXTS * 3, tokenizer).fingerprint
    assert done[-1][0] == 15 and len(done) > 3


def test_cached_and_made_anew_when_something_changes(tokenizer, tmp_path: Path, monkeypatch) -> None:
    source, cache = tmp_path / "a.txt", tmp_path / "cache"
    source.write_text("one two three")
    first = cached_token_shards(str(source), tokenizer, cache)
    with monkeypatch.context() as patch:
        patch.setattr(token_shards, "write_token_shards", None)  # would fail if it were called
        assert cached_token_shards(str(source), tokenizer, cache).fingerprint == first.fingerprint
    source.write_text("one two threx")
    os.utime(source, ns=(1, 1))
    assert cached_token_shards(str(source), tokenizer, cache).fingerprint != first.fingerprint
    other = type(tokenizer).train(["aa bb aa bb"], vocab_size=274)
    assert token_shards.source_fingerprint(str(source), other) != token_shards.source_fingerprint(
        str(source), tokenizer
    )


def test_nothing_half_written_is_left(tokenizer, tmp_path: Path) -> None:
    def texts():
        yield "x" * 3_000_000
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_token_shards(texts(), tokenizer, tmp_path / "cache" / "shards")
    assert list(tmp_path.iterdir()) == []
    write_token_shards(TEXTS, tokenizer, tmp_path / "cache" / "shards")
    with pytest.raises(OSError, match="disk full"):
        write_token_shards(texts(), tokenizer, tmp_path / "cache" / "shards")
    assert open_token_shards(tmp_path / "cache" / "shards").tokens.size > 0  # the old ones stay


def _truncate(folder: Path) -> None:
    os.truncate(folder / "tokens.bin", 4)


def _forget(folder: Path) -> None:
    (folder / "offsets.npy").unlink()


def _scramble(folder: Path) -> None:
    (folder / "meta.json").write_text("{")


def _age(folder: Path) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "version": 0}))


@pytest.mark.parametrize("damage", [_truncate, _forget, _scramble, _age])
def test_damaged_shards_are_noticed_and_made_anew(damage, tokenizer, tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("one two three")
    good = cached_token_shards(str(source), tokenizer, tmp_path / "cache")
    folder = next((tmp_path / "cache").iterdir())
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match="delete the folder"):
        open_token_shards(folder)
    assert cached_token_shards(str(source), tokenizer, tmp_path / "cache").fingerprint == good.fingerprint


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
    assert tokenizer.decode(held.row(0).input_ids) == "four five"
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
        with pytest.raises(ValueError, match="fewer than two tokens"):
            PretrainDataset.from_texts(texts, tokenizer, 8)
