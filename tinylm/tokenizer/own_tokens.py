"""Special tokens of a user's own, such as <|fim|> or <|lang:de|>: which names can be one.

They have the last ids of the vocabulary, so that all other ids are as without them. The reserved tokens stay free for
what is added when the tokenizer is trained already.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from tinylm.files.untrusted import shown
from tinylm.tokenizer.bpe import CHARACTER_TO_BYTE, split_pieces

MAX_NAME_CHARACTERS = 64
_MAX_FILE_BYTES = 1 << 20
_NAME = re.compile(r"<[^<>\[\]\s]+>|\[[^<>\[\]\s]+\]")
"""One pair of brackets around the whole name, and none inside. So no ordinary word is a name, and no two names overlap
in a text: all programs then find the same ones."""


def read_own_tokens(value: str) -> tuple[str, ...]:
    """The names in `--special_tokens`: separated by commas, or the lines of a file.

    Raises:
        ValueError: the file is too large or not UTF-8, or nothing is named. `check_own_tokens` checks the names.
    """
    path = os.path.expanduser(value)
    if not os.path.isfile(path):
        if not re.search(r"[<\[]", value):
            raise ValueError(
                f"special_tokens is {shown(value)}, which is neither a file nor a name in < > or [ ]; expected names "
                "such as '<|fim|>,<|lang:de|>', or a file with one a line"
            )
        return tuple(value.split(","))
    if (size := os.path.getsize(path)) > _MAX_FILE_BYTES:
        raise ValueError(f"{path} has {size} bytes; expected special tokens, one a line, {_MAX_FILE_BYTES} at most")
    try:
        text = Path(path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8; expected special tokens, one a line; convert the file") from None
    if not text.strip():
        raise ValueError(f"{path} is empty; expected special tokens, one a line")
    return tuple(text.removesuffix("\n").split("\n"))


def check_own_tokens(names: Sequence[str], taken: Collection[str]) -> None:
    """Raise ValueError unless each name can be a special token.

    Args:
        taken: the special tokens that exist already.
    """
    seen: set[str] = set()
    for number, name in enumerate(names, start=1):
        if reason := _fault(name, seen, taken):
            raise ValueError(
                f"special token {number} of {len(names)} is {shown(name, 80)}, {reason}; expected names such as "
                "<|fim|> or [SEP], without blanks, each once"
            )
        seen.add(name)


def _fault(name: str, seen: Collection[str], taken: Collection[str]) -> str:
    """What is wrong with a name; empty if nothing is."""
    if not name:
        return "which is empty"
    if name.strip() != name:
        return "which begins or ends with a blank"
    if len(name) > MAX_NAME_CHARACTERS:
        return f"which has {len(name)} characters; at most {MAX_NAME_CHARACTERS} are allowed"
    if name in taken:
        return "which exists already"
    if name in seen:
        return "which was named before"
    if not name.isprintable() or not _NAME.fullmatch(name):
        return "which is not one name in < > or [ ]"
    return "which has neither a letter nor a digit, so that text may become it" if _could_be_learnt(name) else ""


def _could_be_learnt(name: str) -> bool:
    """Whether the merges could make a token of this name: in a tokenizer.json, "<é>" spells the bytes 3c c3 a9 3e.

    The name begins and ends with an ASCII sign, so the bytes between them are whole characters. A token never crosses
    a piece, and a piece that begins and ends with a sign has no letters and digits.
    """
    if any(character not in CHARACTER_TO_BYTE for character in name):
        return False
    try:
        text = bytes(CHARACTER_TO_BYTE[character] for character in name).decode("utf-8")
    except UnicodeDecodeError:
        return False
    return len(split_pieces(text)) == 1
