"""Does a generated answer say what the reference says? Comparisons of short answers, as text.

Normalised exact match and token F1 are SQuAD's (Rajpurkar et al., 2016, https://arxiv.org/abs/1606.05250);
the final number is GSM8K's rule (Cobbe et al., 2021, https://arxiv.org/abs/2110.14168).
"""

from __future__ import annotations

import re
import string
from collections import Counter

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """Lower case, without punctuation, English articles and surplus spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(reply: str, reference: str) -> bool:
    """True when both say the same after normalisation."""
    return normalise_answer(reply) == normalise_answer(reference)


def token_f1(reply: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the words of the reply, from 0 to 1."""
    said, wanted = normalise_answer(reply).split(), normalise_answer(reference).split()
    if not said or not wanted:
        return float(said == wanted)
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted))


def final_number(text: str) -> str | None:
    """The number after the last `####` where there is one, else the last number of the text; None without
    numbers.

    Thousands separators and a fraction of zeros are dropped, so `1,000.00` and `1000` are equal.
    """
    _, mark, tail = text.rpartition("####")
    found = _NUMBER.findall(tail if mark else text)
    if not found:
        return None
    number = str(found[0] if mark else found[-1]).replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def answer_matches(reply: str, reference: str) -> bool:
    """Exact match; for a reference with a `####` line (GSM8K), the final numbers are compared instead."""
    if "####" in reference:
        return final_number(reply) == final_number(reference)
    return exact_match(reply, reference)
