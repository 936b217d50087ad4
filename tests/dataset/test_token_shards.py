"""Shards on disk: the tokens of the text, whole or not at all, and nothing in them is trusted."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from tinylm.dataset.shards import token_shards, tokenizing
from tinylm.dataset.shards.token_shards import TokenShards, count_bad_rows, open_shard, tokenize_texts, write_shard
from tinylm.dataset.shards.tokenizing import chunks_of, encode_chunk, sections_of, token_dtype
from tinylm.dataset.sources.record_shapes import BadRow
from tinylm.dataset.sources.records import BadRows
from tinylm.files.atomic import atomic_folder
from tinylm.tokenizer.tokenizer import Tokenizer

TEXTS = ["The boat.", "", "A longer text about the sea.\n\nAnd boats\n", "ü", "x" * 50]


def reference(texts: list[str], tokenizer) -> list[list[int]]:
    return [[*tokenizer.encode(text), tokenizer.endoftext_id] for text in texts]


def write(texts: Iterable[str], tokenizer, folder: Path, bad_rows: BadRows | None = None) -> Path:
    write_shard((encode_chunk(tokenizer, chunk) for chunk in chunks_of(texts, tokenizer)), tokenizer, folder, bad_rows)
    return folder


def test_long_documents_cut_in_sections_give_the_same_tokens(monkeypatch) -> None:
    tokenizer = Tokenizer.train(["a\n\nb\n\n\nc.\n\nd!\n\n" * 9], vocab_size=290)
    assert len(tokenizer.encode("\n\n")) == 1  # a cut between the two would show
    monkeypatch.setattr(tokenizing, "SECTION_CHARACTERS", 3)
    monkeypatch.setattr(tokenizing, "CHUNK_CHARACTERS", 7)
    text = "One.\nTwo  \n  three\n\n\nfour!\n\n \n five\r\nsix\n\tseven\n...\neight\u2028\nnine\x1c\nten" * 5
    assert len(list(sections_of(text, tokenizer))) > 10
    shards = tokenize_texts([text, "b"], tokenizer)
    assert shards.tokens.tolist() == sum(reference([text, "b"], tokenizer), [])


def test_sections_are_those_of_the_tokenizer(monkeypatch) -> None:
    """GPT-2's pattern tokenises a blank line in another way at the end of a text; what tells no cuts is not cut."""
    ours = Tokenizer.train(["a\n\nb\n\n\nc.\n\nd!\n\n" * 9], vocab_size=290)
    gpt2 = Tokenizer(
        ours.definition | {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}}
    )
    monkeypatch.setattr(tokenizing, "SECTION_CHARACTERS", 3)
    text = "One.\n\nTwo.\n\n\nThree\nfour – 船.\n" * 5
    assert tokenize_texts([text], gpt2).tokens.tolist() == sum(reference([text], gpt2), [])
    assert 1 < len(list(sections_of(text, gpt2))) < len(list(sections_of(text, ours)))
    assert [section.text for section in sections_of(text, object())] == [text]


def test_a_shard_on_disk_equals_one_in_memory(tokenizer, tmp_path: Path) -> None:
    disk = TokenShards.join([open_shard(write(TEXTS, tokenizer, tmp_path / "shard"), tokenizer)])
    memory = tokenize_texts(TEXTS, tokenizer)
    assert isinstance(disk.tokens, np.memmap) and disk.tokens.dtype == np.uint16
    assert disk.tokens.tolist() == memory.tokens.tolist() == sum(reference(TEXTS, tokenizer), [])
    assert disk.offsets.tolist() == memory.offsets.tolist()
    assert disk.fingerprint == memory.fingerprint
    assert token_dtype(70_000) == np.uint32


