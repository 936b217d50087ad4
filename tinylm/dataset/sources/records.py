"""Sources: files, folders, globs, addresses, data sets of the hub -> records; every error names file and line.

A path may name several, separated by commas; `@files.txt` is a file that names them, one a line.
Kinds of file, by the end of their names: .txt and .md (one document, or several between lines that hold just
<|endoftext|>), .jsonl and .jsonl.gz (an object a line), .json (a list of objects), .parquet (a record a row).
"""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tinylm.dataset.sources.file_readers import READERS, make_record, opened
from tinylm.dataset.sources.object_stores import is_address, list_objects
from tinylm.dataset.sources.record_shapes import BadRow, Message, Record, messages_of, preference_of, text_of

__all__ = [
    "BadRow", "BadRows", "Message", "Record", "Source", "find_files", "find_sources", "iterate_texts",
    "load_conversations", "load_preferences", "load_texts", "messages_of", "preference_of", "read_records",
    "text_of", "texts_of_file",
]  # fmt: skip

SUFFIXES = tuple(READERS)

HUB_PREFIX = "hub:"

LIST_PREFIX = "@"

NUM_LISTED = 10
"""Bad rows that an error lists; the rest are counted."""

NO_ROWS = "no rows; expected at least one; check the file"

Value = TypeVar("Value")


@dataclass(frozen=True)
class Source:
    """One file of a corpus, or one object, or one data set of the hub."""

    path: str
    size: int = 0
    """bytes; 0 where only reading tells"""
    version: str = ""
    """changes when the content does; "" where only reading tells"""


@dataclass
class BadRows:
    """Counts bad rows, keeps the first ten, and refuses the data when they are more than `limit` x rows.

    With the default of 0.001, one bad row is skipped among 1,000 rows and refused among 999.
    """

    limit: float = 0.001
    num_rows: int = 0
    """Rows read, good and bad."""
    num_bad: int = 0
    listed: list[BadRow] = field(default_factory=list)

    def add(self, error: BadRow) -> None:
        """Note one bad row."""
        self.num_bad += 1
        if len(self.listed) < NUM_LISTED:
            self.listed.append(error)

    def report(self) -> str:
        """One line on the bad rows, or "" where there are none."""
        if not self.num_bad:
            return ""
        lines: dict[tuple[str, str], list[str]] = {}
        for error in self.listed:
            lines.setdefault((error.path, error.reason), []).append(str(error.line))
        if self.num_bad > len(self.listed):
            list(lines.values())[-1].append(f"... {self.num_bad - len(self.listed)} more")
        found = (f"{path}, line {', '.join(numbers)}: {reason}" for (path, reason), numbers in lines.items())
        return f"{self.num_bad} of {self.num_rows} rows are bad: {'; '.join(found)}"

    def check(self) -> None:
        """Call when all rows are read.

        Raises:
            ValueError: if too many rows are bad.
        """
        if self.num_bad <= self.limit * self.num_rows:
            return
        share = math.ceil(100 * self.num_bad / self.num_rows) / 100
        skip = f", or skip them with --max_bad_rows {share:g}" if share < 1 else ""
        raise ValueError(
            f"{self.report()}; expected at most {self.limit:g} of the rows to be bad; correct the data{skip}"
        )


def load_texts(path: str, bad_rows: BadRows | None = None, replacements: Mapping[str, str] | None = None) -> list[str]:
    """All documents under `path`; see `read_records` and BadRows. Raises ValueError if there is none."""
    return list(_values(path, text_of, bad_rows, replacements))


def load_conversations(
    path: str, bad_rows: BadRows | None = None, replacements: Mapping[str, str] | None = None
) -> list[list[Message]]:
    """All chats under `path`; see `read_records` and BadRows. Raises ValueError if there is none.

    Args:
        bad_rows: counts what is skipped and sets the limit; the default limit without it.
        replacements: {"name": "Ada"} puts Ada wherever the data says {{name}}.
    """
    return list(_values(path, messages_of, bad_rows, replacements))


