"""Read the records of data files, and the texts, chats and preference pairs in them; errors name file and line.

The end of a file's name tells its kind: .txt, .txt.gz and .md (one document, or several with a line <|endoftext|>
between them), .jsonl and .jsonl.gz (one object per line), .json (a list of objects), .parquet (one record per row). A
row that cannot be read is a BadRow, which is counted; a file that cannot be read is an error.
"""

from __future__ import annotations

import codecs
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from tinylm.dataset.sources.finding import HUB_PREFIX, find_files, open_unpacked, suffix_of
from tinylm.dataset.sources.record import (
    CONTROL_TOKENS,
    OUR_TOKENS,
    PLACEHOLDER,
    BadRow,
    Notes,
    Record,
    fail,
    printable,
)
from tinylm.dataset.sources.record_shapes import (
    RECORD_FIELDS,
    Message,
    PreferencePair,
    messages_of,
    named_text_of,
    preference_of,
    text_of,
)
from tinylm.files.untrusted import parse_json

DOCUMENT_END = "<|endoftext|>"
"""A line of a text file with only this ends a document, as in the TinyStories files."""

MAX_ROW_BYTES = 64 << 20
"""The longest line of JSON: a gzipped file of 64 KB can hold a line of 64 MB, and a row in memory takes several times
the size of its text."""

NUM_LISTED = 10
"""Bad rows that an error lists; the rest are counted."""

MAX_NOTES = 200
"""Different names that are counted; a file with other fields in each row could hold millions."""

LEFT_OUT = "files of the folder that are left out"

NO_ROWS = "no rows; expected at least one; check the file"

Value = TypeVar("Value")


