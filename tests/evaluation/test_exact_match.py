"""Comparisons of short answers, by example."""

from __future__ import annotations

import pytest

from tinylm.evaluation.exact_match import answer_matches, exact_match, final_number, token_f1


@pytest.mark.parametrize(
    ("reply", "reference"),
    [
        ("The dog.", "a dog"),
        ("  DOG ", "dog"),
        ("Don't, U.S.!", "dont us"),
        ("Straße", "STRASSE"),
        ("é", "e\u0301"),
        ("A.", "'a'"),
        ("1,234.50", "1234.5"),
        (".5", "0.5"),
        ("It is +007.", "it is 7"),
        ("(-5)", "-5"),
        ("\N{MINUS SIGN}5", "-5"),
        ("-$5", "-5"),
        ("€3.50", "3.5"),
        ("50 %", "50%"),
        ("5km", "5 km"),
        ("21.0°", "21 °"),
        ("½", "1/2"),
        ("1½", "1 1/2"),
        ("1\u00a0000\u202f000", "1,000,000"),
        ("٣٫٥", "3.5"),
        ("\u200f१२", "12"),
        ("３．５％", "3.5"),
        ("答案是3.50。", "答案 是 3.5"),
        ("**3.5**", "`3.5`"),
    ],
)
def test_other_spellings_of_an_answer_match(reply, reference):
    assert exact_match(reply, reference)


@pytest.mark.parametrize(
    ("reply", "reference"),
    [
        ("dogs", "dog"),
        ("theatre", "atre"),
        ("35", "3.5"),
        ("5", "-5"),
        ("The", "A"),
        ("", "the"),
        ("vitamin", "vitamin A"),
        ("B", "A, B"),
        ("?", "!"),
        ("", "..."),
        ("🙂", "🙃"),
        ("12", "1/2"),
        ("11/2", "1½"),
        ("38", "3-8"),
        ("56", "(5)(6)"),
        ("1230", "12:30"),
        ("35", "3,5"),
        ("0.5", "50%"),
        ("102", "10²"),
        ("x5", "x-5"),
        ("C", "C++"),
        ("A+", "A-"),
        ("3", "3rd"),
        ("答案是35", "答案是3.5"),
    ],
)
def test_other_answers_do_not_match(reply, reference):
    """A model that was trained on wrong answers scored 1.0: every sign and article was deleted."""
    assert not exact_match(reply, reference)
    assert not exact_match(reference, reply)


def test_token_f1_by_hand():
    """Two of three words right out of two wanted: precision 2/3, recall 1, F1 = 0.8."""
    assert token_f1("brown dog barked", "the brown dog") == pytest.approx(0.8)
    assert token_f1("cat", "dog") == 0
    assert token_f1("dog dog", "dog") == pytest.approx(2 / 3), "a repeated word counts once"
    assert token_f1("", "") == 1
    assert token_f1("!", "?") == 0
    assert token_f1("35", "3.5") == 0
    assert token_f1("我喜欢梨", "我喜欢苹果") == pytest.approx(2 * 3 / 9), "a Chinese character is a word"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("9 * 2 = 18\n#### 18", "18"),
        ("so 5 and then 1,000.00", "1000"),
        ("#### -3.50 dollars, of 10", "-3.5"),
        ("16-3=13", "13"),
        ("10-5", "5"),
        ("it is \N{MINUS SIGN}$7.", "-7"),
        ("#### half of 1/2", "1/2"),
        ("是٣٫٥个", "3.5"),
        ("#### Plan", None),
        ("none", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == number


@pytest.mark.parametrize("reference", ["16 - 3 = ...\n#### 18", "#### $18.00", "So\n#### 18 dollars.\n"])
def test_word_problems_compare_final_numbers(reference):
    assert answer_matches("She has 18 left", reference)
    for wrong in ("She has 81 left", "-18", "1.8", ""):
        assert not answer_matches(wrong, reference)


@pytest.mark.parametrize(
    "reference", ["#### Plan\nGo home and sleep.", "#### Plan 9\nrun", "#### 9 steps to heaven", "#### 1\nbegin"]
)
def test_a_heading_is_no_final_number(reference):
    """Any reply without a number was right, since neither text had one."""
    for wrong in ("I will not say.", "9", "1"):
        assert not answer_matches(wrong, reference)
    assert answer_matches(reference.upper(), reference)
