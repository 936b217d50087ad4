"""Minimal pairs, multiple choice, last words and preferences, on models whose answers are known."""

from __future__ import annotations

import contextlib
import itertools
import math

import numpy as np
import pytest
import torch

from tinylm.evaluation.minimal_pairs import MinimalPair, minimal_pair_accuracy
from tinylm.evaluation.multiple_choice import (
    ChoiceQuestion,
    join_query,
    last_word_accuracy,
    multiple_choice_accuracy,
)
from tinylm.evaluation.preferences import answer_logprobs, as_reference, preference_accuracy
from tinylm.tokenizer.chat_template import encode_chat


@pytest.fixture
def bigram(table_model, tokenizer):
    """Build a bigram model from {(first text, second text): logit}; other logits are 0."""

    def build(logits):
        table = torch.zeros(tokenizer.vocab_size, tokenizer.vocab_size)
        for (first, second), value in logits.items():
            [row] = [0] if first == "" else tokenizer.encode(first)
            [column] = tokenizer.encode(second)
            table[row, column] = value
        return table_model(table)

    return build


def test_minimal_pairs_win_lose_and_tie(bigram, tokenizer):
    model = bigram({("The", " man"): 5.0, ("The", " day"): 3.0})
    pairs = [
        MinimalPair("nouns", "The man", "The day"),
        MinimalPair("nouns", "The day", "The man"),
        MinimalPair("nouns", "The man", "The man"),
        MinimalPair("others", "The man", "The time"),
    ]
    report = minimal_pair_accuracy(model, tokenizer, pairs, [0])
    assert report.points == {"nouns": [1.0, 0.0, 0.5], "others": [1.0]}
    rows = [(measure.task.strip(), measure.value, measure.count) for measure in report.measures("blimp")]
    assert rows == [("blimp", 2.5 / 4, 4), ("nouns", 0.5, 3), ("others", 1.0, 1)]
    limited = minimal_pair_accuracy(model, tokenizer, pairs, [0], limit_per_set=1)
    assert limited.points == {"nouns": [1.0], "others": [1.0]}


def test_sum_and_per_byte_rules_can_differ(bigram, tokenizer):
    """`a b c` has three likely steps, `d` one: the sum prefers the short one, the bytes the long one."""
    logits = {("Q", " a"): 9.0, (" a", " b"): 9.0, (" b", " c"): 9.0, ("Q", " d"): 9.0}
    report = multiple_choice_accuracy(
        bigram(logits),
        tokenizer,
        [ChoiceQuestion("Q", ("d", "a b c"), 1), ChoiceQuestion("Q ", ("d", "x"), 0)],
        [0],
    )
    assert report.by_sum == [0.0, 1.0]
    assert report.by_byte[1] == 1.0
    log_p = 9 - math.log(math.exp(9) * 2 + 6398)
    log_next = 9 - math.log(math.exp(9) + 6399)
    assert (log_p + 2 * log_next) / 5 > log_p / 1 and report.by_byte[0] == 1.0
    assert report.chance == 0.5


def test_bytes_are_counted_not_characters(bigram, tokenizer):
    """Six characters of three bytes each: per byte they are likelier than `x`, per character they would not be."""
    text = "日本語日本語"
    num_tokens = len(tokenizer.encode(" " + text))
    report = multiple_choice_accuracy(
        bigram({("Q", " x"): -2.0}), tokenizer, [ChoiceQuestion("Q", (text, "x"), 0)], [0]
    )
    total = math.log(6399 + math.exp(-2))
    long, short = -num_tokens * math.log(6400), -2.0 - total
    assert long / 18 > short > long / 6 and len(text.encode()) == 18
    assert (report.by_byte, report.by_sum) == ([1.0], [0.0])


