"""Log-probabilities against worked examples and a plain float64 reference."""

from __future__ import annotations

import math
import random

import pytest
import torch

from tinylm.evaluation import sequence_logprob as module
from tinylm.evaluation.sequence_logprob import (
    continuation_logprobs,
    sequence_logprobs,
    split_into_windows,
)


def test_worked_example(table_model):
    """After 0 the model says 1 with 3/4 and 2 with 1/4; after 1 it says 2 for sure; after 2, all alike."""
    off = -1e9
    table = torch.tensor(
        [[off, math.log(3), 0.0, off], [off, off, 0.0, off], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    )
    requests = [([0], [1, 2]), ([0], [2]), ([0, 1, 2], [3, 0])]
    scores = continuation_logprobs(table_model(table), requests)
    assert [score.logprob for score in scores] == pytest.approx([math.log(3 / 4), math.log(1 / 4), 2 * math.log(1 / 4)])
    assert [score.is_greedy for score in scores] == [True, False, True]
    assert [score.num_tokens for score in scores] == [2, 1, 2]


def test_many_lengths_equal_the_reference_in_the_order_they_came(model, reference_logprobs):
    rng = random.Random(1)
    requests = []
    for _ in range(25):
        ids = [rng.randrange(6400) for _ in range(rng.randint(2, 40))]
        split = rng.randint(1, len(ids) - 1)
        requests.append((ids[:split], ids[split:]))
    scores = continuation_logprobs(model, requests, tokens_per_batch=64)
    for (context, continuation), score in zip(requests, scores, strict=True):
        plain = reference_logprobs(model, context + continuation)[len(context) - 1 :]
        assert score.logprob == pytest.approx(sum(plain), abs=1e-9)
        assert score.num_tokens == len(continuation)


def test_scattered_mask(model, reference_logprobs):
    ids = [5, 17, 300, 41, 2, 900, 77]
    mask = [False, False, True, True, False, False, True]
    [score] = sequence_logprobs(model, [(ids, mask)])
    plain = reference_logprobs(model, ids)
    assert score.logprob == pytest.approx(plain[1] + plain[2] + plain[5], abs=1e-9)
    assert score.num_tokens == 3


@pytest.mark.parametrize("window", [2, 3, 8, 9])
@pytest.mark.parametrize("length", [2, 3, 8, 9, 10, 40])
def test_windows_score_each_token_once_with_half_a_window_of_context(window, length):
    ids = list(range(100, 100 + length))
    mask = [False] + [True] * (length - 1)
    seen = []
    for piece in split_into_windows(0, ids, mask, window):
        assert len(piece.ids) <= window + 1
        for position in piece.positions:
            index = piece.ids[position] - 100
            assert piece.ids[:position] == ids[index - position : index]
            assert position >= min(index, window / 2)
            seen.append(index)
    assert seen == list(range(1, length))


def test_a_short_continuation_keeps_the_whole_window():
    [piece] = split_into_windows(0, list(range(50)), [False] * 49 + [True], 16)
    assert piece.ids == list(range(33, 50))


def test_long_text_equals_a_loop_over_windows(model, reference_logprobs):
    """The reference makes its own windows of 16 inputs: the first scores 16 tokens, later ones 9."""
    rng = random.Random(2)
    ids = [rng.randrange(6400) for _ in range(60)]
    expected, done = 0.0, 1
    while done < len(ids):
        start = max(0, done - 8)
        end = min(len(ids), start + 17)
        start = max(0, end - 17)
        plain = reference_logprobs(model, ids[start:end])
        expected += sum(plain[done - start - 1 :])
        done = end
    [score] = continuation_logprobs(model, [(ids[:1], ids[1:])], window=16)
    assert score.num_tokens == 59
    assert score.logprob == pytest.approx(expected, abs=1e-9)
    [whole] = continuation_logprobs(model, [(ids[:1], ids[1:])])
    assert abs(whole.logprob - score.logprob) > 1e-3, "context beyond the window matters to this model"


def test_equal_requests_have_exactly_equal_scores(model):
    rng = random.Random(3)
    requests = [([0], [rng.randrange(6400) for _ in range(rng.randint(1, 9))]) for _ in range(20)]
    model = model.float()
    try:
        scores = continuation_logprobs(model, requests + requests[::-1], tokens_per_batch=32)
    finally:
        model.double()
    assert scores[:20] == scores[20:][::-1]


class CountingModel(torch.nn.Module):
    """A model that counts its forward passes and the tokens in them."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.config, self.lm_head, self.shapes = model, model.config, model.lm_head, []

    def hidden_states(self, input_ids, position_ids=None, document_ids=None, cache=None):
        self.shapes.append(tuple(input_ids.shape))
        return self.inner.hidden_states(input_ids, position_ids, document_ids, cache)

    @property
    def num_tokens(self):
        return sum(rows * time for rows, time in self.shapes)


def questions(seed, count, *, contexts=(16, 90), endings=(1, 30), choices=(2, 5)):
    """Requests in the shape of multiple choice: `count` random contexts, each with several continuations."""
    rng = random.Random(seed)

    def ids(low, high):
        return [rng.randrange(6400) for _ in range(rng.randint(low, high))]

    requests = []
    for _ in range(count):
        context = ids(*contexts)
        requests += [(context, ids(*endings)) for _ in range(rng.randint(*choices))]
    rng.shuffle(requests)
    return requests


@pytest.mark.parametrize("tokens_per_batch", [1, 64, 300, 4096])
def test_shared_contexts_equal_scoring_one_by_one(model, reference_logprobs, tokens_per_batch):
    requests = questions(5, 12)
    counting = CountingModel(model)
    scores = continuation_logprobs(counting, requests, tokens_per_batch=tokens_per_batch)
    alone = [continuation_logprobs(model, [request])[0] for request in requests]
    for (context, continuation), score, one in zip(requests, scores, alone, strict=True):
        plain = reference_logprobs(model, context + continuation)[len(context) - 1 :]
        assert score.logprob == pytest.approx(sum(plain), abs=1e-9)
        assert (score.is_greedy, score.num_tokens) == (one.is_greedy, one.num_tokens)
    if tokens_per_batch > 1:
        largest = max(len(context) + len(continuation) for context, continuation in requests)
        assert max(rows * time for rows, time in counting.shapes) <= max(tokens_per_batch, largest)


def test_a_greedy_continuation_is_seen_after_a_shared_context(model):
    context = list(range(50, 90))
    best = []
    for _ in range(3):
        with torch.no_grad():
            best.append(int(model(torch.tensor([context + best]))[0, -1].argmax()))
    right, wrong = continuation_logprobs(model, [(context, best), (context, [*best[:2], best[2] ^ 1])])
    assert (right.is_greedy, wrong.is_greedy) == (True, False)


def test_a_shared_context_is_computed_once(model):
    """Forty questions of 60 to 90 tokens with four endings of 20 to 30: 190 tokens each instead of 400."""
    requests = questions(6, 40, contexts=(60, 90), endings=(20, 30), choices=(4, 4))
    counting = CountingModel(model)
    continuation_logprobs(counting, requests)
    one_by_one = sum(len(context) + len(continuation) - 1 for context, continuation in requests)
    assert counting.num_tokens < 0.6 * one_by_one


def test_a_long_context_with_many_endings_stays_within_the_batch(model, reference_logprobs):
    rng = random.Random(7)
    context = [rng.randrange(6400) for _ in range(200)]
    requests = [(context, [token]) for token in range(60)]
    counting = CountingModel(model)
    scores = continuation_logprobs(counting, requests, tokens_per_batch=256)
    assert max(rows * 201 for rows, time in counting.shapes if time == 1) <= module.CACHED_TOKENS * 256
    for (_, [token]), score in zip(requests, scores, strict=True):
        assert score.logprob == pytest.approx(reference_logprobs(model, [*context, token])[-1], abs=1e-9)


def test_contexts_and_endings_that_do_not_fit_into_one_cache_go_apart(model, reference_logprobs):
    """One question has a long context and short endings, another the reverse: together they exceed the window."""
    requests = questions(8, 1, contexts=(240, 240), endings=(2, 9), choices=(4, 4))
    requests += questions(9, 1, contexts=(200, 200), endings=(40, 56), choices=(4, 4))
    scores = continuation_logprobs(model, requests)
    for (context, continuation), score in zip(requests, scores, strict=True):
        plain = reference_logprobs(model, context + continuation)[len(context) - 1 :]
        assert score.logprob == pytest.approx(sum(plain), abs=1e-9)


def test_a_little_context_is_not_shared(model):
    counting = CountingModel(model)
    continuation_logprobs(counting, questions(10, 5, contexts=(4, 12)))
    continuation_logprobs(counting, questions(11, 1, contexts=(16, 16), endings=(90, 99), choices=(2, 2)))
    assert len(counting.shapes) <= 3, "one pass for each batch"


def test_progress_and_mode_are_as_before(model):
    calls = []
    model.train()
    continuation_logprobs(model, [([0], [1]), ([0], [2, 3])], progress=lambda done, total: calls.append((done, total)))
    assert model.training
    model.eval()
    assert calls[-1] == (2, 2)


def test_errors(model, table_model):
    with pytest.raises(ValueError, match="empty context"):
        continuation_logprobs(model, [([], [1])])
    with pytest.raises(ValueError, match="first token is marked"):
        sequence_logprobs(model, [([1, 2], [True, True])])
    with pytest.raises(ValueError, match="one mark for each"):
        sequence_logprobs(model, [([1, 2], [False])])
    with pytest.raises(RuntimeError, match="NaN"):
        continuation_logprobs(table_model(torch.full((2, 2), math.nan)), [([0], [1])])
    assert continuation_logprobs(model, []) == []


def test_batches_are_full_and_hold_little_padding():
    """A thousand sentences of 1 to 50 tokens: no batch above the limit, and less than a tenth of all is padding."""
    rng = random.Random(4)
    pieces = [module._Piece(i, list(range(rng.randint(2, 51))), [1]) for i in range(1000)]
    batches = list(module._batches_by_length(pieces, 512))
    sizes = [len(batch) * (len(batch[0].ids) - 1) for batch in batches]
    assert sorted(piece.owner for batch in batches for piece in batch) == list(range(1000))
    assert max(sizes) <= 512
    assert sum(sizes) < 1.1 * sum(len(piece.ids) - 1 for piece in pieces)
    few = list(module._batches_by_length(pieces[:60], 10**6))
    assert sum(len(batch) * (len(batch[0].ids) - 1) for batch in few) < 1.25 * sum(
        len(piece.ids) - 1 for piece in pieces[:60]
    )
    [alone] = module._batches_by_length([module._Piece(0, list(range(99)), [1])], 8)
    assert len(alone) == 1, "a piece longer than the limit goes alone"
