"""Does a generated answer say what the reference says? Comparisons of short answers, as text.

Normalised exact match and token F1 follow SQuAD (Rajpurkar et al., 2016, https://arxiv.org/abs/1606.05250), but keep
the signs that carry meaning: those of 3.5, -5, 12:30 and C++. The final number is GSM8K's rule (Cobbe et al., 2021,
https://arxiv.org/abs/2110.14168).
"""

from __future__ import annotations

import unicodedata
from collections import Counter

import regex

_SPELLINGS = str.maketrans(
    {
        **dict.fromkeys("\N{MINUS SIGN}\N{HYPHEN}\N{NON-BREAKING HYPHEN}\N{FIGURE DASH}\N{EN DASH}", "-"),
        "\N{ARABIC DECIMAL SEPARATOR}": ".",
        "\N{ARABIC THOUSANDS SEPARATOR}": ",",
        "\N{FRACTION SLASH}": "/",
    }
)
_THOUSANDS_SPACE = regex.compile(r"(?<=\d)[\N{NO-BREAK SPACE}\N{THIN SPACE}\N{NARROW NO-BREAK SPACE}](?=\d{3}(?!\d))")
_CURRENCY = regex.compile(r"(?<!\d)\p{Sc}|\p{Sc}(?!\d)")
_ARTICLE = regex.compile(r"(?<!\S)(?:a|an|the)\s+(?=\S)")
"""Only in front of another word: the answers "A", "vitamin A" and "A, B" keep their letter."""

_SIGN = r"[\p{P}$+<=>^`|~]"
_SIGNS = regex.compile(
    rf"""(?P<kept>
      (?<=\d){_SIGN}(?=\w) | (?<=\w){_SIGN}(?=\d)       # beside a digit, inside a word: 3.5, 12:30, 1/2, x-5
    | (?<![\w.])[-+](?=\.?\d) | (?<![\w.])\.(?=\d)      # before a number: -5, .5
    | (?<=\w)[-+\#]+(?!\w)                              # at the end of a word: C++, C#, A-
    ) | (?P<dropped>(?<=\p{{L}}){_SIGN}(?=\p{{L}}))     # between letters: don't, U.S.
    | {_SIGN}""",
    regex.VERBOSE,
)

_NUMBER = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
_ONE_CHARACTER = r"\p{Han}\p{Hiragana}\p{Katakana}"
_WORD = regex.compile(rf"[{_ONE_CHARACTER}]|[-+]?{_NUMBER}(?=[\p{{L}}\p{{So}}])|[^\s{_ONE_CHARACTER}]+")
_SIGNED = rf"(?:(?<![\w.)])[-+])?{_NUMBER}(?:/\d+)?"
_ANY_NUMBER = regex.compile(_SIGNED)
_MARKED = regex.compile(rf"####\s*({_SIGNED})")
_MARKED_LAST = regex.compile(rf"####\s*({_SIGNED})[ \t]*%?(?:[ \t]*\p{{L}}+)?[.!]?\s*$")
"""At the end of a text: a number and at most one word, its unit."""


def words_of(text: str) -> list[str]:
    """The words of an answer in one spelling, by the rules in docs/evaluation.md; numbers by their value."""
    text = _ARTICLE.sub("", _one_spelling(text))
    text = _SIGNS.sub(lambda match: match["kept"] or ("" if match["dropped"] else " "), text)
    return [_value(word) for word in _WORD.findall(text)]


def _one_spelling(text: str) -> str:
    """Lower case, ASCII digits and signs, no invisible characters, thousands without spaces, no currency signs."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", "".join(map(_plain_character, text))).translate(_SPELLINGS)
        text = _THOUSANDS_SPACE.sub("", text)
    return _CURRENCY.sub("", text.casefold())


def _plain_character(character: str) -> str:
    """ASCII for a full-width form or a digit of any script; "1/2" for a fraction sign; nothing for a format mark."""
    if (digit := unicodedata.decimal(character, None)) is not None:
        return str(digit)
    if unicodedata.category(character) == "Cf":
        return ""
    plain = unicodedata.normalize("NFKC", character)
    if "\N{FRACTION SLASH}" in plain:
        return f" {plain}"
    return plain if unicodedata.east_asian_width(character) in "FH" else character


def _value(word: str) -> str:
    """The shortest spelling of a number: 1000 for 1,000.00, 0.5 for .5; any other word unchanged."""
    match = regex.fullmatch(rf"([-+]?)({_NUMBER})(/\d+)?", word)
    if match is None:
        return word
    whole, _, fraction = match[2].replace(",", "").partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    value = f"{whole}.{fraction}" if fraction else whole
    return "-" * (match[1] == "-" and value != "0") + value + (match[3] or "")


def normalise_answer(text: str) -> str:
    """The words of the answer; if it has none ("?!"), the text itself in lower case."""
    return " ".join(words_of(text)) or " ".join(text.casefold().split())


def exact_match(reply: str, reference: str) -> bool:
    """True when both say the same after normalisation."""
    return normalise_answer(reply) == normalise_answer(reference)


def token_f1(reply: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the words of the reply, from 0 to 1."""
    said, wanted = words_of(reply), words_of(reference)
    if not said or not wanted:
        return float(exact_match(reply, reference))
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted))


def final_number(text: str) -> str | None:
    """The number after the last `####` if one is there, else the last number of the text; None without numbers.

    Equal numbers give equal strings: `1,000.00` and `1000` both give `1000`.
    """
    text = _one_spelling(text)
    found = _MARKED.findall(text) or _ANY_NUMBER.findall(text)
    return _value(found[-1]) if found else None


def answer_matches(reply: str, reference: str) -> bool:
    """Exact match; for a reference that ends with `#### <number>` (GSM8K), the final numbers are compared instead."""
    marked = _MARKED_LAST.search(_one_spelling(reference))
    if marked:
        return final_number(reply) == _value(marked[1])
    return exact_match(reply, reference)
