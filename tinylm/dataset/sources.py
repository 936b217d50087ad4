"""Sources: a file, a folder, a glob or a data set of the hub -> records; every error names file and line.

Kinds of file, by the end of their names: .txt and .md (one document, or several between lines that hold just
<|endoftext|>), .jsonl and .jsonl.gz (an object a line), .json (a list of objects), .parquet (a record a row).
"""

from __future__ import annotations

import glob
import gzip
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from tinylm.dataset.record_shapes import BadRow, Message, Record, messages_of, preference_of, text_of

__all__ = [
    "BadRow", "BadRows", "Message", "Record", "find_files", "load_conversations", "load_preferences", "load_texts",
    "iterate_texts", "messages_of", "preference_of", "read_records", "text_of",
]  # fmt: skip

SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".json", ".parquet")

DOCUMENT_END = "<|endoftext|>"
"""A line of a text file that holds only this ends a document, as in the TinyStories files."""

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


def load_texts(
    path: str, bad_rows: BadRows | None = None, replacements: Mapping[str, str] | None = None
) -> list[str]:
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
        rows = (row for file in find_files(path) for row in _READERS[_suffix(file)](file))
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
        files = [path]
    else:
        files = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
    if not files:
        raise FileNotFoundError(
            f"{path}: no such file or folder; expected a file, a folder or a glob; check the path"
        )
    for file in files:
        if not _suffix(file):
            raise ValueError(
                f"{file}: unknown kind of file; expected {', '.join(SUFFIXES)}; convert or rename it"
            )
    return files


def _suffix(file: str) -> str:
    """Which of SUFFIXES the name ends with, or ""."""
    return next((suffix for suffix in SUFFIXES if file.lower().endswith(suffix)), "")


def _read_text(file: str) -> Iterator[Record | BadRow]:
    lines: list[str] = []
    start = 1
    line = 0
    with _opened(file) as handle:
        for line, raw in enumerate(handle, start=1):
            text = _decode(raw, file, line)
            if isinstance(text, BadRow):  # half a text is no text, so this is no matter of a limit
                raise ValueError(f"{text}; convert the file to UTF-8")
            if line == 1:
                text = text.removeprefix("\ufeff")  # the byte-order mark some editors write
            if text.strip() != DOCUMENT_END:
                lines.append(text)
                continue
            if "".join(lines).strip():
                yield Record({"text": "".join(lines)}, file, start)
            lines, start = [], line + 1
    if "".join(lines).strip():
        yield Record({"text": "".join(lines)}, file, start)
    elif line == 0:
        raise ValueError(f"{file}: the file is empty; expected text; check the path")


def _read_jsonl(file: str) -> Iterator[Record | BadRow]:
    empty = True
    with _opened(file) as handle:
        for line, raw in enumerate(handle, start=1):
            text = _decode(raw, file, line)
            if isinstance(text, BadRow):
                empty = False
                yield text
            elif text.strip():
                empty = False
                yield _parse(text.removeprefix("\ufeff"), file, line)
    if empty:
        raise ValueError(f"{file}: the file is empty; expected a JSON object a line; check the path")


def _read_json(file: str) -> Iterator[Record | BadRow]:
    try:
        with _opened(file) as handle:
            rows = json.loads(handle.read().decode("utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file}: not JSON ({error}); expected a list of objects; for one a line, use .jsonl"
        ) from None
    if not isinstance(rows, list):
        raise ValueError(f"{file}: holds a {type(rows).__name__}; expected a list of objects; put it in [ ]")
    for number, row in enumerate(rows, start=1):
        yield _record(row, file, number)


def _read_parquet(file: str) -> Iterator[Record | BadRow]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as handle:
            number = 0
            for batch in handle.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield _record(row, file, number)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: cannot be read as parquet ({error}); download it again") from None


def _read_hub(path: str) -> Iterator[Record | BadRow]:
    """Stream `hub:owner/name[:split]` through the `datasets` library; the split is train unless named."""
    name, _, split = path.removeprefix(HUB_PREFIX).partition(":")
    if not name:
        raise ValueError(
            f"{path}: no data set named; expected {HUB_PREFIX}owner/name or {HUB_PREFIX}owner/name:split"
        )
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{path}: the `datasets` library is not installed; expected it for {HUB_PREFIX} paths; "
            'install it with pip install "tinylm[hub]"'
        ) from None
    try:
        for number, row in enumerate(
            datasets.load_dataset(name, split=split or "train", streaming=True), start=1
        ):
            yield _record(dict(row), path, number)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: cannot be loaded ({error}); check the name, the split and the network"
        ) from None


_READERS: dict[str, Callable[[str], Iterator[Record | BadRow]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


class _opened:
    """Open a plain or gzipped file in binary; what goes wrong while reading names the file."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __enter__(self) -> IO[bytes]:
        try:
            self.handle = gzip.open(self.file) if self.file.lower().endswith(".gz") else open(self.file, "rb")
        except OSError as error:
            raise ValueError(
                f"{self.file}: cannot be opened ({error.strerror}); check its permissions"
            ) from None
        return cast("IO[bytes]", self.handle)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self.handle.close()
        if isinstance(error, (OSError, EOFError, zlib.error)):
            raise ValueError(
                f"{self.file}: cannot be read ({error}); the file is damaged, fetch it again"
            ) from None


def _decode(raw: bytes, file: str, line: int) -> str | BadRow:
    try:
        return raw.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        return BadRow(file, line, f"not UTF-8 (byte {raw[error.start]:#04x} at {error.start})")


def _parse(text: str, file: str, line: int) -> Record | BadRow:
    try:
        return _record(json.loads(text), file, line)
    except (json.JSONDecodeError, RecursionError) as error:
        return BadRow(file, line, f"not JSON ({error})")


def _record(row: Any, file: str, line: int) -> Record | BadRow:
    if not isinstance(row, dict):
        return BadRow(file, line, f"a {type(row).__name__}; expected a JSON object")
    return Record(row, file, line)


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
