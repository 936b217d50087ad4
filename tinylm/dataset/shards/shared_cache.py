"""The cache of token shards that all runs of a user share: its place, its bound, and who uses what.

    CACHE/token_shards/NAME/   a shard; its name tells all that decides its tokens, see `shard_names.py`
    CACHE/uses/ID.lock, .json  a run that uses shards: a lock that ends with its process, and the shards' names
    CACHE/sources/             hashes of files, so that unchanged files are not read again to be named
    CACHE/.lock                held for a moment by whoever starts to use shards or removes some

A run names the shards that it uses before it looks for them. Whoever removes shards first reads all these names. Both
hold the lock, so no shard disappears between a run's look and its use.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinylm.dataset.shards.claims import sweep
from tinylm.files.locks import file_lock, try_to_lock

DIR_VARIABLE, GB_VARIABLE = "TINYLM_CACHE_DIR", "TINYLM_CACHE_GB"

DEFAULT_GB = 10.0
"""Gigabytes of token shards that are kept: those of about 20 GB of English text."""

LOCK_PATIENCE = 60.0
"""Seconds to wait for another process that removes shards."""

FORGET_SECONDS = 90 * 86400
"""Hashes of files that no run has asked for in this time are removed."""

_SHARD_NAME = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Entry:
    """A shard in the cache."""

    folder: Path
    num_bytes: int
    used: float
    """when a run opened it last, in seconds since 1970"""

    def facts(self) -> dict[str, Any]:
        """Its meta.json; empty if it is damaged."""
        try:
            facts = json.loads((self.folder / "meta.json").read_bytes())
            return facts if isinstance(facts, dict) else {}
        except (OSError, ValueError, RecursionError):
            return {}


class Lease:
    """A run's use of shards, until `release`, or until the process ends in any way."""

    def __init__(self, uses: Path, names: Iterable[str]) -> None:
        self.lock, self.names = _use_files(uses / f"{os.getpid()}-{secrets.token_hex(8)}.lock")
        self.file = open(self.lock, "wb")
        try:
            try_to_lock(self.file.fileno())
            self.names.write_text(json.dumps(sorted(set(names))))
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let the shards be removed. A second call does nothing."""
        self.file.close()
        for path in (self.names, self.lock):
            with contextlib.suppress(OSError):
                path.unlink()


class SharedCache:
    """A cache folder. Making the object opens and makes no file.

    Args:
        root: the folder.
        max_bytes: how much the shards may take together; `prune` brings them down to it.
    """

    def __init__(self, root: Path, max_bytes: float) -> None:
        self.root, self.max_bytes = root, max_bytes
        self.shards, self.uses, self.sources = root / "token_shards", root / "uses", root / "sources"

    def lease(self, names: Iterable[str]) -> Lease:
        """Name the shards that this process is going to use, whether they exist or not; until then they may disappear.

        Raises:
            OSError: the folder cannot be made or written, or its disk has no locks.
        """
        if not self.root.is_absolute():
            raise OSError(f"not a path from the root; set {DIR_VARIABLE}")
        for folder in (self.shards, self.uses):
            folder.mkdir(parents=True, exist_ok=True)
        with file_lock(self.root / ".lock", LOCK_PATIENCE):
            return Lease(self.uses, names)

    def hashes_of(self, path: str) -> Path | None:
        """The file that keeps the hashes of the sources that `path` names."""
        if not self.root.is_absolute():
            return None
        key = hashlib.sha256(f"{os.getcwd()}\n{path}".encode("utf-8", "surrogateescape")).hexdigest()[:16]
        return self.sources / f"{key}.json"

    def touch(self, names: Iterable[str]) -> None:
        """Remember that these shards were used now."""
        for name in names:
            with contextlib.suppress(OSError):
                os.utime(self.shards / name / "meta.json")

    def entries(self) -> list[Entry]:
        """All shards, the least recently used first."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self.shards) as found:
            folders = [Path(place.path) for place in found if place.is_dir(follow_symlinks=False)]
            entries = [_entry(folder) for folder in folders if _SHARD_NAME.fullmatch(folder.name)]
            return sorted(entries, key=lambda entry: (entry.used, entry.folder))
        return []

    def names_in_use(self) -> set[str]:
        """The shards of all runs that are alive. What runs that have ended left behind is removed.

        Raises:
            OSError: the disk has no locks.
        """
        names: set[str] = set()
        for lock in self.uses.glob("*.lock"):
            _, listed = _use_files(lock)
            mode = "r+b" if os.access(lock, os.W_OK) else "rb"  # file servers lock only what may be written
            with contextlib.suppress(FileNotFoundError), open(lock, mode) as file:  # it may end just now
                if not try_to_lock(file.fileno()):
                    names.update(json.loads(listed.read_bytes()))
                    continue
            for path in (listed, lock):
                with contextlib.suppress(OSError):
                    path.unlink()
        return names

    def prune(self, max_bytes: float | None = None) -> list[Entry]:
        """Remove the least recently used shards until the rest takes at most `max_bytes`; none that is in use.

        Returns the removed ones. What killed processes have left is removed too.

        Raises:
            OSError: the folder cannot be written, or its disk has no locks.
        """
        limit = self.max_bytes if max_bytes is None else max_bytes
        removed: list[Entry] = []
        if not self.shards.is_dir():
            return removed
        with file_lock(self.root / ".lock", LOCK_PATIENCE):
            sweep(self.shards)
            entries, in_use = self.entries(), self.names_in_use()
            total = sum(entry.num_bytes for entry in entries)
            for entry in entries:
                if total > limit and entry.folder.name not in in_use and _remove(entry.folder):
                    total -= entry.num_bytes
                    removed.append(entry)
            for path in self.sources.glob("*.json"):
                if limit == 0 or path.stat().st_mtime < time.time() - FORGET_SECONDS:
                    path.unlink(missing_ok=True)
        return removed


