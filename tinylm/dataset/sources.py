"""Sources: a file, a folder, a glob or a data set of the hub -> records; every error names file and line.

Kinds of file, by the end of their names: .txt and .md (one document, or several between lines that hold just
<|endoftext|>), .jsonl and .jsonl.gz (an object a line), .json (a list of objects), .parquet (a record a row).
"""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tinylm.dataset.file_readers import READERS, make_record
from tinylm.dataset.record_shapes import BadRow, Message, Record, messages_of, preference_of, text_of

__all__ = [
    "BadRow", "BadRows", "Message", "Record", "find_files", "iterate_texts", "load_conversations",
    "load_preferences", "load_texts", "messages_of", "preference_of", "read_records", "text_of",
]  # fmt: skip

SUFFIXES = tuple(READERS)

HUB_PREFIX = "hub:"

NUM_LISTED = 10
"""Bad rows that an error lists; the rest are counted."""

Value = TypeVar("Value")


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


def _values(
    path: str,
    shape: Callable[[Record], Value],
    bad_rows: BadRows | None,
    replacements: Mapping[str, str] | None,
) -> Iterator[Value]:
    bad_rows = BadRows() if bad_rows is None else bad_rows
    num_values = 0
    for record in read_records(path, bad_rows, replacements):
        try:
            value = shape(record)
        except BadRow as error:
            bad_rows.add(error)
            continue
        num_values += 1
        yield value
    bad_rows.check()
    if num_values == 0:
        raise ValueError(f"{path}: no rows; expected at least one; check the file")


def read_records(
    path: str, bad_rows: BadRows | None = None, replacements: Mapping[str, str] | None = None
) -> Iterator[Record]:
    """Records of a file, of all files of a folder, of a glob, or of `hub:owner/name[:split]`.

    Args:
        bad_rows: takes rows that cannot be read; without it the first such row is raised.
        replacements: {"name": "Ada"} puts Ada wherever a text says {{name}}.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file is of an unknown kind, or cannot be read.
    """
    if path.startswith(HUB_PREFIX):
        rows = _read_hub(path)
    else:
        rows = (row for file in find_files(path) for row in READERS[_suffix(file)](file))
    for row in rows:
        if bad_rows is not None:
            bad_rows.num_rows += 1
        if isinstance(row, BadRow):
            if bad_rows is None:
                raise row
            bad_rows.add(row)
        elif replacements:
            yield Record(_replace(row.data, replacements), row.path, row.line)
        else:
            yield row


def find_files(path: str) -> list[str]:
    """The data files that `path` names, sorted. In a folder, hidden files, README* and LICENSE* are left
    out."""
    if not path:
        raise ValueError("data path '': expected a file, a folder or a glob; give one, or leave the setting out")
    if os.path.isdir(path):
        found = sorted(str(file) for file in Path(path).rglob("*") if file.is_file())
        names = [os.path.relpath(file, path).split(os.sep) for file in found]
        files = [
            file
            for file, parts in zip(found, names, strict=True)
            if _suffix(file)
            and not any(part.startswith(".") for part in parts)
            and not parts[-1].upper().startswith(("README", "LICENSE"))
        ]
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
    for file in files:
        if not _suffix(file):
            raise ValueError(f"{file}: unknown kind of file; expected {', '.join(SUFFIXES)}; convert or rename it")
    return files


def _suffix(file: str) -> str:
    """Which of SUFFIXES the name ends with, or ""."""
    return next((suffix for suffix in SUFFIXES if file.lower().endswith(suffix)), "")


def _read_hub(path: str) -> Iterator[Record | BadRow]:
    """Stream `hub:owner/name[:split]` through the `datasets` library; the split is train unless named."""
    name, _, split = path.removeprefix(HUB_PREFIX).partition(":")
    if not name:
        raise ValueError(f"{path}: no data set named; expected {HUB_PREFIX}owner/name or {HUB_PREFIX}owner/name:split")
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
