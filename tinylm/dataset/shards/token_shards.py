"""Token shards: tokenised files on disk, memory-mapped, so that a corpus may be larger than memory.

A shard is a folder with `tokens.bin` (uint16, or uint32 for vocabularies above 65,536; each document ends with the
tokenizer's <|endoftext|>), `offsets.bin` (int64 [D + 1], where each document starts) and `meta.json`. The folder
appears only when it is complete. Opening it checks types, sizes, order, range, and a hash of all content, which takes
about a second per GB. A corpus is a list of shards.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tinylm.dataset.shards.tokenizing import EncodedChunk, chunks_of, encode_chunk, token_dtype
from tinylm.dataset.sources.record import BadRow, Notes
from tinylm.dataset.sources.records import BadRows
from tinylm.files.atomic import atomic_folder
from tinylm.files.untrusted import parse_json, shown

FORMAT_VERSION = 2

FILES = ("meta.json", "tokens.bin", "offsets.bin")

MAX_META_BYTES = 1 << 20
"""The largest meta.json that is read; ours have under 10 kB."""

MAX_REASON_CHARACTERS = 500
"""A bad row's reason is cut to this length."""

BLOCK_BYTES = 1 << 22
"""How much is read at a time when a shard is checked."""

MAX_MAPPED = 128
"""Shards mapped at a time. Each takes a file handle, and on macOS a process may have only 256."""


class JoinedTokens:
    """The tokens of several shards as one array: `tokens[a:b]`, where a to b must lie within one shard.

    Every document lies within one shard, so not all shards need to be open at once.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.starts = np.cumsum([0, *(shard.num_tokens for shard in shards)])
        self.map = lru_cache(MAX_MAPPED)(lambda index: shards[index].tokens())

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, span: slice) -> np.ndarray:
        index = int(np.searchsorted(self.starts[1:-1], span.start, side="right"))
        start = int(self.starts[index])
        assert span.stop <= self.starts[index + 1], f"tokens {span.start} to {span.stop} lie in two shards"
        return self.map(index)[span.start - start : span.stop - start]


@dataclass(frozen=True)
class TokenShards:
    """An opened corpus: document i is `tokens[offsets[i] : offsets[i + 1]]`."""

    tokens: np.ndarray | JoinedTokens
    """[N] uint16 or uint32"""
    offsets: np.ndarray
    """[D + 1] int64"""
    fingerprint: str
    """of the tokens and boundaries, so it is the same on every machine"""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document with its <|endoftext|>, [D]."""
        return np.diff(self.offsets)

    @classmethod
    def join(cls, shards: Sequence[Shard]) -> TokenShards:
        """A corpus of several shards, in order. A single shard keeps its fingerprint. Shards may be empty."""
        shards = [shard for shard in shards if shard.num_tokens]
        if len(shards) == 1:
            return cls(shards[0].tokens(), shards[0].offsets, shards[0].sha256[:16])
        lengths = np.concatenate([np.zeros(1, dtype=np.int64), *(np.diff(shard.offsets) for shard in shards)])
        digest = hashlib.sha256(" ".join(shard.sha256 for shard in shards).encode())
        return cls(JoinedTokens(shards), np.cumsum(lengths), digest.hexdigest()[:16])


@dataclass(frozen=True)
class Shard:
    """A shard on disk that has passed all checks."""

    folder: Path
    dtype: np.dtype[Any]
    offsets: np.ndarray
    """[D + 1] int64"""
    sha256: str
    """of tokens and offsets"""
    num_rows: int
    num_bad: int
    bad_lines: list[tuple[int, str]]
    """(line, reason) of the first bad rows of its source"""
    notes: Notes
    """what its source holds and training does not use"""

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    def tokens(self) -> np.ndarray:
        """Memory-map the tokens. (An empty file cannot be mapped.)"""
        if self.num_tokens == 0:
            return np.zeros(0, dtype=self.dtype)
        return np.memmap(self.folder / "tokens.bin", dtype=self.dtype, mode="r", shape=(self.num_tokens,))


def tokenize_texts(texts: Iterable[str], tokenizer: Any) -> TokenShards:
    """Tokenise a small corpus in memory."""
    parts, ends = [np.zeros(0, dtype=token_dtype(tokenizer.vocab_size))], [np.zeros(1, dtype=np.int64)]
    num_tokens = 0
    for chunk in chunks_of(texts, tokenizer):
        encoded = encode_chunk(tokenizer, chunk)
        parts.append(encoded.tokens)
        ends.append(encoded.ends + num_tokens)
        num_tokens += len(encoded.tokens)
    tokens, offsets = np.concatenate(parts), np.concatenate(ends)
    digest = hashlib.sha256(tokens.data)
    digest.update(offsets.data)
    return TokenShards(tokens, offsets, digest.hexdigest()[:16])


