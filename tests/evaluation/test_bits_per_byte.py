"""Losses against a plain float64 reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tinylm.evaluation.bits_per_byte import text_loss
from tinylm.evaluation.results import mean_and_error, ratio_and_error

TEXTS = ["The cat sat on the mat.", "Zürich — 東京 🙂", "a"]


def test_text_loss_equals_the_reference(model, tokenizer, reference_logprobs):
    report = text_loss(model, tokenizer, [*TEXTS, ""], [0])
    nats = [-sum(reference_logprobs(model, [0, *tokenizer.encode(text)])) for text in TEXTS]
    sizes = [len(text.encode()) for text in TEXTS]
    assert report.num_texts == 3
    assert report.num_bytes == sum(sizes)
    assert report.num_tokens == sum(len(tokenizer.encode(text)) for text in TEXTS)
    assert report.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / sum(sizes), rel=1e-9)
    assert report.loss == pytest.approx(sum(nats) / report.num_tokens, rel=1e-9)
    assert report.perplexity == pytest.approx(math.exp(report.loss))
    tokens = [len(tokenizer.encode(text)) for text in TEXTS]
    loss, perplexity, bits = report.measures("t")
    assert loss.standard_error == pytest.approx(ratio_error(nats, tokens), rel=1e-9)
    assert perplexity.standard_error is None
    assert bits.standard_error == pytest.approx(ratio_error([n / math.log(2) for n in nats], sizes), rel=1e-9)


def test_a_model_that_never_saw_a_document_begin_is_scored_from_the_second_token_on(
    model, tokenizer, reference_logprobs
):
    """Behind <|endoftext|>, which such a model never read, the first token alone cost more than a uniform guess."""
    report = text_loss(model, tokenizer, [*TEXTS, ""], [])
    ids = [tokenizer.encode(text) for text in TEXTS]
    assert report.nats == pytest.approx(-sum(sum(reference_logprobs(model, one)) for one in ids if len(one) > 1))
    assert report.num_tokens == sum(len(one) - 1 for one in ids)
    firsts = sum(len(tokenizer.token_bytes(one[0])) for one in ids)
    assert report.num_bytes == sum(len(text.encode()) for text in TEXTS) - firsts


def ratio_error(tops, bottoms):
    """Cochran's equation for the standard error of sum(tops) / sum(bottoms)."""
    tops, bottoms = np.array(tops), np.array(bottoms)
    residuals = tops - tops.sum() / bottoms.sum() * bottoms
    return float(np.std(residuals, ddof=1) / len(tops) ** 0.5 / bottoms.mean())


def test_uniform_model_needs_log2_of_the_vocabulary_per_token(table_model, tokenizer):
    """A worked example: with all logits equal every token costs log2(6400) bits."""
    model = table_model(torch.zeros(tokenizer.vocab_size, tokenizer.vocab_size))
    report = text_loss(model, tokenizer, ["once upon a time"], [0])
    tokens = len(tokenizer.encode("once upon a time"))
    assert report.bits_per_byte == pytest.approx(tokens * math.log2(6400) / 16, rel=1e-5)


def test_standard_errors():
    """Worked by hand: the sample variance of 0, 0, 1, 1 is 1/3; with equal sizes a ratio is a mean."""
    assert mean_and_error([0, 0, 1, 1]) == pytest.approx((0.5, math.sqrt(1 / 3 / 4)))
    assert ratio_and_error([0, 0, 1, 1], [1, 1, 1, 1]) == pytest.approx((0.5, math.sqrt(1 / 3 / 4)))
    assert ratio_and_error([2, 4], [1, 2]) == pytest.approx((2.0, 0.0))
    assert mean_and_error([3.0]) == (3.0, None)
    with pytest.raises(ValueError, match="no values"):
        mean_and_error([])


def test_bf16_weights_do_not_round_the_logits(table_model, tokenizer):
    """Logits in bfloat16 near 16 are multiples of 1/8; the head must not run in the model's precision."""
    from tinylm.evaluation.sequence_logprob import token_logprobs

    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 64).bfloat16(), torch.randn(50, 64).bfloat16()
    model = torch.nn.Module()
    model.lm_head = torch.nn.Linear(64, 50, bias=False, dtype=torch.bfloat16)
    model.lm_head.weight.data = weight
    targets = torch.tensor([1, 2, 3, 4])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values, _ = token_logprobs(model, hidden, targets)
    expected = torch.log_softmax(hidden.double() @ weight.double().T, -1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(values, expected, atol=1e-4, rtol=0)
