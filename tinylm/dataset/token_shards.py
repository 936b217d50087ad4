"""Token shards: a tokenised corpus on disk, memory-mapped, so that a corpus may be larger than memory.

A folder with `tokens.bin` (uint16, or uint32 for vocabularies above 65,536; each document ends with the
tokenizer's <|endoftext|>), `offsets.npy` (int64 [D + 1], where each document starts) and `meta.json`. The
folder appears when it is complete and not before. Its name is a fingerprint of the sources and the tokenizer:
change one of them, and the corpus is tokenised anew; otherwise the next run opens it at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinylm.atomic_files import atomic_folder
from tinylm.dataset.parallel import available_cores, map_in_order
from tinylm.dataset.sources import HUB_PREFIX, BadRows, find_files, iterate_texts

FORMAT_VERSION = 1

CHUNK_CHARACTERS = 1 << 20
"""Text sent to a worker at a time: about half a second of work."""

PIECE_CHARACTERS = 1 << 13
"""Long documents are tokenised in pieces of this size: a fifth faster than whole, and on all cores."""

PARALLEL_FROM = 4 << 20
"""Bytes of sources from which starting worker processes pays."""

SAMPLE_BYTES = 1 << 20
"""How much of a file's start and of its end goes into the fingerprint, beside its size and time of change."""

# Here the split pattern always cuts: no piece of it runs from a newline into a character that is not blank.
# So a long document is tokenised in parts, with the same result.
_SAFE_CUT = re.compile(r"\n(?=\S)")

Piece = tuple[str, bool]
"""Part of a document, and whether the document ends with it."""