def test_a_shard_is_not_flushed_to_the_disk(tokenizer, tmp_path: Path, monkeypatch) -> None:
    """Five flushes a file took 20 ms: six times as long as all else for a corpus of small files."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: pytest.fail("it is flushed"))
    write(TEXTS, tokenizer, tmp_path / "shard")
    with pytest.raises(pytest.fail.Exception), atomic_folder(tmp_path / "other"):
        pass


def test_shards_joined_are_read_as_one(tokenizer, tmp_path: Path, monkeypatch) -> None:
    """An empty shard between them changes nothing, not even the fingerprint."""
    monkeypatch.setattr(token_shards, "MAX_MAPPED", 1)
    parts = [TEXTS[:2], [], TEXTS[2:3], TEXTS[3:]]
    shards = [open_shard(write(part, tokenizer, tmp_path / str(i)), tokenizer) for i, part in enumerate(parts)]
    corpus, memory = TokenShards.join(shards), tokenize_texts(TEXTS, tokenizer)
    assert corpus.offsets.tolist() == memory.offsets.tolist() and len(corpus.tokens) == len(memory.tokens)
    spans = list(zip(corpus.offsets[:-1].tolist(), corpus.offsets[1:].tolist(), strict=True))
    for _ in range(2):  # back to a shard that was unmapped
        assert [corpus.tokens[a:b].tolist() for a, b in spans] == reference(TEXTS, tokenizer)
        assert [corpus.tokens[b:b].tolist() for _, b in spans] == [[]] * len(spans)
    assert corpus.fingerprint == TokenShards.join([shards[0], *shards[2:]]).fingerprint
    assert corpus.fingerprint != TokenShards.join(shards[::-1]).fingerprint


def test_nothing_half_written_is_left(tokenizer, tmp_path: Path) -> None:
    def texts():
        yield "x" * 3_000_000
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write(texts(), tokenizer, tmp_path / "cache" / "shard")
    assert list(tmp_path.iterdir()) == []
    write(TEXTS, tokenizer, tmp_path / "cache" / "shard")
    with pytest.raises(OSError, match="disk full"):
        write(texts(), tokenizer, tmp_path / "cache" / "shard")
    assert open_shard(tmp_path / "cache" / "shard", tokenizer).num_tokens > 0  # the old one stays


def test_a_shard_remembers_the_bad_rows_of_its_source(tokenizer, tmp_path: Path) -> None:
    counted = BadRows(num_rows=40)
    for line in range(1, 13):
        counted.add(BadRow("old.jsonl", line, "not JSON"))
    shard = open_shard(write(TEXTS, tokenizer, tmp_path / "shard", counted), tokenizer)
    again = BadRows()
    count_bad_rows(shard, "new.jsonl", again)
    assert again.report() == counted.report().replace("old", "new")


# --------------------------------------------------------------------------------------------------
# Damage: what a crash, a bad disk or a bad person may leave
# --------------------------------------------------------------------------------------------------


def _change(**values: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({**meta, **values}))

    return damage


def _forge(name: str, array: Callable[[np.ndarray], np.ndarray], dtype: type) -> Callable[[Path], None]:
    """Change an array, and the sizes and the hash with it: what somebody would do on purpose."""

    def damage(folder: Path) -> None:
        array(np.fromfile(folder / name, dtype)).astype(dtype).tofile(folder / name)
        tokens, offsets = (folder / "tokens.bin").read_bytes(), (folder / "offsets.bin").read_bytes()
        sizes = {"num_tokens": len(tokens) // 2, "num_documents": len(offsets) // 8 - 1}
        _change(**sizes, sha256=hashlib.sha256(tokens + offsets).hexdigest())(folder)

    return damage


def _set(index: int, value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[index] = value
        return array

    return change


def _flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "tokens.bin").read_bytes())
    data[2] ^= 1
    (folder / "tokens.bin").write_bytes(data)


def _replace_by_a_pipe(folder: Path) -> None:
    (folder / "tokens.bin").unlink()
    os.mkfifo(folder / "tokens.bin")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda folder: os.truncate(folder / "tokens.bin", 4), "tokens.bin has 4 bytes; expected"),
    "a bit": (_flip_a_bit, "does not match its hash"),
    "no offsets": (lambda folder: (folder / "offsets.bin").unlink(), "no file offsets.bin"),
    "a pipe": (_replace_by_a_pipe, "no file tokens.bin"),
    "half a meta.json": (lambda folder: (folder / "meta.json").write_text("{"), "Expecting property name"),
    "deep meta.json": (lambda folder: (folder / "meta.json").write_text("[" * 100_000), "deeper than 64"),
    "huge meta.json": (lambda folder: os.truncate(folder / "meta.json", 1 << 21), "too large"),
    "a list": (lambda folder: (folder / "meta.json").write_text("[]"), "is not an object"),
    "empty": (lambda folder: (folder / "meta.json").write_text("{}"), "no 'version'"),
    "old": (_change(version=1), "format 1; expected 2"),
    "another tokenizer's": (_change(tokenizer="0" * 16), "another tokenizer"),
    "text for a number": (_change(num_tokens="99"), "impossible numbers"),
    "true for a number": (_change(num_documents=True), "impossible numbers"),
    "negative": (_change(num_documents=-1), "impossible numbers"),
    "more than fit": (_change(num_tokens=1 << 61), "tokens.bin has"),
    "no list of bad rows": (_change(bad_lines=7), "not iterable"),
    "notes of another kind": (_change(notes=[["a", "b", "c"]]), "notes are others"),
    "a note of two parts": (_change(notes=[["a", 1]]), "notes are others"),
    "bad rows of another kind": (_change(bad_lines=[["a", "b"]], num_bad=1, num_rows=1), "bad_lines"),
    "more bad rows than rows": (_change(num_bad=5), "0 of 5 bad rows of 0"),
    "another hash": (_change(sha256=["x"]), "does not match its hash"),
    "an id too large": (_forge("tokens.bin", _set(3, 300), np.uint16), "token id 300 of 300"),
    "offsets that fall": (_forge("offsets.bin", _set(2, 1), np.int64), "does not rise"),
    "offsets that overflow": (_forge("offsets.bin", _set(1, -(2**63)), np.int64), "does not rise"),
    "offsets past the end": (_forge("offsets.bin", _set(-1, 9999), np.int64), "does not rise"),
    "offsets from 1": (_forge("offsets.bin", _set(0, 1), np.int64), "does not rise"),
    "no offset at all": (_forge("offsets.bin", lambda array: array[:0], np.int64), "impossible numbers"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_shard_is_one_clear_error(tokenizer, tmp_path: Path, name: str) -> None:
    damage, reason = DAMAGES[name]
    folder = write(TEXTS, tokenizer, tmp_path / "shard")
    damage(folder)
    with pytest.raises(ValueError, match=f"shard: damaged token shard .*{reason}.*delete the folder"):
        open_shard(folder, tokenizer)


def test_a_forgery_of_good_values_is_no_damage(tokenizer, tmp_path: Path) -> None:
    """What the forged shards above are refused for is their values, not how the test writes them."""
    folder = write(TEXTS, tokenizer, tmp_path / "shard")
    _forge("tokens.bin", _set(3, 299), np.uint16)(folder)
    assert open_shard(folder, tokenizer).tokens()[3] == 299