def shared_cache(cache_dir: str | None = None, cache_gb: float | None = None) -> SharedCache | None:
    """The cache of all runs, or None if its bound is 0: then each run keeps its own shards."""
    max_bytes = cache_bound(cache_gb)
    return SharedCache(cache_folder(cache_dir), max_bytes) if max_bytes else None


def cache_folder(cache_dir: str | None = None) -> Path:
    """The cache's folder: `cache_dir`, or else $TINYLM_CACHE_DIR, or else `tinylm` in the user's cache folder.

    The user's cache folder is that of the XDG rule, or the system's own on macOS and Windows.
    """
    if place := cache_dir or os.environ.get(DIR_VARIABLE, "").strip():
        return Path(place).expanduser().absolute()
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("tinylm", appauthor=False))


def cache_bound(cache_gb: float | None = None) -> float:
    """The most bytes of the cache: `cache_gb`, or else $TINYLM_CACHE_GB, or else DEFAULT_GB.

    Raises:
        ValueError: it is not a number of gigabytes.
    """
    name, bound = "cache_gb", DEFAULT_GB if cache_gb is None else cache_gb
    if cache_gb is None and (text := os.environ.get(GB_VARIABLE, "").strip()):
        name = GB_VARIABLE
        try:
            bound = float(text)
        except ValueError:
            raise ValueError(f"{name} is {text!r}; expected a number of gigabytes, such as 10") from None
    if math.isnan(bound) or bound < 0:
        raise ValueError(f"{name} is {bound}; expected a number of gigabytes, such as 10, or 0 for no cache")
    return bound * 1e9


def _use_files(lock: Path) -> tuple[Path, Path]:
    """The two files of a use. Windows lets nobody read a locked file, so the names are in a file of their own."""
    return lock, lock.with_suffix(".json")


def _entry(folder: Path) -> Entry:
    num_bytes, used = 0, 0.0
    with contextlib.suppress(OSError), os.scandir(folder) as files:
        for file in files:
            state = file.stat(follow_symlinks=False)
            num_bytes += state.st_size
            used = state.st_mtime if file.name == "meta.json" else used
    return Entry(folder, num_bytes, used)


def _remove(folder: Path) -> bool:
    """Remove a shard; False if the system refuses, as Windows does while a file in it is open.

    It is renamed first, so that a kill leaves no half of it: the next `sweep` removes the rest.
    """
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        os.rename(folder, aside)
    except OSError:
        return False
    shutil.rmtree(aside, ignore_errors=True)
    return True