@dataclass
class BadRows:
    """Counts bad rows, keeps the first ten, and refuses the data when they are more than `limit` x rows.

    With the default of 0.001, one bad row is skipped among 1,000 rows and refused among 999. It also counts what the
    good rows hold and training does not use.
    """

    limit: float = 0.001
    num_rows: int = 0
    """Rows read, good and bad."""
    num_bad: int = 0
    listed: list[BadRow] = field(default_factory=list)
    notes: Notes = field(default_factory=Counter)
    own_tokens: Sequence[str] = ()
    """Control tokens of the tokenizer, beside ours, that are counted where a text spells them."""

    def add(self, error: BadRow) -> None:
        """Count one bad row."""
        self.num_bad += 1
        if len(self.listed) < NUM_LISTED:
            self.listed.append(error)

    def add_notes(self, notes: Notes) -> None:
        """Count what a row holds and training does not use."""
        for (what, name), count in notes.items():
            key = what, printable(name, 40)
            known = key in self.notes or len(self.notes) < MAX_NOTES
            self.notes[key if known else (what, "others")] += count

    def add_left_out(self, kind: str) -> None:
        """Count a file of a folder that is not read."""
        self.add_notes(Counter({(LEFT_OUT, kind): 1}))

    def remarks(self, control_tokens: str = "they are learnt as letters") -> list[str]:
        """A line about each kind of thing that was found and is not used.

        Args:
            control_tokens: what happens with control tokens spelt in the text.
        """
        names: dict[str, list[str]] = {}
        for (what, name), count in self.notes.most_common():
            names.setdefault(what, []).append(f"{name} ({count:,})")
        lines = []
        for what, found in names.items():
            more = f" and {len(found) - NUM_LISTED} more" if len(found) > NUM_LISTED else ""
            end = f"; {control_tokens}" if what == CONTROL_TOKENS else ""
            lines.append(f"{what}: {', '.join(found[:NUM_LISTED])}{more}{end}")
        return lines

    def report(self) -> str:
        """One line about the bad rows, or "" if there are none."""
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
        """Call this when all rows are read.

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


def load_conversations(
    path: str, bad_rows: BadRows | None = None, replacements: Mapping[str, str] | None = None
) -> list[list[Message]]:
    """All chats under `path`; see `read_records` and BadRows. Raises ValueError if there is none.

    Args:
        bad_rows: counts the skipped rows and sets the limit; without it, the default limit holds.
        replacements: {"name": "Ada"} replaces {{name}} in the data by Ada; one without a replacement is a bad row.
    """
    return list(_load(path, messages_of, bad_rows, replacements))


def load_preferences(
    path: str, bad_rows: BadRows | None = None, replacements: Mapping[str, str] | None = None
) -> list[PreferencePair]:
    """All preference pairs under `path`; see `read_records` and BadRows. Raises ValueError if there is none."""
    return list(_load(path, preference_of, bad_rows, replacements))


def iterate_texts(path: str, bad_rows: BadRows | None = None) -> Iterator[str]:
    """All documents under `path`, one at a time; see `read_records` and BadRows. Raises ValueError if there is none."""
    return _load(path, text_of, bad_rows, None)


def iterate_named_texts(path: str, bad_rows: BadRows, name_field: str) -> Iterator[tuple[str, str]]:
    """`iterate_texts`, each after the name of its part: what the record has in `name_field`, or else its file."""
    return _load(path, partial(named_text_of, name_field=name_field), bad_rows, None)


def read_texts(file: str, bad_rows: BadRows) -> Iterator[str]:
    """The documents of one of the files that `find_files` found. Bad rows are counted, not raised."""
    return _parse_records(_read_file(file, bad_rows), text_of, bad_rows)


def _load(
    path: str,
    shape: Callable[[Record], Value],
    bad_rows: BadRows | None,
    replacements: Mapping[str, str] | None,
) -> Iterator[Value]:
    bad_rows = BadRows() if bad_rows is None else bad_rows
    num_values = 0
    for value in _parse_records(read_records(path, bad_rows, replacements), shape, bad_rows):
        num_values += 1
        yield value
    bad_rows.check()
    if num_values == 0:
        raise ValueError(f"{path}: {NO_ROWS}")


def _parse_records(records: Iterable[Record], shape: Callable[[Record], Value], bad_rows: BadRows) -> Iterator[Value]:
    own = "|".join(map(re.escape, sorted(bad_rows.own_tokens, key=len, reverse=True)))
    control_tokens = re.compile(f"{own}|{OUR_TOKENS.pattern}") if own else OUR_TOKENS
    for record in records:
        if own:
            record = replace(record, control_tokens=control_tokens)
        try:
            value = shape(record)
        except BadRow as error:
            bad_rows.add(error)
            continue
        bad_rows.add_notes(record.notes)
        yield value


def read_records(
    path: str, bad_rows: BadRows | None = None, replacements: Mapping[str, str] | None = None
) -> Iterator[Record]:
    """Records of all files that `path` names; see `find_files`.

    Args:
        bad_rows: counts the rows that cannot be read; without it, the first one is raised.
        replacements: {"name": "Ada"} replaces {{name}} in every text by Ada; one without a replacement is a bad row.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file is of an unknown kind or cannot be read.
    """
    for file in find_files(path, None if bad_rows is None else bad_rows.add_left_out):
        for record in _read_file(file, bad_rows):
            try:
                yield record if replacements is None else _filled(record, replacements)
            except BadRow as error:
                if bad_rows is None:
                    raise
                bad_rows.add(error)


def _read_file(file: str, bad_rows: BadRows | None) -> Iterator[Record]:
    for row in _read_hub(file) if file.startswith(HUB_PREFIX) else READERS[suffix_of(file)](file):
        if bad_rows is not None:
            bad_rows.num_rows += 1
        if not isinstance(row, BadRow):
            yield row
        elif bad_rows is None:
            raise row
        else:
            bad_rows.add(row)


def _filled(record: Record, replacements: Mapping[str, str]) -> Record:
    """The record with {{name}} and {{author}} replaced in every text. BadRow for one without a replacement."""

    def fill(found: re.Match[str]) -> str:
        if found[1] not in replacements:
            fail(record, f"no text for {found[0]}; pass --{found[1]}, or --{found[1]} '{found[0]}' to keep it as it is")
        return replacements[found[1]]

    def replace(value: Any) -> Any:
        if isinstance(value, str):
            return PLACEHOLDER.sub(fill, value) if "{{" in value else value
        if isinstance(value, dict):
            return {key: replace(item) for key, item in value.items()}
        return [replace(item) for item in value] if isinstance(value, list) else value

    return Record(replace(record.data), record.path, record.line)


def _read_text(file: str) -> Iterator[Record | BadRow]:
    lines: list[str] = []
    start = 1
    line = 0
    with open_unpacked(file) as handle:
        for line, raw in enumerate(handle, start=1):
            text = _decode(raw, file, line)
            if isinstance(text, BadRow):  # part of a text is useless, so no limit applies
                raise ValueError(f"{text}; convert the file to UTF-8")
            if line == 1:
                text = text.removeprefix("\ufeff")  # the byte-order mark that some editors write
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
    with open_unpacked(file) as handle:
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
    with open_unpacked(file) as handle:
        raw = handle.read().removeprefix(codecs.BOM_UTF8)
    if hint := _utf16_hint(raw):
        raise ValueError(f"{file}: {hint}; expected JSON in UTF-8; convert the file to UTF-8")
    try:
        value = parse_json(raw, finite=False)
    except ValueError as error:
        raise ValueError(
            f"{file}: not JSON ({error}); expected a list of objects; for one a line, use .jsonl"
        ) from None
    for number, row in enumerate(_rows_of(value, file), start=1):
        yield _make_record(row, file, number)


def _rows_of(value: Any, file: str) -> list[Any]:
    """The rows in a JSON file: a list of objects, such a list under a name of its own, or a single record."""
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        if any(name in value for name in RECORD_FIELDS):
            return [value]
        inner = list(value.values())
        if len(inner) == 1 and isinstance(inner[0], list):
            return inner[0]
        found = f"an object with the fields {printable(', '.join(map(str, value)), 100) or '(none)'}"
    else:
        found = f"a {type(value).__name__}"
    raise ValueError(f"{file}: holds {found}; expected a list of objects; leave only the list of records in the file")


def _read_parquet(file: str) -> Iterator[Record | BadRow]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    with open_unpacked(file) as handle:
        try:
            with parquet.ParquetFile(handle) as table:
                for batch in table.iter_batches(batch_size=256):
                    for row in batch.to_pylist():
                        number += 1
                        yield _make_record(row, file, number)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: cannot be read as parquet ({error}); download it again") from None


def _read_hub(path: str) -> Iterator[Record | BadRow]:
    """Stream `hub:owner/name[:split]` with the `datasets` library; the default split is train."""
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
            yield _make_record(dict(row), path, number)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be loaded ({error}); check the name, the split and the network") from None


def _decode(raw: bytes, file: str, line: int) -> str | BadRow:
    try:
        return raw.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        hint = _utf16_hint(raw)
        reason = f"not UTF-8 (byte {raw[error.start]:#04x} at {error.start})"
        return BadRow(file, line, f"{reason}; it {hint}" if hint else reason)


def _utf16_hint(raw: bytes) -> str:
    """What to say about bytes that are not text in UTF-8 or not JSON: "" or that they look like UTF-16."""
    return "looks like UTF-16" if b"\0" in raw or raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else ""


def _parse(text: str, file: str, line: int) -> Record | BadRow:
    try:
        return _make_record(parse_json(text, finite=False), file, line)
    except ValueError as error:
        hint = "; it looks like UTF-16, convert the file to UTF-8" if "\0" in text else ""
        if line == 1 and text.startswith("["):
            hint = "; expected one object a line; for a list of objects, name the file .json"
        return BadRow(file, line, f"not JSON ({error}){hint}")


def _make_record(row: Any, file: str, line: int) -> Record | BadRow:
    if not isinstance(row, dict):
        return BadRow(file, line, f"a {type(row).__name__}; expected a JSON object")
    return Record(row, file, line)


READERS: dict[str, Callable[[str], Iterator[Record | BadRow]]] = {
    ".txt": _read_text,
    ".txt.gz": _read_text,
    ".md": _read_text,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
"""End of a file's name -> what reads it."""
