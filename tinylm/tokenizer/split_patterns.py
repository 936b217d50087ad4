"""Which ways of cutting text into pieces a tokenizer.json may ask for.

The file brings its own regular expressions, and the engine that runs them backtracks: `(a+)+b` needs 2^n steps on n
letters, in native code that nothing can interrupt. Whether any expression can do that is hard to tell; so the
expressions of the tokenizers in use are listed, beside such that repeat one class of characters and cannot. The same
holds for normalisers, of which a chain of "replace a by aa" makes a gigabyte of one letter.
"""

from __future__ import annotations

import re
from typing import Any

from tinylm.files.untrusted import shown
from tinylm.tokenizer.bpe import SPLIT_PATTERN

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""

KNOWN_PATTERNS = {
    SPLIT_PATTERN,  # Qwen 2, 2.5 and 3
    rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_BLANKS}",  # Llama 3
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_BLANKS}",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}",  # GPT-4o
    rf"{_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_BLANKS}",
}
"""The third is Qwen 3.5's, the fourth GPT-4's, the last DeepSeek 3's (with two of one class each before it)."""

# One class of characters, repeated or not: a step a character, whatever the text.
_ONE_CLASS = re.compile(r"(\\[pP]\{\w{1,20}\}|\\[dswDSW]|\[[^\[\]\\&]{1,200}\]|\w)([+*?]|\{[0-9](,[0-9])?\})?")
_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD")
_PRE_TOKENIZERS = ("ByteLevel", "Digits", "Punctuation", "Split")
_MAX_STEPS = 16


def check_text_steps(definition: dict[str, Any]) -> None:
    """Raise ValueError unless the normaliser and the pre-tokenizer consist of known steps that take linear time."""
    for step in _steps(definition.get("normalizer"), "normalizers"):
        if step.get("type") not in _NORMALIZERS:
            raise ValueError(
                f"cannot use the normalizer {shown(step.get('type'))}; expected none, or {', '.join(_NORMALIZERS)}"
            )
    for step in _steps(definition.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") not in _PRE_TOKENIZERS:
            raise ValueError(
                f"cannot use the pre-tokenizer {shown(step.get('type'))}; expected {', '.join(_PRE_TOKENIZERS)}"
            )
        if step["type"] == "Split":
            _check_pattern(step.get("pattern"))


def _steps(part: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a normaliser or pre-tokenizer: none, one, or a flat sequence."""
    steps = (
        part.get(key) if isinstance(part, dict) and part.get("type") == "Sequence" else [] if part is None else [part]
    )
    if not isinstance(steps, list) or len(steps) > _MAX_STEPS or not all(isinstance(step, dict) for step in steps):
        raise ValueError(f"cannot use {key} {shown(part)}; expected up to {_MAX_STEPS} objects with a `type`")
    return steps


def _check_pattern(pattern: Any) -> None:
    kind, text = next(iter(pattern.items())) if isinstance(pattern, dict) and len(pattern) == 1 else (None, None)
    if kind == "String" and isinstance(text, str) and text:
        return
    # Some files write a line's end in the expression as itself and some as an escape.
    plain = text.replace("\r", r"\r").replace("\n", r"\n") if isinstance(text, str) else ""
    if kind != "Regex" or not (plain in KNOWN_PATTERNS or _ONE_CLASS.fullmatch(plain)):
        raise ValueError(
            f"cannot use the split pattern {shown(text)}, which may take for ever on some text; expected that of "
            "GPT-2, GPT-4, GPT-4o, Llama 3, Qwen or DeepSeek 3, or one class of characters"
        )
