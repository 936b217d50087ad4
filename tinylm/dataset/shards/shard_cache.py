"""The shards of a corpus, one for each source: missing ones are made, each by one process.

The name of a shard's folder is a fingerprint of all that decides its tokens. So shards that exist are opened, sources
without one are tokenised, an interrupted run continues with the files that are left, and a new file costs only its own
time. Shards are kept in the cache of all runs, or in the run's own folder if the cache cannot be used.

Processes that share a disk share the work. Each goes through the list until nothing is missing, and claims a source
before it tokenises it. Machines that do not share a disk each make all shards. The same code serves both cases. Order
and fingerprint follow from the list of sources, not from who tokenised them.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tinylm.dataset.shards.claims import claim, sweep
from tinylm.dataset.shards.shard_names import (
    earlier_shard_name,
    full_path,
    has_known_content,
    require_unchanged,
    shard_names,
)
from tinylm.dataset.shards.shared_cache import SharedCache
from tinylm.dataset.shards.token_shards import Shard, TokenShards, count_bad_rows, open_shard, write_shard
from tinylm.dataset.shards.tokenizing import EncodedChunk, available_cores, chunks_of, encode_chunk, process_map
from tinylm.dataset.sources.finding import Source, find_sources
from tinylm.dataset.sources.records import NO_ROWS, BadRows, read_texts

PARALLEL_FROM = 4 << 20
"""Size in bytes from which a file is worth worker processes. Smaller files are tokenised in this process, where the
`tokenizers` library uses all cores too."""

WAIT_SECONDS = 0.2
"""How long to wait for other processes before looking for their shards again."""

Progress = Callable[[int, int], None]
Notice = Callable[[str], None]


def cached_token_shards(
    path: str,
    tokenizer: Any,
    own_folder: str | Path,
    bad_rows: BadRows | None = None,
    num_processes: int | None = None,
    progress: Progress | None = None,
    notice: Notice | None = None,
    cache: SharedCache | None = None,
    resume: bool = False,
) -> TokenShards:
    """Open the shards of `path`; make those that are missing or damaged first.

    Args:
        path: as for `find_files`.
        own_folder: the run's own shards. Those that are there are used. New ones are made there if there is no cache
            or it cannot be used, and for sources whose content is unknown before reading.
        num_processes: how many tokenise; 0 is this process, with all cores. None is one per core for files from
            PARALLEL_FROM on, and this process for smaller ones.
        progress: called with the numbers of documents and tokens that this process has done so far.
        notice: called with a line about each damaged shard, and about what the cache did.
        cache: the cache of all runs; None for none. Its shards stay there while the result is in use.
        resume: also use the shards that an earlier version made for this run, under names of another kind.

    Raises:
        FileNotFoundError, ValueError: as `read_records` and BadRows raise them. Finished shards stay.
    """
    bad_rows = BadRows() if bad_rows is None else bad_rows
    sources = find_sources(path, bad_rows.add_left_out)
    names = shard_names(sources, tokenizer, cache.hashes_of(path) if cache is not None else None)
    own = _own_folders(Path(own_folder), sources, names, tokenizer, resume)
    work = _Work(sources, tokenizer, num_processes, _Counter(progress), notice or (lambda line: None))
    with contextlib.ExitStack() as uses:
        shards = work.complete(own) if cache is None else _complete_in_cache(work, own, cache, uses)
        for shard, source in zip(shards, sources, strict=True):
            count_bad_rows(shard, source.path, bad_rows)
        bad_rows.check()
        corpus = TokenShards.join(shards)
        if len(corpus.offsets) == 1:
            raise ValueError(f"{path}: {NO_ROWS}")
        weakref.finalize(corpus, uses.pop_all().close)
    return corpus


def _own_folders(
    place: Path, sources: Sequence[Source], names: Sequence[str], tokenizer: Any, resume: bool
) -> list[Path]:
    """The folder of each source's shard in the run's own folder."""
    folders = [place / name for name in names]
    if not resume or not place.is_dir():
        return folders
    missing = [index for index, folder in enumerate(folders) if not folder.exists()]
    earlier = {index: place / earlier_shard_name(sources[index], tokenizer) for index in missing}
    return [earlier[i] if i in earlier and earlier[i].exists() else folder for i, folder in enumerate(folders)]


def _complete_in_cache(work: _Work, own: list[Path], cache: SharedCache, uses: contextlib.ExitStack) -> list[Shard]:
    """The shards of all sources; missing ones are made in the cache.

    If it cannot be written (a full or read-only disk, no rights, no locks), the rest is made in the run's own folder.

    Args:
        uses: releases the shards when it is closed.
    """
    pairs = list(zip(work.sources, own, strict=True))
    folders = [cache.shards / mine.name if has_known_content(s) and not mine.exists() else mine for s, mine in pairs]
    names = {folder.name for folder in folders if folder.parent == cache.shards}
    good: dict[Path, Shard] = {}
    try:
        uses.callback(cache.lease(names).release)
        good = work.open_good(folders, say=True)
        num_found = sum(folder in good for folder in folders)
        shards = work.complete(folders, good)
    except OSError as error:
        reason = error.strerror or str(error)
        work.notice(f"the cache {cache.root} cannot be used ({reason}): token shards go to {own[0].parent}")
        places = [folder if folder in good else mine for folder, mine in zip(folders, own, strict=True)]
        return work.complete(places, good)
    work.notice(f"tokenised before: {num_found} of {len(folders)} files (cache {cache.root})")
    cache.touch(names)
    if num_found < len(folders):
        _prune(cache, work.notice)
    return shards


def _prune(cache: SharedCache, notice: Notice) -> None:
    """Bring the cache down to its bound, if that is possible now."""
    with contextlib.suppress(OSError):
        if removed := cache.prune():
            size = sum(entry.num_bytes for entry in removed) / 1e9
            notice(f"the cache was full: the {len(removed)} token shards used longest ago removed ({size:.2f} GB)")


@dataclass
class _Work:
    """The sources of a corpus, and how they are tokenised."""

    sources: Sequence[Source]
    tokenizer: Any
    num_processes: int | None
    counter: _Counter
    notice: Notice

    def complete(self, folders: Sequence[Path], good: dict[Path, Shard] | None = None) -> list[Shard]:
        """The sources' shards, each in its folder; missing ones are made.

        Args:
            good: those that are open already; new ones are added.
        """
        good = self.open_good(folders, say=True) if good is None else good
        has_said = False
        while missing := {f: source for f, source in zip(folders, self.sources, strict=True) if f not in good}:
            for place in {folder.parent for folder in missing}:
                sweep(place)
            made = self._tokenize(missing, good)
            if not made:  # other processes are working on all of them
                if not has_said:
                    self.notice(f"waiting for another process that tokenises {len(missing)} of the files")
                has_said = True
                time.sleep(WAIT_SECONDS)
                good |= self.open_good(missing)
        return [good[folder] for folder in folders]

    def open_good(self, folders: Iterable[Path], say: bool = False) -> dict[Path, Shard]:
        """Those of the shards that exist and are undamaged.

        Args:
            say: give notice of the damaged ones.
        """
        shards: dict[Path, Shard] = {}
        for folder in folders:
            try:
                shards[folder] = open_shard(folder, self.tokenizer)
            except FileNotFoundError:
                pass
            except ValueError as error:
                if say:
                    reason = str(error).replace("delete the folder to make it again", "its source is tokenised again")
                    self.notice(reason)
        return shards

    def _tokenize(self, missing: dict[Path, Source], good: dict[Path, Shard]) -> bool:
        """Tokenise the sources that no other process is working on, and add their shards to `good`.

        It does not wait for other processes, because they may wait for this one. Returns whether it has added any.
        """
        before = len(good)
        places = {folder.parent for folder in missing}
        new_folders = [path for place in places for path in (place, *place.parents) if not path.exists()]
        cores = available_cores(len(missing)) if self.num_processes is None else self.num_processes
        try:
            with process_map(encode_chunk, (self.tokenizer,), cores) as map_chunks:  # starts a process when needed
                for folder, source in missing.items():
                    with claim(folder) as is_ours:
                        if is_ours is not False:
                            good |= self.open_good([folder])  # another process may just have made it
                        if is_ours is not False and folder not in good:
                            self._write(source, folder, map_chunks)
                            good[folder] = open_shard(folder, self.tokenizer)  # if damaged, it would be so again
        finally:
            _remove_empty(new_folders)
        return len(good) > before

    def _write(self, source: Source, folder: Path, map_chunks: Callable[..., Iterator[EncodedChunk]]) -> None:
        """Tokenise a source into its folder."""
        bad_rows = BadRows(own_tokens=getattr(self.tokenizer, "own_tokens", ()))

        def texts() -> Iterator[str]:
            yield from read_texts(source.path, bad_rows)
            require_unchanged(source)

        chunks = chunks_of(texts(), self.tokenizer)
        is_large = self.num_processes is not None or source.size >= PARALLEL_FROM
        encoded = map_chunks(chunks) if is_large else map(partial(encode_chunk, self.tokenizer), chunks)
        write_shard(self.counter.count(encoded), self.tokenizer, folder, bad_rows, full_path(source))


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
