"""The shards of a corpus, one for each source file: made where they are missing, each by one process.

A shard's folder is named by a fingerprint of its source and the tokenizer. So what is there is opened, what is missing
is tokenised, an interrupted run goes on with the files not yet done, and a new file costs only itself.

Processes that share a disk share the work: each claims a file that nobody works at (a lock on a file beside the shard,
which the system frees when its holder ends, however it ends), and goes through the list until nothing is missing.
Processes with other disks have their own shards and locks, so each machine makes all it needs, and nobody has to know
which of both it is. Order and fingerprint come from the list of sources, whoever tokenised what.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from tinylm.dataset.shards.processes import available_cores, map_in_order
from tinylm.dataset.shards.text_chunks import Part, Piece, chunks_of, encode_chunk_of
from tinylm.dataset.shards.token_shards import (
    FORMAT_VERSION,
    Shard,
    TokenShards,
    count_bad_rows,
    open_shard,
    write_shard,
)
from tinylm.dataset.sources.object_stores import is_address, open_binary
from tinylm.dataset.sources.records import HUB_PREFIX, NO_ROWS, BadRows, Source, find_sources, texts_of_file
from tinylm.files.atomic import remove_leftovers
from tinylm.files.locks import try_to_lock

PARALLEL_FROM = 4 << 20
"""Bytes of sources from which starting worker processes pays."""

SAMPLE_BYTES = 1 << 20
"""How much of a file's start and of its end goes into the fingerprint, beside its size and time of change."""

WAIT_SECONDS = 0.2
"""Between looks at the files that other processes work at."""

Progress = Callable[[int, int], None]


