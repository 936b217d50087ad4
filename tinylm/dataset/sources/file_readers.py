"""One file -> its rows, by kind. A row that cannot be read is a BadRow; a file that cannot be is an error."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, cast

from tinylm.dataset.sources.object_stores import open_binary
from tinylm.dataset.sources.record_shapes import BadRow, Record

DOCUMENT_END = "<|endoftext|>"
"""A line of a text file that holds only this ends a document, as in the TinyStories files."""

MAX_ROW_BYTES = 64 << 20
"""Of a line of JSON: a gzipped file of 64 KB can hold one of as many MB, and a row takes several times its text."""


def _read_text(file: str) -> Iterator[Record | BadRow]:
    lines: list[str] = []
    start = 1
    line = 0
    with opened(file) as handle:
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
    with opened(file) as handle:
        for line, raw in enumerate(iter(lambda: handle.readline(MAX_ROW_BYTES + 1), b""), start=1):
            if len(raw) > MAX_ROW_BYTES:
                raise ValueError(
                    f"{file}, line {line}: over {MAX_ROW_BYTES >> 20} MB without an end; expected one object a line"
                )
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
    with opened(file) as handle:
        raw = handle.read()
    try:
        rows = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # also brackets too deep, a number too long for Python
        raise ValueError(
            f"{file}: not JSON ({error}); expected a list of objects; for one a line, use .jsonl"
        ) from None
    if not isinstance(rows, list):
        raise ValueError(f"{file}: holds a {type(rows).__name__}; expected a list of objects; put it in [ ]")
    for number, row in enumerate(rows, start=1):
        yield make_record(row, file, number)


def _read_parquet(file: str) -> Iterator[Record | BadRow]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    with opened(file) as handle:
        try:
            with parquet.ParquetFile(handle) as table:
                for batch in table.iter_batches(batch_size=256):
                    for row in batch.to_pylist():
                        number += 1
                        yield make_record(row, file, number)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: cannot be read as parquet ({error}); download it again") from None


class opened:
    """Open a plain or gzipped file or object in binary; what goes wrong while reading names the file."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __enter__(self) -> IO[bytes]:
        try:
            self.raw = open_binary(self.file)
        except OSError as error:
            if error.strerror is None:  # an object's, in words already
                raise
            raise ValueError(f"{self.file}: cannot be opened ({error.strerror}); check its permissions") from None
        return cast("IO[bytes]", gzip.GzipFile(fileobj=self.raw) if self.file.lower().endswith(".gz") else self.raw)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self.raw.close()
        if isinstance(error, (OSError, EOFError, zlib.error)):
            raise ValueError(f"{self.file}: cannot be read ({error}); the file is damaged, fetch it again") from None


def _decode(raw: bytes, file: str, line: int) -> str | BadRow:
    try:
        return raw.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        return BadRow(file, line, f"not UTF-8 (byte {raw[error.start]:#04x} at {error.start})")


def _parse(text: str, file: str, line: int) -> Record | BadRow:
    try:
        return make_record(json.loads(text), file, line)
    except (ValueError, RecursionError) as error:
        return BadRow(file, line, f"not JSON ({error})")


def make_record(row: Any, file: str, line: int) -> Record | BadRow:
    if not isinstance(row, dict):
        return BadRow(file, line, f"a {type(row).__name__}; expected a JSON object")
    return Record(row, file, line)


READERS: dict[str, Callable[[str], Iterator[Record | BadRow]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
"""End of a file's name -> what reads it."""
