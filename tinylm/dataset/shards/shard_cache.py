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
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tinylm.dataset.shards.token_shards import (
    FORMAT_VERSION,
    Shard,
    TokenShards,
    count_bad_rows,
    open_shard,
    write_shard,
)
from tinylm.dataset.shards.tokenizing import EncodedChunk, available_cores, chunks_of, encode_chunk, process_map
from tinylm.dataset.sources.finding import HUB_PREFIX, Source, find_sources, is_address, open_binary
from tinylm.dataset.sources.records import NO_ROWS, BadRows, read_texts
from tinylm.files.atomic import remove_leftovers
from tinylm.files.locks import try_to_lock

PARALLEL_FROM = 4 << 20
"""Bytes of a file from which worker processes pay. A smaller one is tokenised in this process, where the `tokenizers`
library uses all cores too."""

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
    num_processes: int | None = None,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> TokenShards:
    """Open the shards of `path` in `cache_dir`, and make them first where they are missing or damaged.

    Args:
        path: as for `find_files`.
        num_processes: that tokenise, 0 for this one alone; None is one per core for files from PARALLEL_FROM on.
        progress: called with (documents, tokens) that this process has done so far.
        notice: called with a line about each damaged shard.

    Raises:
        FileNotFoundError, ValueError: as `read_records` and BadRows do; the shards that are done stay.
    """
    bad_rows = BadRows() if bad_rows is None else bad_rows
    sources = find_sources(path)
    folders = [Path(cache_dir) / shard_name(source, tokenizer) for source in sources]
    counter = _Counter(progress)
    shards = _open_good(folders, tokenizer, notice)
    while missing := {folder: source for folder, source in zip(folders, sources, strict=True) if folder not in shards}:
        _sweep(Path(cache_dir))
        made = _tokenize_missing(missing, tokenizer, num_processes, counter)
        shards |= made
        if not made:  # other processes work at all of them
            time.sleep(WAIT_SECONDS)
            shards |= _open_good(missing, tokenizer)
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


def _open_good(
    folders: Iterable[Path], tokenizer: Any, notice: Callable[[str], None] | None = None
) -> dict[Path, Shard]:
    """Those of the shards that exist and are undamaged."""
    shards: dict[Path, Shard] = {}
    for folder in folders:
        try:
            shards[folder] = open_shard(folder, tokenizer)
        except FileNotFoundError:
            pass
        except ValueError as error:
            if notice is not None:
                notice(str(error).replace("delete the folder, it is made anew", "its source is tokenised anew"))
    return shards


def _tokenize_missing(
    missing: dict[Path, Source], tokenizer: Any, num_processes: int | None, counter: _Counter
) -> dict[Path, Shard]:
    """Tokenise those of the sources that no other process works at; returns their shards.

    It never waits for other processes: they may wait for what is unfinished here.
    """
    shards: dict[Path, Shard] = {}
    new_folders = [path for path in next(iter(missing)).parents if not path.exists()]
    cores = available_cores(len(missing)) if num_processes is None else num_processes
    try:
        with process_map(encode_chunk, (tokenizer,), cores) as map_chunks:  # starts no process before its first use
            for folder, source in missing.items():
                with _claim(folder) as is_ours:
                    if is_ours is False:
                        continue
                    shards |= _open_good([folder], tokenizer)  # another process may have made it since we looked
                    if folder in shards:
                        continue
                    bad_rows = BadRows()
                    chunks = chunks_of(read_texts(source.path, bad_rows))
                    is_large = num_processes is not None or source.size >= PARALLEL_FROM
                    encoded = map_chunks(chunks) if is_large else map(partial(encode_chunk, tokenizer), chunks)
                    write_shard(counter.count(encoded), tokenizer, folder, bad_rows)
                    shards[folder] = open_shard(folder, tokenizer)  # what is damaged now would be so the next time too
    finally:
        _remove_empty(new_folders)
    return shards


class _Counter:
    """Counts what is tokenised, and reports it."""

    def __init__(self, report: Progress | None) -> None:
        self.report = report
        self.num_documents = 0
        self.num_tokens = 0

    def count(self, chunks: Iterable[EncodedChunk]) -> Iterator[EncodedChunk]:
        """The same chunks, each counted once it is used."""
        for chunk in chunks:
            yield chunk
            self.num_documents += len(chunk.ends)
            self.num_tokens += len(chunk.tokens)
            if self.report is not None:
                self.report(self.num_documents, self.num_tokens)


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, the innermost first, as far as they are empty: where no shard was made, nothing stays."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


@contextlib.contextmanager
def _claim(folder: Path) -> Iterator[bool | None]:
    """Claim the right to make a shard, which only one process has at a time, for the block.

    True: this process has it. False: another one has it. None: the disk has no locks, so nobody knows; two processes
    may then do the same work, and the later result replaces its equal.
    """
    path = folder.with_name(f".{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        is_ours: bool | None = None
        with contextlib.suppress(OSError):
            is_ours = try_to_lock(file.fileno())
        try:
            yield is_ours
        finally:
            if is_ours is not False:
                with contextlib.suppress(OSError):  # another process may have removed the file, or hold it open
                    path.unlink()


def _sweep(cache_dir: Path) -> None:
    """Remove the unfinished shards of killed processes."""
    names = {leftover.name.split(".")[1] for end in ("tmp", "old") for leftover in cache_dir.glob(f".*.*.{end}")}
    for name in names:
        with _claim(cache_dir / name) as is_ours:
            if is_ours:
                remove_leftovers(cache_dir / name)
