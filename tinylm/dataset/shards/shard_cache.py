"""The shards of a corpus, one for each source: missing ones are made, each by one process.

The name of a shard's folder is a fingerprint of its source and the tokenizer. So shards that exist are opened, sources
without one are tokenised, an interrupted run continues with the files that are left, and a new file costs only its own
time.

Processes that share a disk share the work. Each goes through the list until nothing is missing, and claims a source
before it tokenises it. A claim is a lock on a file beside the shard; the system releases it when the process ends for
any reason. Machines that do not share a disk each make all shards. The same code serves both cases. Order and
fingerprint follow from the list of sources, not from who tokenised them.
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
"""Size in bytes from which a file is worth worker processes. Smaller files are tokenised in this process, where the
`tokenizers` library uses all cores too."""

SAMPLE_BYTES = 1 << 20
"""The fingerprint covers this much of a file's start and end, and its size and time of change."""

WAIT_SECONDS = 0.2
"""How long to wait for other processes before looking for their shards again."""

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
    """Open the shards of `path` in `cache_dir`; make those that are missing or damaged first.

    Args:
        path: as for `find_files`.
        num_processes: how many tokenise; 0 is this process, with all cores. None is one per core for files from
            PARALLEL_FROM on, and this process for smaller ones.
        progress: called with the numbers of documents and tokens that this process has done so far.
        notice: called with a line about each damaged shard.

    Raises:
        FileNotFoundError, ValueError: as `read_records` and BadRows raise them. Finished shards stay.
    """
    bad_rows = BadRows() if bad_rows is None else bad_rows
    sources = find_sources(path, bad_rows.add_left_out)
    folders = [Path(cache_dir) / shard_name(source, tokenizer) for source in sources]
    counter = _Counter(progress)
    shards = _open_good(folders, tokenizer, notice)
    while missing := {folder: source for folder, source in zip(folders, sources, strict=True) if folder not in shards}:
        _sweep(Path(cache_dir))
        made = _tokenize_missing(missing, tokenizer, num_processes, counter)
        shards |= made
        if not made:  # other processes are working on all of them
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
    """A fingerprint of the tokenizer and of the source's name, size, version (a file's time of change), start and end.

    Start and end are not read if an object store gives a version, which depends on all the content.
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
                notice(str(error).replace("delete the folder to make it again", "its source is tokenised again"))
    return shards


def _tokenize_missing(
    missing: dict[Path, Source], tokenizer: Any, num_processes: int | None, counter: _Counter
) -> dict[Path, Shard]:
    """Tokenise the sources that no other process is working on; return their shards.

    It does not wait for other processes, because they may wait for this one.
    """
    shards: dict[Path, Shard] = {}
    new_folders = [path for path in next(iter(missing)).parents if not path.exists()]
    cores = available_cores(len(missing)) if num_processes is None else num_processes
    try:
        with process_map(encode_chunk, (tokenizer,), cores) as map_chunks:  # a process starts when it is first needed
            for folder, source in missing.items():
                with _claim(folder) as is_ours:
                    if is_ours is False:
                        continue
                    shards |= _open_good([folder], tokenizer)  # another process may just have made it
                    if folder in shards:
                        continue
                    bad_rows = BadRows()
                    chunks = chunks_of(read_texts(source.path, bad_rows))
                    is_large = num_processes is not None or source.size >= PARALLEL_FROM
                    encoded = map_chunks(chunks) if is_large else map(partial(encode_chunk, tokenizer), chunks)
                    write_shard(counter.count(encoded), tokenizer, folder, bad_rows)
                    shards[folder] = open_shard(folder, tokenizer)  # if it is damaged, it would be so again
    finally:
        _remove_empty(new_folders)
    return shards


class _Counter:
    """Counts documents and tokens, and reports the counts."""

    def __init__(self, report: Progress | None) -> None:
        self.report = report
        self.num_documents = 0
        self.num_tokens = 0

    def count(self, chunks: Iterable[EncodedChunk]) -> Iterator[EncodedChunk]:
        """The same chunks; each is counted after the consumer has used it."""
        for chunk in chunks:
            yield chunk
            self.num_documents += len(chunk.ends)
            self.num_tokens += len(chunk.tokens)
            if self.report is not None:
                self.report(self.num_documents, self.num_tokens)


def _remove_empty(folders: list[Path]) -> None:
    """Remove those folders that are empty, from the innermost on, so that a failed run leaves nothing behind."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


@contextlib.contextmanager
def _claim(folder: Path) -> Iterator[bool | None]:
    """Claim a shard for the block: only one process at a time may make it.

    True: this process has the claim. False: another one has it. None: the disk has no locks, so this is unknown. Then
    two processes may do the same work, and the later result replaces the equal earlier one.
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
                with contextlib.suppress(OSError):  # another process may have removed it or hold it open
                    path.unlink()


def _sweep(cache_dir: Path) -> None:
    """Remove the unfinished shards of killed processes."""
    names = {leftover.name.split(".")[1] for end in ("tmp", "old") for leftover in cache_dir.glob(f".*.*.{end}")}
    for name in names:
        with _claim(cache_dir / name) as is_ours:
            if is_ours:
                remove_leftovers(cache_dir / name)