def write_shard(
    chunks: Iterable[EncodedChunk],
    tokenizer: Any,
    folder: str | Path,
    bad_rows: BadRows | None = None,
    source: str = "",
) -> None:
    """Write tokenised documents to a folder. It appears when it is complete; if anything fails, it stays unchanged.

    Args:
        bad_rows: those of the source; read after the last chunk.
        source: its path or address, for people.
    """
    bad_rows = BadRows() if bad_rows is None else bad_rows
    digest = hashlib.sha256()
    ends: list[np.ndarray] = [np.zeros(1, dtype=np.int64)]
    num_tokens = 0
    with atomic_folder(folder, flush=False) as fresh:  # `open_shard` checks a hash of all content
        with open(fresh / "tokens.bin", "wb") as file:
            for chunk in chunks:
                file.write(chunk.tokens.data)
                digest.update(chunk.tokens.data)
                ends.append(chunk.ends + num_tokens)
                num_tokens += len(chunk.tokens)
        offsets = np.concatenate(ends)
        digest.update(offsets.data)
        offsets.tofile(fresh / "offsets.bin")
        meta = {
            "version": FORMAT_VERSION,
            "source": source,
            "tokenizer": tokenizer.fingerprint,
            "num_tokens": num_tokens,
            "num_documents": len(offsets) - 1,
            "num_rows": bad_rows.num_rows,
            "num_bad": bad_rows.num_bad,
            "notes": [[*key, count] for key, count in bad_rows.notes.items()],
            "bad_lines": [[row.line, row.reason[:MAX_REASON_CHARACTERS]] for row in bad_rows.listed],
            "sha256": digest.hexdigest(),
        }
        (fresh / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def open_shard(folder: str | Path, tokenizer: Any) -> Shard:
    """Open and check a folder that `write_shard` made with this tokenizer.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is damaged, or made with another tokenizer.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected a token shard; tokenise the data")
    try:
        return _checked_shard(folder, tokenizer)
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        reason = f"no {error} in meta.json" if isinstance(error, KeyError) else error
        raise ValueError(f"{folder}: damaged token shard ({reason}); delete the folder to make it again") from None


def _checked_shard(folder: Path, tokenizer: Any) -> Shard:
    for name in FILES:  # to open a pipe would wait for a writer
        _require((folder / name).is_file(), f"no file {name}")
    _require((folder / "meta.json").stat().st_size <= MAX_META_BYTES, "meta.json is too large")
    meta = parse_json((folder / "meta.json").read_bytes())
    _require(isinstance(meta, dict), "meta.json is not an object")
    _require(meta["version"] == FORMAT_VERSION, f"format {shown(meta['version'])}; expected {FORMAT_VERSION}")
    _require(meta["tokenizer"] == tokenizer.fingerprint, "made with another tokenizer")
    numbers = [meta[name] for name in ("num_tokens", "num_documents", "num_rows", "num_bad")]
    _require(
        all(type(number) is int and 0 <= number < 2**62 for number in numbers), f"impossible numbers {shown(numbers)}"
    )
    num_tokens, num_documents, num_rows, num_bad = numbers
    bad_lines = [(line, reason) for line, reason in meta["bad_lines"]]
    _require(all(type(line) is int and isinstance(reason, str) for line, reason in bad_lines), "bad_lines are others")
    listed = meta.get("notes", [])  # older shards have none
    _require(all([type(part) for part in note] == [str, str, int] for note in listed), "notes are others")
    notes = Counter({(what, name): count for what, name, count in listed})
    _require(len(bad_lines) <= num_bad <= num_rows, f"{len(bad_lines)} of {num_bad} bad rows of {num_rows} are listed")
    dtype = token_dtype(tokenizer.vocab_size)
    for name, size in (("tokens.bin", num_tokens * dtype.itemsize), ("offsets.bin", (num_documents + 1) * 8)):
        found = (folder / name).stat().st_size
        _require(found == size, f"{name} has {found} bytes; expected {size}")
    offsets = np.fromfile(folder / "offsets.bin", dtype=np.int64)
    rising = bool((offsets[1:] > offsets[:-1]).all())  # a difference could overflow
    _require(offsets[0] == 0 and offsets[-1] == num_tokens and rising, "offsets.bin does not rise from 0 to the end")
    digest = hashlib.sha256()
    with open(folder / "tokens.bin", "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            largest = int(np.frombuffer(block, dtype=dtype).max())
            _require(largest < tokenizer.vocab_size, f"token id {largest} of {tokenizer.vocab_size} in tokens.bin")
    digest.update(offsets.data)
    _require(digest.hexdigest() == meta["sha256"], "the content does not match its hash")
    return Shard(folder, dtype, offsets, digest.hexdigest(), num_rows, num_bad, bad_lines, notes)


def _require(holds: bool | np.bool_, reason: str) -> None:
    if not holds:
        raise ValueError(reason)


def count_bad_rows(shard: Shard, source: str, bad_rows: BadRows) -> None:
    """Add the bad rows of a shard's source to the counts of a corpus."""
    for line, reason in shard.bad_lines:
        bad_rows.add(BadRow(source, line, reason))
    bad_rows.num_bad += shard.num_bad - len(shard.bad_lines)
    bad_rows.num_rows += shard.num_rows
    bad_rows.add_notes(shard.notes)
