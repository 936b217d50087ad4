"""Find the sources that a path names: files, folders, globs, addresses, data sets of the hub; and open one of them.

A path may name several, separated by commas; `@files.txt` is a file that lists them, one per line. The end of a file's
name tells its kind, one of SUFFIXES.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from tinylm.dataset.sources.object_stores import list_objects, open_object
from tinylm.files.untrusted import is_unicode, shown

SUFFIXES = (".txt", ".txt.gz", ".md", ".jsonl", ".jsonl.gz", ".json", ".parquet")
"""The kinds of file that `records.py` reads."""

HUB_PREFIX = "hub:"

LIST_PREFIX = "@"


@dataclass(frozen=True)
class Source:
    """One file, one object of a store, or one data set of the hub."""

    path: str
    size: int = 0
    """in bytes; 0 if unknown before reading"""
    version: str = ""
    """changes when the content changes; "" if unknown before reading"""


LeftOut = Callable[[str], None]
"""Called with the kind or name of each file of a folder that is not read: `.csv`, `README.md`."""


def find_files(path: str, left_out: LeftOut | None = None) -> list[str]:
    """The data files that `path` names: a file, a folder, a glob, an address, `hub:owner/name[:split]`, or several.

    Several are separated by commas, or listed in a file, one per line, as `@files.txt`; their order is kept. The files
    of a folder or glob are sorted. In a folder, hidden files, README*, LICENSE* and files of other kinds are left out;
    `left_out` hears of them, but for the hidden ones. `~` is the user's folder.
    """
    return [source.path for source in find_sources(path, left_out)]


def find_sources(path: str, left_out: LeftOut | None = None) -> list[Source]:
    """`find_files` with the size and version of each.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the path is malformed, or a file is of an unknown kind, or its name is not UTF-8.
    """
    return [source for part in _split_paths(path) for source in _find_one(os.path.expanduser(part), left_out)]


def suffix_of(file: str) -> str:
    """The one of SUFFIXES that the name ends with, or ""."""
    return next((suffix for suffix in SUFFIXES if file.lower().endswith(suffix)), "")


def is_address(path: str) -> bool:
    """True for s3://..., gs://..., hf://... and all other addresses of fsspec."""
    return "://" in path


def open_binary(path: str) -> io.BufferedIOBase:
    """Open a local file, or an object by its address."""
    return open_object(path) if is_address(path) else open(path, "rb")


@contextlib.contextmanager
def open_unpacked(file: str) -> Iterator[IO[bytes]]:
    """Open a plain or gzipped file or object in binary.

    Raises:
        ValueError: it cannot be opened, or reading it inside the block fails; the message names the file.
    """
    try:
        raw = open_binary(file)
    except OSError as error:
        if error.strerror is None:  # from an object store: already explained
            raise
        raise ValueError(f"{file}: cannot be opened ({error.strerror}); check its permissions") from None
    with raw:
        try:
            yield cast("IO[bytes]", gzip.GzipFile(fileobj=raw) if file.lower().endswith(".gz") else raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{file}: cannot be read ({error}); the file is damaged, fetch it again") from None


def _split_paths(path: str) -> Iterator[str]:
    if os.path.exists(path):  # a name with a comma
        yield path
        return
    for part in path.split(","):
        part = part.strip()
        if not part.startswith(LIST_PREFIX):
            yield part
            continue
        file = os.path.expanduser(part.removeprefix(LIST_PREFIX))
        if not is_address(file) and not os.path.isfile(file):
            raise FileNotFoundError(f"{part}: no such file; expected a list of paths, one a line; check the path")
        try:
            with open_unpacked(file) as handle:
                lines = [line.strip() for line in handle.read().decode("utf-8-sig").splitlines()]
        except UnicodeDecodeError:
            raise ValueError(f"{part}: not UTF-8; expected a list of paths, one a line; convert the file") from None
        listed = [line for line in lines if line and not line.startswith("#")]
        if not listed:
            raise ValueError(f"{part}: the list is empty; expected a path or an address a line; add one")
        yield from listed


def _find_one(path: str, left_out: LeftOut | None) -> list[Source]:
    if not path:
        raise ValueError("data path '': expected a file, a folder or a glob; give one, or leave the setting out")
    if path.startswith(HUB_PREFIX):
        if not path.removeprefix(HUB_PREFIX).partition(":")[0]:
            raise ValueError(
                f"{path}: no data set named; expected {HUB_PREFIX}owner/name or {HUB_PREFIX}owner/name:split"
            )
        return [Source(path)]
    if is_address(path):
        return _find_objects(path, left_out)
    files = _find_local(path, left_out)
    for file in files:
        if not is_unicode(file):
            raise ValueError(f"{shown(file, 200)}: the file's name is not UTF-8; expected one that is; rename the file")
    states = [os.stat(file) for file in files]
    return [Source(file, s.st_size, str(s.st_mtime_ns)) for file, s in zip(files, states, strict=True)]


def _find_objects(address: str, left_out: LeftOut | None) -> list[Source]:
    sources = [Source(*found) for found in list_objects(address)]
    if glob.has_magic(address) or [source.path for source in sources] == [address]:
        _check_suffixes([source.path for source in sources])
        return sources
    depth = len(address.rstrip("/").split("/"))
    data = [source for source in sources if _is_data_file(source.path.split("/")[depth:], left_out)]
    if not data:
        raise FileNotFoundError(f"{address}: no data file in this folder; expected {', '.join(SUFFIXES)}")
    return data


def _find_local(path: str, left_out: LeftOut | None) -> list[str]:
    if os.path.isdir(path):
        found = sorted(str(file) for file in Path(path).rglob("*") if file.is_file())
        files = [file for file in found if _is_data_file(os.path.relpath(file, path).split(os.sep), left_out)]
        if not files:
            raise FileNotFoundError(f"{path}: no data file in this folder; expected {', '.join(SUFFIXES)}")
        return files
    if os.path.exists(path):
        if not os.path.isfile(path):  # to open a pipe would wait for a writer
            raise ValueError(f"{path}: neither a file nor a folder; expected one of these; write the data to a file")
        files = [path]
    else:
        files = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
    if not files:
        raise FileNotFoundError(f"{path}: no such file or folder; expected a file, a folder or a glob; check the path")
    _check_suffixes(files)
    return files


def _is_data_file(parts: list[str], left_out: LeftOut | None) -> bool:
    """Whether a file in a folder is to be read, by the parts of its path relative to the folder."""
    if any(part.startswith(".") for part in parts):
        return False
    name, is_known = parts[-1], bool(suffix_of(parts[-1]))
    if is_known and not name.upper().startswith(("README", "LICENSE")):
        return True
    if left_out is not None:
        left_out(name if is_known else os.path.splitext(name)[1].lower() or name)
    return False


def _check_suffixes(files: list[str]) -> None:
    for file in files:
        if not suffix_of(file):
            raise ValueError(f"{file}: unknown kind of file; expected {', '.join(SUFFIXES)}; convert or rename it")