def load_preferences(
    path: str, bad_rows: BadRows | None = None, replacements: Mapping[str, str] | None = None
) -> list[tuple[list[Message], list[Message], list[Message]]]:
    """All preference pairs under `path`; see `read_records` and BadRows. Raises ValueError if there is
    none."""
    return list(_values(path, preference_of, bad_rows, replacements))


def iterate_texts(path: str, bad_rows: BadRows | None = None) -> Iterator[str]:
    """`load_texts`, one document at a time, for corpora larger than memory."""
    return _values(path, text_of, bad_rows, None)


def texts_of_file(file: str, bad_rows: BadRows) -> Iterator[str]:
    """The documents of one of the files that `find_files` found. Bad rows are counted, and the caller judges them."""
    return _good_values(_read_file(file, bad_rows), text_of, bad_rows)


def _values(
    path: str,
    shape: Callable[[Record], Value],
    bad_rows: BadRows | None,
    replacements: Mapping[str, str] | None,
) -> Iterator[Value]:
    bad_rows = BadRows() if bad_rows is None else bad_rows
    num_values = 0
    for value in _good_values(read_records(path, bad_rows, replacements), shape, bad_rows):
        num_values += 1
        yield value
    bad_rows.check()
    if num_values == 0:
        raise ValueError(f"{path}: {NO_ROWS}")


def _good_values(records: Iterable[Record], shape: Callable[[Record], Value], bad_rows: BadRows) -> Iterator[Value]:
    for record in records:
        try:
            value = shape(record)
        except BadRow as error:
            bad_rows.add(error)
            continue
        yield value


def read_records(
    path: str, bad_rows: BadRows | None = None, replacements: Mapping[str, str] | None = None
) -> Iterator[Record]:
    """Records of all files that `path` names; see `find_files`.

    Args:
        bad_rows: takes rows that cannot be read; without it the first such row is raised.
        replacements: {"name": "Ada"} puts Ada wherever a text says {{name}}.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file is of an unknown kind, or cannot be read.
    """
    for file in find_files(path):
        for record in _read_file(file, bad_rows):
            yield Record(_replace(record.data, replacements), record.path, record.line) if replacements else record


def _read_file(file: str, bad_rows: BadRows | None) -> Iterator[Record]:
    for row in _read_hub(file) if file.startswith(HUB_PREFIX) else READERS[_suffix(file)](file):
        if bad_rows is not None:
            bad_rows.num_rows += 1
        if not isinstance(row, BadRow):
            yield row
        elif bad_rows is None:
            raise row
        else:
            bad_rows.add(row)


def find_files(path: str) -> list[str]:
    """The data files that `path` names: a file, a folder, a glob, an address, `hub:owner/name[:split]`, or several.

    Several are separated by commas, and `@files.txt` names a file with one a line; they come in the order given. The
    files of a folder or glob are sorted; in a folder, hidden files, README* and LICENSE* are left out.
    """
    return [source.path for source in find_sources(path)]


def find_sources(path: str) -> list[Source]:
    """`find_files`, with the size and version of each. Raises what `read_records` raises for paths."""
    return [source for part in _split(path) for source in _find(part)]


def _split(path: str) -> Iterator[str]:
    if os.path.exists(path):  # a name with a comma
        yield path
        return
    for part in path.split(","):
        part = part.strip()
        if not part.startswith(LIST_PREFIX):
            yield part
            continue
        file = part.removeprefix(LIST_PREFIX)
        if not is_address(file) and not os.path.isfile(file):
            raise FileNotFoundError(f"{part}: no such file; expected a list of paths, one a line; check the path")
        try:
            with opened(file) as handle:
                lines = [line.strip() for line in handle.read().decode("utf-8-sig").splitlines()]
        except UnicodeDecodeError:
            raise ValueError(f"{part}: not UTF-8; expected a list of paths, one a line; convert the file") from None
        listed = [line for line in lines if line and not line.startswith("#")]
        if not listed:
            raise ValueError(f"{part}: the list is empty; expected a path or an address a line; add one")
        yield from listed


