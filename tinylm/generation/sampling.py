"""From logits to the next token: penalties, filters and the draw, each a pure function.

Shapes: B batch, V vocabulary. Every filter takes logits [B, V] and returns logits [B, V] with the tokens it rules
out at minus infinity; softmax then gives them probability zero and renormalises the rest. A filter's parameter is one
number for all rows or [B], one for each; its range is checked where it comes from, in `SamplingSettings`.

`filter_logits` composes them in the order transformers uses (repetition penalty, temperature, top-k, top-p, min-p),
so the same numbers mean the same distribution in both libraries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Sorting 6400 logits takes ten times as long as finding the 256 largest (330 and 33 microseconds on one CPU core), and
# these nearly always contain the nucleus.
NUCLEUS_FIRST_LOOK = 256

MAX_BEAMS = 256
"""Each beam has a KV cache of its own."""
_EXTREME = 1e15
"""Temperatures below 1 / this act as greedy, and above it as uniform; the logits stay finite between them."""


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of sampling: how the next token is chosen, and how many of them at most."""

    max_new_tokens: int = 256
    """most tokens of an answer"""
    temperature: float = 0.7
    """divides the logits: below 1 is more careful, above 1 bolder; 0 always takes the likeliest token (greedy)"""
    top_k: int = 0
    """draw only from the k likeliest tokens; 0 turns it off"""
    top_p: float = 0.9
    """draw only from the fewest tokens whose probabilities reach this sum, from 0 to 1; 1 turns it off"""
    min_p: float = 0.0
    """draw only from tokens at least this fraction as likely as the likeliest, from 0 to 1; 0 turns it off"""
    repetition_penalty: float = 1.0
    """makes tokens that already occurred less likely, from 0.01 to 100; 1 turns it off, 1.1 to 1.3 is usual"""
    num_beams: int = 1
    """beam search over this many hypotheses; 1 turns it off; it does not sample, so it needs temperature 0"""
    length_penalty: float = 1.0
    """beam search divides a hypothesis' log-probability by its length in tokens to this power, from -50 to 50"""
    seed: int | None = None
    """seed of the draw; without it, another answer every time"""

    def __post_init__(self) -> None:
        accept("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1")
        accept("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 (greedy) or more")
        accept("top_k", self.top_k, self.top_k >= 0, "0 (off) or more")
        accept("top_p", self.top_p, 0 <= self.top_p <= 1, "0 to 1 (1 = off)")
        accept("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1 (0 = off)")
        accept(
            "repetition_penalty",
            self.repetition_penalty,
            0.01 <= self.repetition_penalty <= 100,
            "0.01 to 100 (1 = off)",
        )
        accept("num_beams", self.num_beams, 1 <= self.num_beams <= MAX_BEAMS, f"1 (off) to {MAX_BEAMS}")
        # 50: the longest context to this power is still a number
        accept("length_penalty", self.length_penalty, abs(self.length_penalty) <= 50, "-50 to 50 (0 = off)")
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


PerRow = float | Tensor
"""One number for all rows of a batch, or [B] with one for each."""


def _column(value: PerRow, logits: Tensor) -> Tensor:
    """`value` beside logits [B, V]: [B, 1], or [1, 1] for one number."""
    return torch.as_tensor(value, dtype=logits.dtype, device=logits.device).reshape(-1, 1)


