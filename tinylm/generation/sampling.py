"""From logits to the next token: penalties, filters and the draw, each a pure function.

Shapes: B batch, V vocabulary. Every filter takes logits [B, V] and returns logits [B, V] with the tokens it rules
out at minus infinity; softmax then gives them probability zero and renormalises the rest.

`filter_logits` composes them in the order transformers uses (repetition penalty, temperature, top-k, top-p, min-p),
so the same numbers mean the same distribution in both libraries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Sorting 6400 logits costs about fifteen times as much as finding the 256 largest, which nearly always already hold
# the nucleus (measured on one CPU core: 330 microseconds against 33).
NUCLEUS_FIRST_LOOK = 256


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is chosen, and how many of them at most."""

    max_new_tokens: int = 256
    """Most tokens to generate per answer (tokens)."""
    temperature: float = 0.7
    """Divides the logits: below 1 is more careful, above 1 bolder; 0 always takes the likeliest token (greedy)."""
    top_k: int = 0
    """Draw only from the k likeliest tokens (tokens; 0 = off)."""
    top_p: float = 0.9
    """Draw only from the fewest tokens whose probabilities reach this sum (0 to 1; 1 = off)."""
    min_p: float = 0.0
    """Draw only from tokens at least this fraction as likely as the likeliest one (0 to 1; 0 = off)."""
    repetition_penalty: float = 1.0
    """Makes tokens that already occurred less likely (1 = off; 1.1 to 1.3 is usual)."""
    num_beams: int = 1
    """Beam search over this many hypotheses (1 = off); deterministic, so it needs temperature 0."""
    length_penalty: float = 1.0
    """Beam search divides a hypothesis' log-probability by its length in tokens to this power."""
    seed: int | None = None
    """Seed of the draw; unset = another answer every time."""

    def __post_init__(self) -> None:
        accept("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1")
        accept("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 (greedy) or more")
        accept("top_k", self.top_k, self.top_k >= 0, "0 (off) or more")
        accept("top_p", self.top_p, 0 <= self.top_p <= 1, "0 to 1 (1 = off)")
        accept("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1 (0 = off)")
        penalty = self.repetition_penalty
        accept("repetition_penalty", penalty, 0 < penalty < math.inf, "more than 0 (1 = off)")
        accept("num_beams", self.num_beams, self.num_beams >= 1, "at least 1 (1 = off)")
        accept("length_penalty", self.length_penalty, math.isfinite(self.length_penalty), "a finite number")
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError(
                f"num_beams={self.num_beams} with temperature={self.temperature}; beam search does not sample; "
                "set temperature to 0, or num_beams to 1"
            )


def accept(name: str, value: Any, is_valid: bool, accepted: str) -> None:
    """Raise a ValueError that names the setting, its value and the accepted range, unless `is_valid`.

    Not-a-number fails every comparison, so it is refused as well.
    """
    if not is_valid:
        raise ValueError(f"{name} is {value}; accepted is {accepted}")


def repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that already occurred less likely.

    z_i <- z_i / penalty where z_i > 0, else z_i * penalty, for every token i that occurred
    (Keskar et al. 2019, CTRL, section 4.1; the sign rule is the one every library uses, since dividing a negative
    logit would reward it).

    Args:
        logits: [B, V].
        seen: bool [B, V], true where the token occurred in the prompt or the answer so far (see `seen_tokens`).
        penalty: more than 0; 1 changes nothing, below 1 rewards repetition.
    """
    accept("repetition_penalty", penalty, 0 < penalty < math.inf, "more than 0 (1 = off)")
    if penalty == 1.0:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def temperature(logits: Tensor, value: float) -> Tensor:
    """Flatten or sharpen the distribution: z_i <- z_i / value (Ackley, Hinton & Sejnowski 1985, section 2).

    A value of 0 is the limit: only the likeliest token remains (the first of them, if several tie).
    """
    accept("temperature", value, 0 <= value < math.inf, "0 (greedy) or more")
    if value == 0:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.full_like(logits, -math.inf).scatter(-1, best, logits.gather(-1, best))
    return logits if value == 1.0 else logits / value


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits: z_i stays where z_i >= (k-th largest z), Fan et al. 2018, section 5.1.

    Tokens that tie with the k-th all stay. 0, or at least V, keeps everything.
    """
    accept("top_k", k, k >= 0, "0 (off) or more")
    if k == 0 or k >= logits.shape[-1]:
        return logits
    smallest_kept = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, -math.inf)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Nucleus: keep the fewest tokens whose probabilities sum to at least p (Holtzman et al. 2020, section 3.1).

    With probabilities sorted downwards, token i stays where sum_{j<i} P_j < p. The likeliest token always stays, so
    p = 0 is greedy; p = 1 keeps everything.
    """
    accept("top_p", p, 0 <= p <= 1, "0 to 1 (1 = off)")
    if p == 1.0:
        return logits
    probabilities = torch.softmax(logits, dim=-1)
    largest, tokens = probabilities.topk(min(NUCLEUS_FIRST_LOOK, logits.shape[-1]), dim=-1)
    if bool((largest.sum(dim=-1) < p).any()):
        largest, tokens = probabilities.sort(dim=-1, descending=True)
    mass_above = largest.cumsum(dim=-1) - largest
    is_kept = mass_above < p
    is_kept[..., 0] = True
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, tokens, is_kept)
    return logits.masked_fill(~kept, -math.inf)


def min_p(logits: Tensor, fraction: float) -> Tensor:
    """Keep tokens at least `fraction` as likely as the likeliest: P_i >= fraction * max_j P_j (Nguyen et al. 2024).

    In logits: z_i >= max_j z_j + ln(fraction), so no softmax is needed. 0 keeps everything, 1 only the likeliest.
    """
    accept("min_p", fraction, 0 <= fraction <= 1, "0 to 1 (0 = off)")
    if fraction == 0.0:
        return logits
    threshold = logits.amax(dim=-1, keepdim=True) + math.log(fraction)
    return logits.masked_fill(logits < threshold, -math.inf)


def filter_logits(logits: Tensor, settings: SamplingSettings, seen: Tensor | None = None) -> Tensor:
    """Apply every filter of `settings` to logits [B, V], in transformers' order.

    `seen` (bool [B, V]) is needed only when `settings.repetition_penalty` is not 1.
    """
    if seen is not None:
        logits = repetition_penalty(logits, seen, settings.repetition_penalty)
    if settings.temperature == 0:
        return temperature(logits, 0.0)
    logits = temperature(logits, settings.temperature)
    logits = top_k(logits, settings.top_k)
    logits = top_p(logits, settings.top_p)
    return min_p(logits, settings.min_p)


def sample(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token a row by inverting the cumulative distribution: the first i with sum_{j<=i} P_j > u.

    One number per row, given from outside, keeps this a pure function, and makes a row's draw independent of which
    other rows share its batch. It is also faster than `torch.multinomial`, which draws a number for every token.

    Args:
        logits: [B, V] after filtering; tokens at minus infinity are never drawn.
        uniforms: [B], each in [0, 1).

    Returns:
        int64 [B].
    """
    cumulative = torch.softmax(logits.float(), dim=-1).cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Rounding may lift u * total to the total itself, past the last token: stay just below it.
    targets = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, targets, right=True).squeeze(-1)


def next_tokens(
    logits: Tensor, settings: SamplingSettings, uniforms: Tensor | None = None, seen: Tensor | None = None
) -> Tensor:
    """The tokens [B] that `settings` choose from logits [B, V]: filters, then the draw; greedy takes a short cut.

    `uniforms` [B] is not read when the temperature is 0.
    """
    logits = logits.float()
    if settings.temperature == 0:
        if seen is not None:
            logits = repetition_penalty(logits, seen, settings.repetition_penalty)
        return logits.argmax(dim=-1)
    assert uniforms is not None, "drawing needs one uniform number per row"
    return sample(filter_logits(logits, settings, seen), uniforms)


def seen_tokens(rows: list[list[int]], vocab_size: int, device: torch.device | str = "cpu") -> Tensor:
    """bool [B, V]: which tokens occur in each row of ids; what `repetition_penalty` reads."""
    seen = torch.zeros(len(rows), vocab_size, dtype=torch.bool)
    for row, ids in zip(seen, rows, strict=True):
        row[ids] = True
    return seen.to(device)


def uniform_numbers(seed: int, row: int, count: int) -> Tensor:
    """`count` numbers in [0, 1) for row `row` of a call with this seed (float32, on the CPU).

    Each row has its own generator, so its numbers depend on (seed, row) only: not on the batch size, the order in
    which rows are computed, or the device. Row 0 uses the seed itself: a list of one prompt and a single prompt agree.
    """
    # 2^64 / golden ratio: neighbouring rows get far-apart seeds (Knuth, TAOCP vol. 3, section 6.4).
    mixed = (seed + row * 0x9E3779B97F4A7C15) % 2**64
    return torch.rand(count, generator=torch.Generator().manual_seed(mixed))