def standard_error(values):
    """Of the mean, by numpy."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5)


def errors_of(measures):
    return {measure.metric: measure.standard_error for measure in measures}


def test_every_standard_error_is_that_of_its_values(bigram, model, tokenizer):
    """Values of unequal spread; in a sample of two the error is half of their difference."""
    words = bigram({("The", " man"): 20.0, ("The", " day"): 10.0})
    pairs = [MinimalPair("s", "The man", "The day"), MinimalPair("s", "The day", "The man")]
    pairs += [MinimalPair("t", "The man", "The time"), MinimalPair("t", "The man", "The man")]
    rows = minimal_pair_accuracy(words, tokenizer, pairs, [0]).measures("blimp")
    expected = [standard_error([1, 0, 1, 0.5]), standard_error([1, 0]), standard_error([1, 0.5])]
    assert [row.standard_error for row in rows] == pytest.approx(expected)

    last = last_word_accuracy(words, tokenizer, [("The", "man"), ("The", "day"), ("The", "time")], [0])
    error = errors_of(last.measures("lambada"))
    assert error["exact match (greedy)"] == pytest.approx(standard_error([1, 0, 0]))
    mean = -sum(last.logprobs) / 3  # of exp(mean), by a small step: d exp(x) = exp(x) dx
    slope = (math.exp(mean + 1e-6) - math.exp(mean - 1e-6)) / 2e-6
    assert error["perplexity (per word)"] == pytest.approx(slope * standard_error(last.logprobs), rel=1e-6)

    questions = [ChoiceQuestion("The", choices, 0) for choices in (("man", "day"), ("day", "man"), ("man", "time"))]
    error = errors_of(multiple_choice_accuracy(words, tokenizer, questions, [0]).measures("q"))
    assert error == {"acc": standard_error([1, 0, 1]), "acc_norm (per byte)": standard_error([1, 0, 1]), "chance": None}

    prompt = [{"role": "user", "content": "Grüße"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("Hi!", "Zürich", "no", "a longer answer")]
    triples = [(prompt, chosen, rejected) for chosen, rejected in itertools.pairwise(answers)]
    report = preference_accuracy(model, lambda messages: encode_chat(tokenizer, messages), triples)
    error = errors_of(report.measures("p"))
    assert set(report.points) == {0.0, 1.0}
    assert error["preference accuracy (no reference)"] == pytest.approx(standard_error(report.points))
    assert error["log-probability margin (nats, no reference)"] == pytest.approx(standard_error(report.margins))


def test_question_gets_an_answer_line():
    assert join_query("Question: Why?\n", "So.") == ("Question: Why?\nAnswer:", " So.")
    assert join_query("He fell, so", "it hurt.") == ("He fell, so", " it hurt.")


def test_choice_question_is_checked():
    with pytest.raises(ValueError, match="gold 2"):
        ChoiceQuestion("Q", ("a", "b"), 2)
    with pytest.raises(ValueError, match="at least two"):
        ChoiceQuestion("Q", ("a",), 0)


def test_last_word(bigram, tokenizer):
    model = bigram({("The", " man"): 20.0, ("The", " day"): 10.0})
    report = last_word_accuracy(model, tokenizer, [("The", "man"), ("The ", "day")], [0])
    assert report.hits == [1.0, 0.0]
    total = math.log(math.exp(20) + math.exp(10) + 6398)
    assert report.logprobs == pytest.approx([20 - total, 10 - total], abs=1e-5)
    assert report.perplexity == pytest.approx(math.exp(-(30 - 2 * total) / 2), rel=1e-5)


def test_preferences_are_relative_to_the_reference(model, tokenizer, reference_logprobs):
    """Margins equal DPO's definition summed by hand over the answer's tokens, earlier turns left out."""
    prompt = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    pairs = [
        (
            prompt,
            [{"role": "assistant", "content": "Good bye!"}],
            [{"role": "assistant", "content": "Go away."}],
        )
    ]

    def encode(messages):
        return encode_chat(tokenizer, messages)

    torch.manual_seed(5)
    reference = type(model)(model.config).double().eval()

    def answer_logprob(scorer, answer):
        ids, _ = encode([*prompt, *answer])
        start, _ = encode_chat(tokenizer, prompt, add_generation_prompt=True)
        end = len(ids) - len(tokenizer.encode("\n"))
        return sum(reference_logprobs(scorer, ids)[len(start) - 1 : end - 1])

    chosen, rejected = pairs[0][1], pairs[0][2]
    plain = answer_logprob(model, chosen) - answer_logprob(model, rejected)
    base = answer_logprob(reference, chosen) - answer_logprob(reference, rejected)
    [value] = answer_logprobs(model, encode, [prompt], [chosen])
    assert value == pytest.approx(answer_logprob(model, chosen), abs=1e-8)
    alone = preference_accuracy(model, encode, pairs)
    assert alone.margins == pytest.approx([plain], abs=1e-8)
    relative = preference_accuracy(model, encode, pairs, reference=as_reference(reference))
    assert relative.margins == pytest.approx([plain - base], abs=1e-8)
    assert relative.points == [float(plain > base)]
    same = preference_accuracy(model, encode, pairs, reference=as_reference(model))
    assert same.points == [0.5], "a model leans nowhere relative to itself"


def test_reference_may_be_the_model_with_its_adapters_off(model, tokenizer):
    """The policy is scored outside the reference's context and the reference inside."""
    state = []

    @contextlib.contextmanager
    def switched_off():
        state.append("off")
        yield model
        state.append("on")

    pair = ([{"role": "user", "content": "Q"}], [{"role": "assistant", "content": "A"}])
    report = preference_accuracy(
        model,
        lambda messages: encode_chat(tokenizer, messages),
        [(*pair, [{"role": "assistant", "content": "B"}])],
        reference=switched_off,
    )
    assert state == ["off", "on"] and report.margins == [0.0]