def cached_token_shards(
    path: str,
    tokenizer: Any,
    cache_dir: str | Path,
    bad_rows: BadRows | None = None,
    num_workers: int | None = None,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> TokenShards:
    """Open the shards of `path` in `cache_dir`, and make them first where they are missing or damaged.

    Args:
        path: as for `find_files`.
        num_workers: processes that tokenise; None is one a core for more than 4 MB.
        progress: called with (documents, tokens) that this process has done so far.
        notice: called with a line about each damaged shard.

    Raises:
        FileNotFoundError, ValueError: as `read_records` and BadRows do; the shards that are done stay.
    """
    bad_rows = BadRows() if bad_rows is None else bad_rows
    sources = find_sources(path)
    folders = [Path(cache_dir) / shard_name(source, tokenizer) for source in sources]
    missing = dict(zip(folders, sources, strict=True))
    shards: dict[Path, Shard] = {}
    while True:
        for folder in list(missing):
            if (shard := _open_if_good(folder, tokenizer, notice)) is not None:
                shards[folder] = shard
                del missing[folder]
        if not missing:
            break
        _sweep(Path(cache_dir))
        written = _tokenize_missing(missing, tokenizer, num_workers, progress)
        for folder in written:
            shards[folder] = open_shard(folder, tokenizer)  # what is damaged now would be so the next time too
            del missing[folder]
        if not written:
            time.sleep(WAIT_SECONDS)
    for folder, source in zip(folders, sources, strict=True):
        count_bad_rows(shards[folder], source.path, bad_rows)
    bad_rows.check()
    corpus = TokenShards.join([shards[folder] for folder in folders])
    if len(corpus.offsets) == 1:
        raise ValueError(f"{path}: {NO_ROWS}")
    return corpus


def shard_name(source: Source, tokenizer: Any) -> str:
    """Changes with the tokenizer, and with the source's name, size, version (of a file: time of change), start or end.

    Start and end are not read where an object store tells a version, which is a hash of all the content.
    """
    digest = hashlib.sha256(f"{FORMAT_VERSION} {tokenizer.fingerprint} ".encode())
    name = source.path if source.path.startswith(HUB_PREFIX) else os.path.basename(source.path)
    digest.update(f"{name} {source.size} {source.version}\n".encode())
    if not source.path.startswith(HUB_PREFIX) and not (is_address(source.path) and source.version):
        with open_binary(source.path) as file:
            digest.update(file.read(SAMPLE_BYTES))
            file.seek(max(0, source.size - SAMPLE_BYTES))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _open_if_good(folder: Path, tokenizer: Any, notice: Callable[[str], None] | None = None) -> Shard | None:
    try:
        return open_shard(folder, tokenizer)
    except FileNotFoundError:
        return None
    except ValueError as error:
        if notice is not None:
            notice(str(error).replace("delete the folder, it is made anew", "its source is tokenised anew"))
        return None


def _tokenize_missing(
    missing: dict[Path, Source], tokenizer: Any, num_workers: int | None, progress: Progress | None
) -> list[Path]:
    """Tokenise those of the sources that no other process works at; returns their folders.

    It never waits for others: they may wait for what is unfinished here.
    """
    if num_workers is None:
        size = sum(source.size for source in missing.values())
        num_workers = available_cores(len(missing)) if size >= PARALLEL_FROM else 0
    claims: dict[Path, _Claim] = {}
    counters: dict[Path, BadRows] = {}
    totals = [0, 0]

    def chunks() -> Iterator[tuple[Path, list[Piece]]]:
        for folder, source in missing.items():
            claim = held.enter_context(_Claim(folder))
            if not claim.is_ours or _open_if_good(folder, tokenizer) is not None:  # done since we looked
                claim.release()
                continue
            claims[folder], counters[folder] = claim, BadRows()
            for chunk in chunks_of(texts_of_file(source.path, counters[folder])):
                yield folder, chunk
            yield folder, []  # its end

    def counted(parts: Iterator[tuple[Path, Part]]) -> Iterator[Part]:
        for _, part in parts:
            if len(part[0]) == 0:  # the end of the file
                return
            yield part
            totals[0], totals[1] = totals[0] + len(part[1]), totals[1] + len(part[0])
            if progress is not None:
                progress(*totals)

    with contextlib.ExitStack() as held:
        held.callback(_remove_empty, [path for path in next(iter(missing)).parents if not path.exists()])
        results = held.enter_context(
            contextlib.closing(map_in_order(encode_chunk_of, (tokenizer,), chunks(), num_workers))
        )
        for first in results:
            folder = first[0]
            write_shard(counted(chain([first], results)), tokenizer, folder, counters[folder])
            claims[folder].release()
    return list(claims)


def _remove_empty(folders: list[Path]) -> None:
    """Where no shard was made, nothing stays."""
    with contextlib.suppress(OSError):  # the first that is not empty ends it
        for folder in folders:
            folder.rmdir()


class _Claim:
    """The right to make a shard, which one process has at a time."""

    def __init__(self, folder: Path) -> None:
        self.path = folder.with_name(f".{folder.name}.lock")
        self.file: IO[bytes] | None = None
        self.is_locked = False
        """False on a disk without locks: two processes may do the same work, and the later result replaces its equal"""

    @property
    def is_ours(self) -> bool:
        """Whether no other process has it."""
        return self.file is not None

    def __enter__(self) -> _Claim:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "wb")
        try:
            self.is_locked = try_to_lock(self.file.fileno())
        except OSError:
            return self
        if not self.is_locked:
            self.file.close()
            self.file = None
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Let others have it; safe to call twice."""
        if self.file is not None:
            with contextlib.suppress(OSError):  # another process may have taken the file away, or hold it open
                self.path.unlink()
            self.file.close()
            self.file = None


def _sweep(cache_dir: Path) -> None:
    """Take away what killed processes left half done."""
    names = {leftover.name.split(".")[1] for end in ("tmp", "old") for leftover in cache_dir.glob(f".*.*.{end}")}
    for name in names:
        with _Claim(cache_dir / name) as claim:
            if claim.is_locked:
                remove_leftovers(cache_dir / name)
