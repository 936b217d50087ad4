"""A row of data, what makes it a bad row, and the checks of the texts in it."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NoReturn

from tinylm.files.untrusted import is_unicode, parse_json
from tinylm.tokenizer.tokenizer import SPECIAL_TOKENS

Notes = Counter[tuple[str, str]]
"""(what is to be said about good rows, the name of a field or the like) -> how often. Each first part is a line."""

CONTROL_TOKENS = "control tokens spelt in the text"
NUL_CHARACTERS = "NUL characters in the text, learnt as they are"

PLACEHOLDERS = "places to fill that stay in the text"

PLACEHOLDER = re.compile(r"\{\{\s*(name|author)\s*\}\}")
"""{{name}} or {{ author }}, as the identity data of several projects has it; --name and --author fill it."""

OUR_TOKENS = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
"""All of them begin with <."""

_UTF16_SHARE = 1 / 3
"""Half of the bytes of English text in UTF-16 are NUL. With a larger share than this, a text is refused."""

_MAX_REASON = 600  # characters; our own longest reasons have 400


def printable(text: str, longest: int) -> str:
    """A stranger's text for a line of ours: not too long, and without control characters."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text[:longest])


@dataclass(frozen=True)
class Record:
    """One row of data and its place: `line` counts from 1 (lines of a text, rows of a parquet file)."""

    data: dict[str, Any]
    path: str
    line: int
    notes: Notes = field(default_factory=Counter, compare=False)
    """What the row holds and training does not use."""
    control_tokens: re.Pattern[str] = OUR_TOKENS
    """Names that are counted where a text spells them."""


class BadRow(ValueError):
    """A row that cannot be used; the message names file and line.

    The reason may quote the row (its field names), so control characters are replaced and long reasons are cut.
    """

    def __init__(self, path: str, line: int, reason: str) -> None:
        reason = printable(reason, _MAX_REASON)
        super().__init__(f"{path}, line {line}: {reason}")
        self.path = path
        self.line = line
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadRow], tuple[str, int, str]]:
        return BadRow, (self.path, self.line, self.reason)


def fail(record: Record, reason: str) -> NoReturn:
    """Raise BadRow for this record."""
    raise BadRow(record.path, record.line, reason)


def is_empty(value: Any) -> bool:
    """Whether a field says nothing. `0` and `false` are values, and so is a text of spaces."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def checked_text(record: Record, value: Any, name: str) -> str:
    """The text in the field `name`. Control tokens and NUL characters in it are counted."""
    if not isinstance(value, str):
        fail(record, f"{name} is {type_name(value)}; expected a string")
    if not value.isascii() and not is_unicode(value):
        fail(record, f"{name} holds half a surrogate pair; expected valid Unicode")
    if "\0" in value:
        found = value.count("\0")
        if found > _UTF16_SHARE * len(value):
            fail(record, f"{name} looks like UTF-16: {found} of {len(value)} characters are NUL; convert it to UTF-8")
        record.notes[NUL_CHARACTERS, name] += found
    if "<" in value or record.control_tokens is not OUR_TOKENS:
        record.notes.update((CONTROL_TOKENS, token) for token in record.control_tokens.findall(value))
    if "{{" in value:
        record.notes.update((PLACEHOLDERS, found.group()) for found in PLACEHOLDER.finditer(value))
    return value


def json_in(record: Record, text: str, name: str) -> Any:
    """The value of a field that holds JSON as text."""
    try:
        return parse_json(text)
    except ValueError as error:
        fail(record, f"{name} is not JSON ({error}); expected JSON")


def json_of(record: Record, value: Any, name: str) -> str:
    """A part of a record as JSON. It can be invalid: parquet files hold dates and bytes, any file half a character."""
    try:
        return checked_text(record, json.dumps(value, ensure_ascii=False), name)
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, BadRow):
            raise
        fail(record, f"{name} cannot be written as JSON ({error}); expected texts, numbers, lists and objects")


def type_name(value: Any) -> str:
    """The type of a value for an error message; a missing value has none."""
    return "missing" if value is None else f"of type {type(value).__name__}"


def field_names(record: Record) -> str:
    """The fields of a record for an error message."""
    return f"the fields {', '.join(sorted(map(str, record.data))) or '(none)'}"
