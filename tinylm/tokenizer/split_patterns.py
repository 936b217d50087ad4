"""Split patterns: the regular expressions that cut text into pieces, before any merge of byte-pair encoding.

This file holds our tokenizer's pattern, a function that cuts long texts where that pattern cuts anyway, and the list of
patterns that a tokenizer.json from elsewhere may use.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

from tinylm.files.untrusted import shown

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's split pattern; llama.cpp knows it as the pre-tokenizer `qwen2`. Every character falls in exactly one
piece."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""

AFTER_NEWLINE = re.compile(r"\n(?=\S)")
"""Where our pattern always cuts: between a newline and a visible character. None of its alternatives matches both, and
a run of blanks that ends in a newline is matched in the same way whatever follows it."""

_AFTER_NEWLINE_NO_SLASH = re.compile(r"\n(?=[^\s/])")
"""GPT-4o's pattern takes newlines and slashes after a symbol together."""

_AFTER_ONE_NEWLINE = re.compile(r"(?<=\S)\n(?=\S)")
"""GPT-2's pattern leaves the last of several blanks to the word after them, so that a run of them depends on what
follows. A single newline does not."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT4 = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}"
)
_LLAMA3 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_BLANKS}"
_QWEN3_5 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_BLANKS}"
)
_DEEPSEEK3 = (
    rf"{_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_BLANKS}"
)

Digits = Literal["split", "grouped"]
"""Whether each digit is a piece of its own, or up to three of them are, from the left."""

DIGIT_PATTERNS: dict[Digits, str] = {"split": SPLIT_PATTERN, "grouped": _LLAMA3}
"""The pattern of our tokenizers: Qwen2's, or Llama 3's, which differs in its digits alone."""

KNOWN_PATTERNS = {
    SPLIT_PATTERN: AFTER_NEWLINE,  # Qwen 2, 2.5 and 3
    _LLAMA3: AFTER_NEWLINE,
    _QWEN3_5: AFTER_NEWLINE,
    _GPT4: AFTER_NEWLINE,
    _GPT2: _AFTER_ONE_NEWLINE,
    _GPT4O: _AFTER_NEWLINE_NO_SLASH,
    _DEEPSEEK3: AFTER_NEWLINE,
}
"""The patterns that a tokenizer.json may use, and where each always cuts, whatever stands around that place. DeepSeek 3
applies two steps of one class each before its own.

