"""Files from strangers: which of them may be opened, and how to read JSON that has only one meaning.

All code that reads a model folder, an adapter or a tokenizer uses these functions, so that a file is checked once, in
one place, before anything is built from it. docs/reliability.md describes the guarantees.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 1 << 20
"""Limit for a config, an index, a lineage or a safetensors header. Python's objects take up to 30 times the memory of
their text (`[],` is 3 bytes, an empty list 64), so this bounds the memory. A header of 10,000 tensors fits."""

_MAX_OWN_JSON_BYTES = 64 << 20

_MAX_DEPTH = 64  # later code walks through the values by recursion, and Python's limit is 1,000 calls
_MAX_DIGITS = 40  # a 128-bit number has 39, and float() takes 40 digits without overflowing
_HALF_PAIR = re.compile(rb"\\u[dD][89abAB]|\\u[dD][c-fC-F]")


def shown(text: object, longest: int = 60) -> str:
    """A stranger's text for an error message: quoted, one line, no control characters, not too long."""
    quoted = ascii(text[: longest + 1] if isinstance(text, str) else text)
    return quoted if len(quoted) <= longest + 2 else f"{quoted[:longest]}..."


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8. A file name in another encoding has half surrogates in Python."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def check_file(path: Path, purpose: str) -> None:
    """Raise unless `path` is a regular file in its own folder, or a link to one there.

    A link out of the folder would let the author of a downloaded model choose what is read: `model.safetensors` may
    point to another model of the user, which is then exported and published as this one. One kind of link out of the
    folder is accepted, because the Hugging Face hub stores every model with it:
    `models--a--b/snapshots/<commit>/config.json` is a link to `models--a--b/blobs/<hash>`, so a file may lie in `blobs`
    beside `snapshots`. All links are resolved before the comparison: a `blobs` that is a link elsewhere is refused.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a pipe or device (reading it may never end), a folder, or a link out of the folder.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; {purpose}")
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file; {purpose}: replace it with a plain file")
    if not path.is_symlink():
        return
    home, target = path.parent.resolve(), path.resolve()
    stores = [folder.parent / "blobs" for folder in (home, *home.parents) if folder.name == "snapshots"]
    if not any(target.is_relative_to(place) for place in (home, *stores)):
        raise ValueError(f"{path} is a link that leads out of its folder, to {target}; copy that file into the folder")


def parse_json(raw: bytes | str, max_values: int | None = None, finite: bool = True) -> Any:
    """Read strict JSON (RFC 8259), without its ambiguities.

    Python's reader accepts NaN and Infinity, turns 1e999 into infinity, and takes the last of two equal keys. Other
    readers take the first, so the same file could be one model here and another model there.

    Args:
        finite: refuse NaN, Infinity and numbers that overflow to it. False is for our own files: a best loss may be
            infinite.
        max_values: refuse a text with more commas and opening brackets than this, before it is parsed. Their count
            bounds the number of values.

    Raises:
        ValueError: the text is refused; the message says why. No other exception is raised.
    """
    data = raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw
    if max_values is not None and (found := sum(map(data.count, (b",", b"[", b"{")))) > max_values:
        raise ValueError(f"{found} values; at most {max_values} are expected")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_whole_number,
            parse_float=_finite_number if finite else float,
            parse_constant=_finite_number if finite else float,
        )
    except RecursionError:
        raise ValueError(f"brackets nested deeper than {_MAX_DEPTH}") from None
    _check_depth(value)
    if _HALF_PAIR.search(data):  # half of a surrogate pair is not Unicode: encoding it raises ValueError
        if not is_unicode(json.dumps(value, ensure_ascii=False)):
            raise ValueError("half a surrogate pair; expected valid Unicode")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of up to `MAX_JSON_BYTES`, with finite numbers only.

    Raises:
        FileNotFoundError: no such file.
        ValueError: `check_file` refuses it, it is too large, or it is not a JSON object.
    """
    return _read_object(path, MAX_JSON_BYTES, finite=True)


def read_own_json(path: Path) -> dict[str, Any]:
    """`read_json` for a file that this program wrote for itself: it may be larger, and Infinity is a number too."""
    return _read_object(path, _MAX_OWN_JSON_BYTES, finite=False)


def _read_object(path: Path, max_bytes: int, finite: bool) -> dict[str, Any]:
    check_file(path, "it is needed to load the files beside it")
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(f"{path} has {size} bytes; at most {max_bytes} are expected: save the folder again")
    try:
        data = parse_json(path.read_bytes(), finite=finite)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); repair it or save the folder again") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}; a JSON object is expected: save the folder again")
    return data


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} appears twice in one object")
    return found


def _whole_number(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a whole number of {len(text)} digits; at most {_MAX_DIGITS} are expected")
    return int(text)


def _finite_number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {shown(text)}, which is not finite")
    return number


def _check_depth(value: Any) -> None:
    """Raise ValueError for deep nesting. It goes level by level: recursion would fail on deep values."""
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, (dict, list))]:
        if (depth := depth + 1) > _MAX_DEPTH:
            raise ValueError(f"brackets nested deeper than {_MAX_DEPTH}")
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
