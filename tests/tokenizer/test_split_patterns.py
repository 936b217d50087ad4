"""Where a long text may be cut without changing a token: known for each pattern, and for no other."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers

from tinylm.tokenizer import split_patterns
from tinylm.tokenizer.split_patterns import AFTER_NEWLINE, KNOWN_PATTERNS, cut_text, safe_cuts
from tinylm.tokenizer.tokenizer import Tokenizer

ALPHABET = [
    "\n",
    "\n",
    "\n",
    "\n\n",
    "\r\n",
    "\r",
    " ",
    "  ",
    "\t",
    "a",
    "B",
    "é",
    "中",
    "ア",
    "1",
    "22",
    "!",
    "/",
    "//",
    "'s",
]
ALPHABET += [
    "'",
    "\u0301",
    "\u2028",
    "\u3000",
    "\u00a0",
    "\x1c",
    "\x85",
    "\u200b",
    "\0",
    "\u00a8",
    "_",
    "😀",
    "ǅ",
    "\ufeff",
]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def split(pattern: str, **changes: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False, **changes}


def definition(*steps: dict[str, Any], normalizer: Any = None) -> dict[str, Any]:
    pre_tokenizer = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": list(steps)}
    return {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer}


def splitter(parts: dict[str, Any]) -> Callable[[str], list[str]]:
    """text -> the pieces within which merges are made, as the library finds them."""
    fast = tokenizers.Tokenizer.from_str(json.dumps(Tokenizer.default().definition | parts))

    def split_up(text: str) -> list[str]:
        normal = text if fast.normalizer is None else fast.normalizer.normalize_str(text)
        return [piece for piece, _ in fast.pre_tokenizer.pre_tokenize_str(normal)]

    return split_up


def soup(seed: int, length: int = 600) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(ALPHABET) for _ in range(length))


KNOWN = {
    **{f"pattern {number}": definition(split(each), BYTE_LEVEL) for number, each in enumerate(KNOWN_PATTERNS)},
    "GPT-2's own form": definition(GPT2_BYTE_LEVEL),
    "Qwen's with NFC": definition(split(split_patterns.SPLIT_PATTERN), BYTE_LEVEL, normalizer={"type": "NFC"}),
    "DeepSeek's three": definition(
        split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(split_patterns._DEEPSEEK3), BYTE_LEVEL
    ),
    "escapes as characters": definition(
        split(split_patterns.SPLIT_PATTERN.replace(r"\r", "\r").replace(r"\n", "\n")), BYTE_LEVEL
    ),
}
"""Pre-tokenizers that may be cut."""


@pytest.mark.parametrize("parts", KNOWN.values(), ids=KNOWN)
def test_a_cut_changes_no_piece(parts: dict[str, Any]) -> None:
    """On a soup of blanks, newlines, marks and symbols, cut at every place that is said to be safe."""
    cuts = safe_cuts(parts)
    assert cuts is not None
    split_up = splitter(parts)
    for seed in range(60):
        text = soup(seed)
        sections = list(cut_text(text, 1, cuts))
        assert len(sections) > 5 and "".join(sections) == text
        assert [piece for section in sections for piece in split_up(section)] == split_up(text), seed


def test_the_cut_of_our_pattern_is_wrong_for_others() -> None:
    """GPT-2 tokenises a blank line before a word as two newlines; GPT-4o "\\n/" after a symbol as one."""
    for pattern, text in ((split_patterns._GPT2, "One.\n\nTwo"), (split_patterns._GPT4O, "Two.\n/three")):
        sections = list(cut_text(text, 1, AFTER_NEWLINE))
        parts = definition(split(pattern), BYTE_LEVEL)
        assert len(sections) == 2
        assert sum(map(splitter(parts), sections), []) != splitter(parts)(text)
        assert list(cut_text(text, 1, safe_cuts(parts))) == [text]


UNKNOWN = {
    "no pre-tokenizer": {"normalizer": None, "pre_tokenizer": None},
    "only byte characters": definition(BYTE_LEVEL),
    "a space in front": definition({**GPT2_BYTE_LEVEL, "add_prefix_space": True}),
    "a space in front, by default": definition({"type": "ByteLevel"}),
    "one class": definition(split(r"[^a]+"), BYTE_LEVEL),
    "a string": definition({**split("x"), "pattern": {"String": "\n"}}, BYTE_LEVEL),
    "another behaviour": definition(split(split_patterns.SPLIT_PATTERN, behavior="MergedWithNext"), BYTE_LEVEL),
    "inverted": definition(split(split_patterns.SPLIT_PATTERN, invert=True), BYTE_LEVEL),
    "punctuation first": definition({"type": "Punctuation"}, split(split_patterns.SPLIT_PATTERN), BYTE_LEVEL),
    "two patterns": definition(split(split_patterns.SPLIT_PATTERN), split(split_patterns._GPT2), BYTE_LEVEL),
    "after the bytes": definition(BYTE_LEVEL, split(split_patterns.SPLIT_PATTERN)),
    "NFKC": definition(split(split_patterns.SPLIT_PATTERN), BYTE_LEVEL, normalizer={"type": "NFKC"}),
}


@pytest.mark.parametrize("parts", UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_not_known_is_not_cut(parts: dict[str, Any]) -> None:
    assert safe_cuts(parts) is None
    assert list(cut_text("One.\nTwo.\nThree.", 1, safe_cuts(parts))) == ["One.\nTwo.\nThree."]