@dataclass(frozen=True)
class TokenShards:
    """An opened corpus: document i is `tokens[offsets[i] : offsets[i + 1]]`."""

    tokens: np.ndarray
    """[N] uint16 or uint32"""
    offsets: np.ndarray
    """[D + 1] int64"""
    fingerprint: str
    """of the tokens and boundaries themselves, the same on every machine"""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document with its <|endoftext|>, [D]."""
        return np.diff(self.offsets)


def tokenize_texts(texts: Iterable[str], tokenizer: Any) -> TokenShards:
    """The same in memory, for small corpora."""
    parts, ends = [], [np.zeros(1, dtype=np.int64)]
    num_tokens = 0
    digest = hashlib.sha256()
    for chunk in _chunks(texts):
        part, part_ends = _encode_chunk(tokenizer, chunk)
        parts.append(part)
        ends.append(part_ends + num_tokens)
        num_tokens += len(part)
        digest.update(part.data)
    tokens = np.concatenate(parts) if parts else np.zeros(0, dtype=token_dtype(tokenizer.vocab_size))
    offsets = np.concatenate(ends)
    digest.update(offsets.data)
    return TokenShards(tokens, offsets, digest.hexdigest()[:16])


def cached_token_shards(
    path: str,
    tokenizer: Any,
    cache_dir: str | Path,
    bad_rows: BadRows | None = None,
    num_workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TokenShards:
    """Open the shards of `path` in `cache_dir`, and make them first where they are missing or damaged.

    Args:
        path: as for `read_records`.
        num_workers: processes that tokenise; None is one a core for more than 4 MB.
        progress: called with (documents, tokens) done so far.

    Raises:
        FileNotFoundError, ValueError: as `read_records` and BadRows do; nothing is written then.
    """
    folder = Path(cache_dir) / source_fingerprint(path, tokenizer)
    try:
        return open_token_shards(folder)
    except (FileNotFoundError, ValueError):
        texts = iterate_texts(path, bad_rows)
        if num_workers is None:
            size = 0 if path.startswith(HUB_PREFIX) else sum(os.path.getsize(file) for file in find_files(path))
            num_workers = available_cores() if size >= PARALLEL_FROM else 0
        write_token_shards(texts, tokenizer, folder, num_workers, progress)
    return open_token_shards(folder)


def write_token_shards(
    texts: Iterable[str],
    tokenizer: Any,
    folder: str | Path,
    num_workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Tokenise documents into a folder; it appears when complete, and stays as it was when anything fails."""
    digest = hashlib.sha256()
    ends: list[np.ndarray] = [np.zeros(1, dtype=np.int64)]
    num_tokens = num_documents = 0
    with atomic_folder(folder) as fresh:
        with open(fresh / "tokens.bin", "wb") as file:
            for part, part_ends in map_in_order(_encode_chunk, (tokenizer,), _chunks(texts), num_workers):
                file.write(part.data)
                digest.update(part.data)
                ends.append(part_ends + num_tokens)
                num_tokens += len(part)
                num_documents += len(part_ends)
                if progress is not None:
                    progress(num_documents, num_tokens)
        offsets = np.concatenate(ends)
        digest.update(offsets.data)
        np.save(fresh / "offsets.npy", offsets)
        meta = {
            "version": FORMAT_VERSION,
            "dtype": token_dtype(tokenizer.vocab_size).name,
            "num_tokens": num_tokens,
            "num_documents": num_documents,
            "tokenizer": tokenizer.fingerprint,
            "fingerprint": digest.hexdigest()[:16],
        }
        (fresh / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def open_token_shards(folder: str | Path) -> TokenShards:
    """Memory-map a folder that `write_token_shards` made.

    Raises:
        FileNotFoundError: there is no such folder, or a file of it is missing.
        ValueError: a file has not the size or content that `meta.json` tells.
    """
    folder = Path(folder)
    for name in ("meta.json", "tokens.bin", "offsets.npy"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: no such file; expected token shards; delete the folder")
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        version, dtype = meta["version"], np.dtype(meta["dtype"])
        num_tokens, num_documents = int(meta["num_tokens"]), int(meta["num_documents"])
        fingerprint = str(meta["fingerprint"])
        offsets = np.load(folder / "offsets.npy", mmap_mode="r", allow_pickle=False)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{folder}: damaged token shards ({error}); delete the folder, it is made anew") from None
    size, wanted = (folder / "tokens.bin").stat().st_size, num_tokens * dtype.itemsize
    if version != FORMAT_VERSION:
        raise ValueError(f"{folder}: format {version}; expected {FORMAT_VERSION}; delete the folder, it is made anew")
    if size != wanted or offsets.shape != (num_documents + 1,) or int(offsets[-1]) != num_tokens:
        raise ValueError(
            f"{folder}: tokens.bin has {size} bytes and offsets.npy {offsets.size} entries; expected "
            f"{wanted} and {num_documents + 1}; delete the folder, it is made anew"
        )
    if num_tokens == 0:  # an empty file cannot be mapped
        return TokenShards(np.zeros(0, dtype=dtype), offsets, fingerprint)
    return TokenShards(np.memmap(folder / "tokens.bin", dtype=dtype, mode="r"), offsets, fingerprint)


def source_fingerprint(path: str, tokenizer: Any) -> str:
    """Names the shards of `path`: changes with the tokenizer and with any file's size, time of change, start
    or end."""
    digest = hashlib.sha256(f"{FORMAT_VERSION} {tokenizer.fingerprint}".encode())
    if path.startswith(HUB_PREFIX):
        digest.update(path.encode())
        return digest.hexdigest()[:16]
    for name in find_files(path):
        status = os.stat(name)
        digest.update(f"{os.path.basename(name)} {status.st_size} {status.st_mtime_ns}\n".encode())
        with open(name, "rb") as file:
            digest.update(file.read(SAMPLE_BYTES))
            file.seek(max(0, status.st_size - SAMPLE_BYTES))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type that holds every token id."""
    return np.dtype(np.uint16) if vocab_size <= 1 << 16 else np.dtype(np.uint32)


def _chunks(texts: Iterable[str]) -> Iterator[list[Piece]]:
    """Pieces of documents, about CHUNK_CHARACTERS together."""
    chunk: list[Piece] = []
    size = 0
    for text in texts:
        for piece in _pieces(text):
            chunk.append(piece)
            size += len(piece[0])
            if size >= CHUNK_CHARACTERS:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk


def _pieces(text: str) -> Iterator[Piece]:
    """A document in pieces of about PIECE_CHARACTERS, cut where that changes no token."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        cut = _SAFE_CUT.search(text, start + PIECE_CHARACTERS)
        if cut is None:
            break
        yield text[start : cut.end()], False
        start = cut.end()
    yield text[start:], True


def _encode_chunk(tokenizer: Any, chunk: list[Piece]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a chunk, with <|endoftext|> after each document that ends in it, and where those end."""
    parts: list[list[int]] = []
    ends = []
    size = 0
    for ids, (_, is_end) in zip(tokenizer.encode_batch([text for text, _ in chunk]), chunk, strict=True):
        if is_end:
            ids.append(tokenizer.endoftext_id)
        parts.append(ids)
        size += len(ids)
        if is_end:
            ends.append(size)
    dtype = token_dtype(tokenizer.vocab_size)
    tokens = np.concatenate([np.array(ids, dtype=dtype) for ids in parts])
    return tokens, np.array(ends, dtype=np.int64)