@dataclass(frozen=True)
class BatchSampling:
    """The settings of a batch's rows, [B] each. Make it with `of`.

    A filter that no row uses is skipped. `has_top_k` and the like tell this without reading the tensors, which would
    wait for the device.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    is_greedy: bool
    """Every row has temperature 0."""
    has_penalty: bool
    """Some row has a repetition penalty."""
    has_top_k: bool
    has_top_p: bool
    has_min_p: bool

    @classmethod
    def of(cls, rows: Sequence[SamplingSettings], device: torch.device | str = "cpu") -> BatchSampling:
        """The settings of each row, in the order of the rows."""

        def column(name: str) -> Tensor:
            return torch.tensor([getattr(settings, name) for settings in rows], device=device)

        temperatures = [t and min(max(t, 1 / _EXTREME), _EXTREME) for t in (settings.temperature for settings in rows)]
        return cls(
            temperature=torch.tensor(temperatures, device=device),
            top_k=torch.tensor([min(settings.top_k, 2**31) for settings in rows], device=device),
            top_p=column("top_p"),
            min_p=column("min_p"),
            repetition_penalty=column("repetition_penalty"),
            is_greedy=all(settings.temperature == 0 for settings in rows),
            has_penalty=any(settings.repetition_penalty != 1 for settings in rows),
            has_top_k=any(settings.top_k for settings in rows),
            has_top_p=any(settings.top_p != 1 for settings in rows),
            has_min_p=any(settings.min_p for settings in rows),
        )


def repetition_penalty(logits: Tensor, seen: Tensor, penalty: PerRow) -> Tensor:
    """Make tokens that already occurred less likely.

    z_i <- z_i / penalty where z_i > 0, else z_i * penalty, for every token i that occurred
    (Keskar et al. 2019, CTRL, section 4.1; every library distinguishes the sign, because dividing a negative
    logit would reward the token).

    Args:
        logits: [B, V].
        seen: bool [B, V], true where the token occurred in the prompt or the answer so far (see `seen_tokens`).
        penalty: more than 0; 1 changes nothing, below 1 rewards repetition.
    """
    penalty = _column(penalty, logits)
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def count_penalties(logits: Tensor, counts: Tensor, presence: float, frequency: float) -> Tensor:
    """Make tokens less likely by how often they are in the answer so far, whatever the prompt holds.

    z_i <- z_i - presence * [c_i > 0] - frequency * c_i    (as OpenAI's API defines them)

    Args:
        logits, counts: of one shape; c_i counts token i.
        presence, frequency: 0 changes nothing, below 0 rewards repetition.
    """
    return logits - presence * (counts > 0) - frequency * counts


def temperature(logits: Tensor, value: PerRow) -> Tensor:
    """Flatten or sharpen the distribution: z_i <- z_i / value (Ackley, Hinton & Sejnowski 1985, section 2).

    A value of 0 is the limit: only the likeliest token remains (the first of them, if several tie).
    """
    value = _column(value, logits)
    is_greedy = value == 0
    scaled = logits / value.masked_fill(is_greedy, 1.0)
    best = logits.argmax(dim=-1, keepdim=True)
    is_best = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, best, True)
    return scaled.masked_fill(is_greedy & ~is_best, -math.inf)


def top_k(logits: Tensor, k: PerRow) -> Tensor:
    """Keep the k largest logits: z_i stays where z_i >= (k-th largest z), Fan et al. 2018, section 5.1.

    Tokens that tie with the k-th all stay. 0, or at least V, keeps everything.
    """
    vocab_size = logits.shape[-1]
    k = torch.as_tensor(k, device=logits.device).reshape(-1, 1).clamp(max=vocab_size)
    largest = logits.topk(max(1, int(k.max())), dim=-1).values  # [B, largest k]
    smallest_kept = largest.gather(-1, (k - 1).clamp(min=0).expand(logits.shape[0], 1))
    return logits.masked_fill((logits < smallest_kept) & (k > 0), -math.inf)


def top_p(logits: Tensor, p: PerRow) -> Tensor:
    """Nucleus: keep the fewest tokens whose probabilities sum to at least p (Holtzman et al. 2020, section 3.1).

    With probabilities sorted downwards, token i stays where sum_{j<i} P_j < p. The likeliest token always stays, so
    p = 0 is greedy; p = 1 keeps everything.
    """
    p = _column(p, logits)
    is_off = p == 1.0
    probabilities = torch.softmax(logits, dim=-1)
    largest, tokens = probabilities.topk(min(NUCLEUS_FIRST_LOOK, logits.shape[-1]), dim=-1)
    if bool(((largest.sum(dim=-1, keepdim=True) < p) & ~is_off).any()):
        largest, tokens = probabilities.sort(dim=-1, descending=True)
    mass_above = largest.cumsum(dim=-1) - largest
    is_kept = mass_above < p
    is_kept[..., 0] = True
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, tokens, is_kept)
    return logits.masked_fill(~(kept | is_off), -math.inf)


def min_p(logits: Tensor, fraction: PerRow) -> Tensor:
    """Keep tokens at least `fraction` as likely as the likeliest: P_i >= fraction * max_j P_j (Nguyen et al. 2024).

    In logits: z_i >= max_j z_j + ln(fraction), so no softmax is needed. 0 keeps everything, 1 only the likeliest.
    """
    threshold = logits.amax(dim=-1, keepdim=True) + _column(fraction, logits).log()
    return logits.masked_fill(logits < threshold, -math.inf)


def filter_logits(logits: Tensor, sampling: BatchSampling, seen: Tensor | None = None) -> Tensor:
    """Apply every row's filters to logits [B, V], in transformers' order.

    `seen` (bool [B, V]) is needed only where some row has a repetition penalty.
    """
    if sampling.has_penalty:
        assert seen is not None, "a repetition penalty needs the tokens seen so far"
        logits = repetition_penalty(logits, seen, sampling.repetition_penalty)
    logits = temperature(logits, sampling.temperature)
    if sampling.has_top_k:
        logits = top_k(logits, sampling.top_k)
    if sampling.has_top_p:
        logits = top_p(logits, sampling.top_p)
    return min_p(logits, sampling.min_p) if sampling.has_min_p else logits


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
    logits: Tensor, sampling: BatchSampling, uniforms: Tensor | None = None, seen: Tensor | None = None
) -> Tensor:
    """The tokens [B] that each row's settings choose from logits [B, V]: filters, then the draw.

    A batch of greedy rows takes a short cut and does not read `uniforms` [B].
    """
    logits = logits.float()
    if not sampling.is_greedy:
        assert uniforms is not None, "drawing needs one uniform number per row"
        return sample(filter_logits(logits, sampling, seen), uniforms)
    if sampling.has_penalty:
        assert seen is not None, "a repetition penalty needs the tokens seen so far"
        logits = repetition_penalty(logits, seen, sampling.repetition_penalty)
    return logits.argmax(dim=-1)


def seen_tokens(rows: Sequence[list[int]], vocab_size: int, device: torch.device | str = "cpu") -> Tensor:
    """bool [B, V]: which tokens occur in each row of ids; what `repetition_penalty` reads."""
    seen = torch.zeros(len(rows), vocab_size, dtype=torch.bool)
    for row, ids in zip(seen, rows, strict=True):
        row[ids] = True
    return seen.to(device)


class BatchChoice:
    """How the rows of a batch choose their next tokens, step after step; make another when the rows change.

    Args:
        settings: of each row.
        tokens: of each row so far, for a repetition penalty.
    """

    def __init__(
        self,
        settings: Sequence[SamplingSettings],
        tokens: Sequence[list[int]],
        vocab_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self._sampling = BatchSampling.of(settings, device)
        self._seen = seen_tokens(tokens, vocab_size, device) if self._sampling.has_penalty else None

    def __call__(self, logits: Tensor, uniforms: Sequence[float]) -> Tensor:
        """The next tokens [B] from logits [B, V] and a random number for each row, which greedy rows do not read."""
        numbers = None if self._sampling.is_greedy else torch.tensor(uniforms, device=logits.device)
        tokens = next_tokens(logits, self._sampling, numbers, self._seen)
        if self._seen is not None:
            self._seen[torch.arange(len(tokens), device=tokens.device), tokens] = True
        return tokens


def numbers_to_draw_with(settings: SamplingSettings, seed: int, row: int, count: int) -> list[float]:
    """The `uniform_numbers` of an answer of at most `count` tokens; zeros for a greedy one, which reads none."""
    return [0.0] * count if settings.temperature == 0 else uniform_numbers(seed, row, count).tolist()


def uniform_numbers(seed: int, row: int, count: int) -> Tensor:
    """`count` numbers in [0, 1) for row `row` of a call with this seed (float32, on the CPU).

    Each row has its own generator, so its numbers depend on (seed, row) only: not on the batch size, the order in
    which rows are computed, or the device. Row 0 uses the seed itself: a list of one prompt and a single prompt agree.
    """
    # 2^64 / golden ratio: neighbouring rows get far-apart seeds (Knuth, TAOCP vol. 3, section 6.4).
    mixed = (seed + row * 0x9E3779B97F4A7C15) % 2**64
    return torch.rand(count, generator=torch.Generator().manual_seed(mixed))
