"""Byte-pair encoding of SentencePiece's kind (Kudo and Richardson 2018, arXiv:1808.06226), as Llama 2 and Mistral have.

It merges characters instead of bytes. A blank is written as ▁, often with one more before the text. A character that
the vocabulary lacks falls back to its bytes, whose tokens are <0x00> to <0xFF>.
"""

from __future__ import annotations

import json
import re
from typing import Any

from tinylm.tokenizer.split_patterns import BLANK, steps_of

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def is_sentencepiece(definition: dict[str, Any]) -> bool:
    """Whether a tokenizer.json falls back to bytes. Byte-level BPE never needs that, even if its file says so."""
    is_byte_level = "ByteLevel" in json.dumps(definition.get("pre_tokenizer"))
    return definition["model"].get("byte_fallback") is True and not is_byte_level


def missing_byte(definition: dict[str, Any]) -> str | None:
    """The first byte token that the vocabulary lacks. Without it some text has no ids but those of `unk`."""
    return next(
        (name for name in map("<0x{:02X}>".format, range(256)) if name not in definition["model"]["vocab"]), None
    )


def token_bytes(name: str) -> bytes:
    """The bytes that an ordinary token stands for."""
    byte = _BYTE.fullmatch(name)
    return bytes([int(byte[1], 16)]) if byte else name.replace(BLANK, " ").encode("utf-8")


def drops_first_blank(definition: dict[str, Any]) -> bool:
    """Whether decoding leaves out a blank at the start, because encoding puts one there."""
    decoder = definition.get("decoder")
    steps = decoder.get("decoders") if isinstance(decoder, dict) and decoder.get("type") == "Sequence" else [decoder]
    for step in steps if isinstance(steps, list) else []:
        if not isinstance(step, dict):
            continue
        if step.get("type") == "Strip" and step.get("content") == " " and step.get("start") == 1:
            return True
        if step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never":
            return step.get("add_prefix_space", True) is not False
    return False


def within_a_text(definition: dict[str, Any]) -> dict[str, Any]:
    """The definition for text that follows a control token: a blank that only the start of a text gets is left out."""
    steps = steps_of(definition.get("pre_tokenizer"), "pretokenizers")
    if not any(step["type"] == "Metaspace" and step.get("prepend_scheme") == "first" for step in steps):
        return definition
    changed = [
        {**step, "prepend_scheme": "never", "add_prefix_space": False} if step["type"] == "Metaspace" else step
        for step in json.loads(json.dumps(steps))
    ]
    return {**definition, "pre_tokenizer": {"type": "Sequence", "pretokenizers": changed}}
