"""Sampling, held to transformers' processors, to worked numbers and to the distribution that is drawn from."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tinylm.generation import sampling
from tinylm.generation.sampling import (
    BatchSampling,
    SamplingSettings,
    filter_logits,
    next_tokens,
    sample,
    seen_tokens,
)

# Probabilities 0.4, 0.3, 0.2, 0.1: every cut below can be checked by hand.
LOGITS = torch.tensor([[0.2, 0.4, 0.1, 0.3]]).log()
OFF = -math.inf


def kept(logits: torch.Tensor) -> list[int]:
    return torch.isfinite(logits[0]).nonzero().flatten().tolist()


def random_logits(batch: int = 6, vocab: int = 1000, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(batch, vocab, generator=torch.Generator().manual_seed(5)) * scale


# ------------------------------------------------------------------------------------------------ worked examples


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    logits = torch.tensor([[2.0, -2.0, 3.0, -3.0]])
    out = sampling.repetition_penalty(logits, seen_tokens([[0, 1]], 4), 2.0)
    assert out.tolist() == [[1.0, -4.0, 3.0, -3.0]]


def test_temperature_divides() -> None:
    assert sampling.temperature(torch.tensor([[2.0, -1.0]]), 0.5).tolist() == [[4.0, -2.0]]


def test_temperature_zero_leaves_the_first_of_the_likeliest() -> None:
    assert sampling.temperature(torch.tensor([[1.0, 3.0, 3.0]]), 0.0).tolist() == [[OFF, 3.0, OFF]]


@pytest.mark.parametrize(
    ("k", "expected"), [(0, [0, 1, 2, 3]), (1, [1]), (2, [1, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])]
)
def test_top_k(k: int, expected: list[int]) -> None:
    assert kept(sampling.top_k(LOGITS, k)) == expected


@pytest.mark.parametrize(
    ("p", "expected"), [(0.0, [1]), (0.39, [1]), (0.5, [1, 3]), (0.69, [1, 3]), (0.75, [0, 1, 3]), (1.0, [0, 1, 2, 3])]
)
def test_top_p(p: float, expected: list[int]) -> None:
    assert kept(sampling.top_p(LOGITS, p)) == expected


def test_top_p_stops_where_the_sum_is_reached_exactly() -> None:
    """Four tokens of exactly a quarter each: two of them sum to 0.5, so a third would be one too many."""
    for p, expected in ((0.25, 1), (0.5, 2), (0.75, 3)):
        assert len(kept(sampling.top_p(torch.full((1, 4), 0.7), p))) == expected


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, [0, 1, 2, 3]), (0.3, [0, 1, 3]), (0.6, [1, 3]), (1.0, [1])])
def test_min_p(fraction: float, expected: list[int]) -> None:
    assert kept(sampling.min_p(LOGITS, fraction)) == expected


# ---------------------------------------------------------------------------------------------------- transformers


def test_each_filter_equals_transformers() -> None:
    logits = random_logits()
    ids = torch.randint(0, 1000, (6, 30), generator=torch.Generator().manual_seed(1))
    seen = seen_tokens(ids.tolist(), 1000)
    pairs = [
        (sampling.repetition_penalty(logits, seen, 1.3), RepetitionPenaltyLogitsProcessor(1.3)),
        (sampling.temperature(logits, 0.6), TemperatureLogitsWarper(0.6)),
        (sampling.top_k(logits, 40), TopKLogitsWarper(40)),
        (sampling.top_p(logits, 0.9), TopPLogitsWarper(0.9)),
        (sampling.min_p(logits, 0.05), MinPLogitsWarper(0.05)),
    ]
    for ours, processor in pairs:
        assert not torch.equal(ours, logits)
        torch.testing.assert_close(ours, processor(ids, logits), rtol=0, atol=0)


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])
def test_top_p_equals_transformers_when_the_nucleus_is_wide(scale: float) -> None:
    """A nearly flat distribution needs more tokens than the first look finds."""
    logits = random_logits(3, 2000, scale)
    for p in (0.05, 0.5, 0.95, 0.999):
        torch.testing.assert_close(sampling.top_p(logits, p), TopPLogitsWarper(p)(None, logits), rtol=0, atol=0)


@pytest.mark.parametrize("top_k", [0, 20])
def test_composition_equals_transformers(top_k: int) -> None:
    """The order matters: top-p after top-k renormalises over what top-k left, and both follow the temperature."""
    logits = random_logits()
    ids = torch.randint(0, 1000, (6, 30), generator=torch.Generator().manual_seed(1))
    settings = SamplingSettings(temperature=1.7, top_k=top_k, top_p=0.8, min_p=0.03, repetition_penalty=1.2)
    processors = [RepetitionPenaltyLogitsProcessor(1.2), TemperatureLogitsWarper(1.7)]
    processors += [TopKLogitsWarper(top_k)] if top_k else []
    processors += [TopPLogitsWarper(0.8), MinPLogitsWarper(0.03)]
    expected = LogitsProcessorList(processors)(ids, logits)
    ours = filter_logits(logits, BatchSampling.of([settings] * 6), seen_tokens(ids.tolist(), 1000))
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------- the draw


def test_sample_inverts_the_cumulative_distribution() -> None:
    """Cumulative 0.2, 0.6, 0.7, 1.0: 0.1 falls on token 0, 0.2 and 0.5 on 1, 0.65 on 2, 0.99 on 3."""
    uniforms = torch.tensor([0.1, 0.2001, 0.5, 0.65, 0.99])
    assert sample(LOGITS.expand(5, 4), uniforms).tolist() == [0, 1, 1, 2, 3]


def test_sample_never_draws_a_token_that_was_ruled_out() -> None:
    logits = torch.tensor([[OFF, 0.0, OFF, 0.3, OFF, 0.1, OFF]]).expand(2, 7)
    almost_one = 1 - 2.0**-24
    assert sample(logits, torch.tensor([0.0, almost_one])).tolist() == [1, 5]
    wide = torch.cat([random_logits(1, 5000, 0.1), torch.full((1, 100), OFF)], dim=1)
    assert sample(wide, torch.tensor([almost_one])).item() < 5000


def test_sample_draws_with_the_right_frequencies() -> None:
    count = 20_000
    drawn = sample(LOGITS.expand(count, 4), sampling.uniform_numbers(3, 0, count))
    frequencies = drawn.bincount(minlength=4) / count
    # Five standard deviations of a binomial share are at most 5 * sqrt(0.25 / 20000) = 0.018.
    torch.testing.assert_close(frequencies, LOGITS[0].exp(), atol=0.018, rtol=0)


def test_uniform_numbers_depend_on_seed_and_row_only() -> None:
    a = sampling.uniform_numbers(7, 3, 8)
    assert torch.equal(a, sampling.uniform_numbers(7, 3, 8))
    assert torch.equal(a[:5], sampling.uniform_numbers(7, 3, 5))
    assert not torch.equal(a, sampling.uniform_numbers(7, 4, 8))
    assert not torch.equal(a, sampling.uniform_numbers(8, 3, 8))
    assert not torch.equal(sampling.uniform_numbers(7, 4, 8), sampling.uniform_numbers(8, 3, 8))  # not seed + row


def test_next_tokens_at_temperature_zero_is_the_argmax_after_the_penalty() -> None:
    settings = SamplingSettings(temperature=0.0, repetition_penalty=3.0)
    logits = torch.tensor([[1.0, 2.0, 1.5]], dtype=torch.bfloat16)
    assert next_tokens(logits, BatchSampling.of([SamplingSettings(temperature=0.0)])).item() == 1
    sampling_of_row = BatchSampling.of([settings])
    assert next_tokens(logits, sampling_of_row, seen=seen_tokens([[1]], 3)).item() == 2
    assert filter_logits(logits, sampling_of_row, seen_tokens([[1]], 3)).argmax().item() == 2


ROWS = [
    SamplingSettings(temperature=0.0),
    SamplingSettings(temperature=1.7, top_p=1.0),
    SamplingSettings(temperature=0.6, top_k=7, top_p=0.8),
    SamplingSettings(temperature=1.3, top_k=40, top_p=1.0, min_p=0.02, repetition_penalty=1.4),
    SamplingSettings(temperature=0.0, repetition_penalty=2.5),
    SamplingSettings(temperature=2.0, top_p=0.3, repetition_penalty=0.8),
]


def test_rows_with_different_settings_do_as_each_row_alone() -> None:
    logits, uniforms = random_logits(6), torch.tensor([0.0, 0.99, 0.3, 0.7, 0.5, 0.2])
    seen = seen_tokens([row.topk(5).indices.tolist() for row in logits], 1000)
    together = BatchSampling.of(ROWS)
    filtered = filter_logits(logits, together, seen)
    chosen = next_tokens(logits, together, uniforms, seen)
    for row, settings in enumerate(ROWS):
        alone, here = BatchSampling.of([settings]), slice(row, row + 1)
        assert torch.equal(filtered[here], filter_logits(logits[here], alone, seen[here])), settings
        assert chosen[row] == next_tokens(logits[here], alone, uniforms[here], seen[here]), settings
    assert chosen[0] == logits[0].argmax() and chosen[4] != logits[4].argmax()


# ------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", -0.1),
        ("top_p", 1.01),
        ("min_p", -0.5),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", 1e-38),
        ("repetition_penalty", 1e38),
        ("num_beams", 0),
        ("num_beams", 10**9),
        ("length_penalty", math.inf),
        ("length_penalty", 1e9),
        ("length_penalty", -1e9),
    ],
)
def test_settings_refuse_what_is_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{name} is {value}; accepted is")):
        SamplingSettings(**{name: value})


def test_beams_with_a_temperature_are_refused_rather_than_ignored() -> None:
    with pytest.raises(ValueError, match="set temperature to 0"):
        SamplingSettings(num_beams=4)
    assert SamplingSettings(num_beams=4, temperature=0.0).num_beams == 4


@pytest.mark.parametrize("penalty", [1.0, 0.01, 100.0])
@pytest.mark.parametrize("value", [1e-300, 1e-46, 1e-38, 1e-12, 1e38, 1e300])
def test_the_smallest_temperature_is_greedy_and_the_largest_uniform(value: float, penalty: float) -> None:
    """1e-38 made the logits infinite, and the draw ended in an error."""
    logits, uniforms = random_logits(), torch.linspace(0, 0.999, 6)
    seen = torch.arange(1000).expand(6, -1) % 3 == 0
    settings = SamplingSettings(temperature=value, top_p=1.0, repetition_penalty=penalty)
    batch = BatchSampling.of([settings] * 6)
    drawn = next_tokens(logits, batch, uniforms, seen)
    if value < 1:
        greedy = BatchSampling.of([replace(settings, temperature=0.0)] * 6)
        assert drawn.equal(next_tokens(logits, greedy, uniforms, seen))
    else:
        assert (drawn - uniforms * 1000).abs().max() < 2


@pytest.mark.parametrize("settings", [{"top_k": 10**30}, {"top_p": 1e-38}, {"min_p": 1e-46}, {"top_p": 0, "top_k": 1}])
def test_extreme_filters_still_draw_a_token(settings: dict) -> None:
    logits = random_logits()
    drawn = next_tokens(logits, BatchSampling.of([SamplingSettings(**settings)] * 6), torch.full((6,), 0.5))
    is_off = settings.get("top_p", 0.9) == 0.9
    assert ((drawn >= 0) & (drawn < 1000)).all() and (is_off or drawn.equal(logits.argmax(-1)))


@pytest.mark.parametrize("penalty", [-50, 50])
def test_the_largest_length_penalty_is_a_number_for_the_longest_context(penalty: float) -> None:
    SamplingSettings(length_penalty=penalty)
    assert 0 < float(2**20) ** penalty < math.inf