No other pattern is accepted, because the engine that runs them backtracks: `(a+)+b` takes 2^n steps on n letters, in
native code that cannot be interrupted, and it is hard to tell which patterns do that. Patterns that repeat a single
class of characters are safe, so they are accepted too. Normalisers are limited for a similar reason: a chain of
"replace a by aa" turns one letter into a gigabyte.
"""

_LLAMA_CPP_NAMES = {
    (SPLIT_PATTERN,): "qwen2",
    (_LLAMA3,): "llama-bpe",
    (_GPT2,): "gpt-2",
    ("digits", _GPT2): "smollm",
}
"""Steps of a pre-tokenizer -> `tokenizer.ggml.pre`. Each was compared with llama.cpp on the texts of the tests."""
_IGNORE_MERGES = ("llama-bpe",)
"""There, llama.cpp takes a piece that is a token as a whole, whatever the merges say."""

# One class of characters, repeated or not: one step per character on any text.
_ONE_CLASS = re.compile(r"(\\[pP]\{\w{1,20}\}|\\[dswDSW]|\[[^\[\]\\&]{1,200}\]|\w)([+*?]|\{[0-9](,[0-9])?\})?")
_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Prepend", "Replace")
_PRE_TOKENIZERS = ("ByteLevel", "Digits", "Punctuation", "Split", "Metaspace")
BLANK = "\N{LOWER ONE EIGHTH BLOCK}"
"""▁, which SentencePiece writes for a blank."""
_MAX_STEPS = 16


_NUMBERS_AND_CJK = (r"\p{N}", r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+")
"""Steps before the pattern that never join or part blanks, so its safe cuts stay safe."""


def cut_text(text: str, num_characters: int, cuts: re.Pattern[str] | None = AFTER_NEWLINE) -> Iterator[str]:
    """Cut a long text into sections of at least `num_characters`, where that changes none of its pieces or tokens.

    A text without such a place stays in one section.

    Args:
        cuts: matches where the tokenizer always cuts, as `safe_cuts` returns it; None never cuts.
    """
    start = 0
    while cuts is not None and len(text) - start > num_characters:
        cut = cuts.search(text, start + num_characters)
        if cut is None:
            break
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:] if start else text


def safe_cuts(definition: dict[str, Any]) -> re.Pattern[str] | None:
    """Where a tokenizer always cuts, whatever stands around that place; None if that is not known of its steps.

    Args:
        definition: the content of a tokenizer.json that `check_text_steps` accepts.
    """
    normalizers = steps_of(definition.get("normalizer"), "normalizers")
    if any(step["type"] not in ("NFC", "NFD") for step in normalizers):  # the others may turn a character into blanks
        return None
    cuts, in_bytes = None, False
    for step in steps_of(definition.get("pre_tokenizer"), "pretokenizers"):
        if in_bytes:  # this step sees other characters: a newline is a letter there
            return None
        if step["type"] == "ByteLevel" and not step.get("add_prefix_space", True):
            pattern, in_bytes = _GPT2 if step.get("use_regex", True) else None, True
        elif step["type"] == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            pattern = _plain(step["pattern"].get("Regex", ""))
        else:
            return None
        if pattern is None or pattern in _NUMBERS_AND_CJK:
            continue
        if cuts is not None or pattern not in KNOWN_PATTERNS:
            return None
        cuts = KNOWN_PATTERNS[pattern]
    return cuts


def llama_cpp_name(definition: dict[str, Any]) -> str:
    """The name under which llama.cpp splits text as this tokenizer does: `qwen2` for ours.

    llama.cpp normalises no text, so NFC is left out there: text that is in NFC already, as nearly all is, gets the same
    tokens.

    Raises:
        ValueError: llama.cpp has no such pre-tokenizer.
    """
    normalizers = [step["type"] for step in steps_of(definition.get("normalizer"), "normalizers")]
    ignores_merges = definition["model"].get("ignore_merges") is True
    steps = []
    for step in steps_of(definition.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "ByteLevel" and not step.get("add_prefix_space", True):
            steps += [_GPT2] if step.get("use_regex", True) else []
        elif step["type"] == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            steps.append(_plain(step["pattern"].get("Regex", "")))
        else:
            is_digits = step == {"type": "Digits", "individual_digits": True}
            steps.append("digits" if is_digits else step["type"])
    name = _LLAMA_CPP_NAMES.get(tuple(steps))
    if name is None or ignores_merges != (name in _IGNORE_MERGES) or set(normalizers) - {"NFC"}:
        raise ValueError(
            f"llama.cpp has no pre-tokenizer that splits as this tokenizer does ({shown(steps or normalizers)}); "
            f"expected the steps of {', '.join(_LLAMA_CPP_NAMES.values())}: use the model folder in transformers"
        )
    return name


def steps_from_llama_cpp(name: Any) -> dict[str, Any]:
    """The parts of a tokenizer.json that split as llama.cpp's pre-tokenizer `name` does: the inverse of
    `llama_cpp_name`.

    Raises:
        ValueError: we do not know that pre-tokenizer.
    """
    steps = next((steps for steps, known in _LLAMA_CPP_NAMES.items() if known == name), None)
    if steps is None:
        raise ValueError(
            f"tokenizer.ggml.pre is {shown(name)}; expected {', '.join(_LLAMA_CPP_NAMES.values())}: the others split "
            "text in ways that are not known here"
        )
    *first, pattern = steps
    parts: list[dict[str, Any]] = [{"type": "Digits", "individual_digits": True} for _ in first]
    is_gpt2 = pattern == _GPT2  # which ByteLevel itself holds
    if not is_gpt2:
        parts.append({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False})
    parts.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": is_gpt2})
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": parts},
        "ignore_merges": name in _IGNORE_MERGES,
    }


def check_text_steps(definition: dict[str, Any]) -> None:
    """Raise ValueError unless the normaliser and the pre-tokenizer consist of known steps that take linear time."""
    for step in steps_of(definition.get("normalizer"), "normalizers"):
        if step.get("type") not in _NORMALIZERS:
            raise ValueError(
                f"cannot use the normalizer {shown(step.get('type'))}; expected none, or {', '.join(_NORMALIZERS)}"
            )
        is_blank = step.get("prepend") == BLANK, step.get("pattern") == {"String": " "} and step.get("content") == BLANK
        if step["type"] in ("Prepend", "Replace") and not is_blank[step["type"] == "Replace"]:
            raise ValueError(f"cannot use the normalizer {shown(step)}; expected one that writes {BLANK} for a blank")
    for step in steps_of(definition.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") not in _PRE_TOKENIZERS:
            raise ValueError(
                f"cannot use the pre-tokenizer {shown(step.get('type'))}; expected {', '.join(_PRE_TOKENIZERS)}"
            )
        if step["type"] == "Split":
            _check_pattern(step.get("pattern"))
        if step["type"] == "Metaspace" and step.get("replacement") != BLANK:
            raise ValueError(f"cannot use the Metaspace {shown(step.get('replacement'))}; expected {BLANK}")


def steps_of(part: Any, key: str) -> list[dict[str, Any]]:
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
    plain = _plain(text) if isinstance(text, str) else ""
    if kind != "Regex" or not (plain in KNOWN_PATTERNS or _ONE_CLASS.fullmatch(plain)):
        raise ValueError(
            f"cannot use the split pattern {shown(text)}, which may take for ever on some text; expected that of "
            "GPT-2, GPT-4, GPT-4o, Llama 3, Qwen or DeepSeek 3, or one class of characters"
        )


def _plain(pattern: str) -> str:
    """The pattern with escapes: some files write a newline in it as the character itself."""
    return pattern.replace("\r", r"\r").replace("\n", r"\n")
