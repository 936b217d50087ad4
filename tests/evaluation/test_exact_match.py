"""Comparisons of short answers, by example."""

from __future__ import annotations

import pytest

from tinylm.evaluation.exact_match import answer_matches, exact_match, final_number, token_f1


@pytest.mark.parametrize(
    ("reply", "reference", "same"),
    [
        ("The dog.", "a dog", True),
        ("  DOG ", "dog", True),
        ("dogs", "dog", False),
        ("theatre", "atre", False),
        ("", "the", True),
    ],
)
def test_exact_match(reply, reference, same):
    assert exact_match(reply, reference) is same


def test_token_f1_by_hand():
    """Two of three words right out of two wanted: precision 2/3, recall 1, F1 = 0.8."""
    assert token_f1("brown dog barked", "the brown dog") == pytest.approx(0.8)
    assert token_f1("cat", "dog") == 0
    assert token_f1("dog dog", "dog") == pytest.approx(2 / 3), "a repeated word counts once"
    assert token_f1("", "") == 1


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("9 * 2 = 18\n#### 18", "18"),
        ("so 5 and then 1,000.00", "1000"),
        ("#### -3.50 dollars, of 10", "-3.5"),
        ("none", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == number


def test_word_problems_compare_final_numbers():
    assert answer_matches("She has 18 left", "16 - 3 = ...\n#### 18")
    assert not answer_matches("She has 81 left", "16 - 3 = ...\n#### 18")
    assert not answer_matches("", "#### 18")