def _find(path: str) -> list[Source]:
    if not path:
        raise ValueError("data path '': expected a file, a folder or a glob; give one, or leave the setting out")
    if path.startswith(HUB_PREFIX):
        if not path.removeprefix(HUB_PREFIX).partition(":")[0]:
            raise ValueError(
                f"{path}: no data set named; expected {HUB_PREFIX}owner/name or {HUB_PREFIX}owner/name:split"
            )
        return [Source(path)]
    if is_address(path):
        return _find_objects(path)
    files = _find_local(path)
    states = [os.stat(file) for file in files]
    return [Source(file, s.st_size, str(s.st_mtime_ns)) for file, s in zip(files, states, strict=True)]


def _find_objects(address: str) -> list[Source]:
    sources = [Source(*found) for found in list_objects(address)]
    if glob.has_magic(address) or [source.path for source in sources] == [address]:
        _check_kinds([source.path for source in sources])
        return sources
    depth = len(address.rstrip("/").split("/"))
    data = [source for source in sources if _is_data(source.path.split("/")[depth:])]
    if not data:
        raise FileNotFoundError(f"{address}: no data file in this folder; expected {', '.join(SUFFIXES)}")
    return data


def _find_local(path: str) -> list[str]:
    if os.path.isdir(path):
        found = sorted(str(file) for file in Path(path).rglob("*") if file.is_file())
        files = [file for file in found if _is_data(os.path.relpath(file, path).split(os.sep))]
        if not files:
            raise FileNotFoundError(f"{path}: no data file in this folder; expected {', '.join(SUFFIXES)}")
        return files
    if os.path.exists(path):
        if not os.path.isfile(path):  # opening a pipe would wait for a writer
            raise ValueError(f"{path}: neither a file nor a folder; expected one of these; write the data to a file")
        files = [path]
    else:
        files = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
    if not files:
        raise FileNotFoundError(f"{path}: no such file or folder; expected a file, a folder or a glob; check the path")
    _check_kinds(files)
    return files


def _is_data(parts: list[str]) -> bool:
    """Whether a file of a folder, by the parts of its path in there, is one to read."""
    hidden = any(part.startswith(".") for part in parts)
    return bool(_suffix(parts[-1])) and not hidden and not parts[-1].upper().startswith(("README", "LICENSE"))


def _check_kinds(files: list[str]) -> None:
    for file in files:
        if not _suffix(file):
            raise ValueError(f"{file}: unknown kind of file; expected {', '.join(SUFFIXES)}; convert or rename it")


def _suffix(file: str) -> str:
    """Which of SUFFIXES the name ends with, or ""."""
    return next((suffix for suffix in SUFFIXES if file.lower().endswith(suffix)), "")


def _read_hub(path: str) -> Iterator[Record | BadRow]:
    """Stream `hub:owner/name[:split]` through the `datasets` library; the split is train unless named."""
    name, _, split = path.removeprefix(HUB_PREFIX).partition(":")
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{path}: the `datasets` library is not installed; expected it for {HUB_PREFIX} paths; "
            'install it with pip install "tinylm[hub]"'
        ) from None
    try:
        for number, row in enumerate(datasets.load_dataset(name, split=split or "train", streaming=True), start=1):
            yield make_record(dict(row), path, number)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be loaded ({error}); check the name, the split and the network") from None


def _replace(value: Any, replacements: Mapping[str, str]) -> Any:
    """The same value with {{key}} replaced in every string inside."""
    if isinstance(value, str):
        for key, text in replacements.items():
            value = value.replace("{{" + key + "}}", text)
        return value
    if isinstance(value, dict):
        return {key: _replace(item, replacements) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace(item, replacements) for item in value]
    return value
