"""Minimal pairs: does the model find the grammatical sentence more probable than its ungrammatical twin?

The measure of BLiMP (Warstadt et al., 2020, https://arxiv.org/abs/1912.00582): whole-sentence probability,
nothing else; chance is 0.5.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tinylm.evaluation.results import Measure, measure_of
from tinylm.evaluation.sequence_logprob import TOKENS_PER_BATCH, Progress, TokenIds, continuation_logprobs, opened


@dataclass(frozen=True)
class MinimalPair:
    """Two sentences that differ in one point of grammar."""

    set: str
    """The phenomenon; accuracy is reported for each."""
    good: str
    bad: str


@dataclass(frozen=True)
class MinimalPairReport:
    """Points of each pair by set: 1 for P(good) > P(bad), 0.5 for a tie, 0 otherwise."""

    points: dict[str, list[float]]

    def measures(self, task: str) -> list[Measure]:
        """The mean over all pairs first, then a row for each set when there are several.

        BLiMP's sets are of one size, so there the mean over pairs is also the mean over sets.
        """
        rows = [measure_of(task, "accuracy", [p for points in self.points.values() for p in points])]
        if len(self.points) > 1:
            rows += [measure_of(f"  {name}", "accuracy", points) for name, points in self.points.items()]
        return rows


def minimal_pair_accuracy(
    model: Any,
    tokenizer: Any,
    pairs: Iterable[MinimalPair],
    document_start: TokenIds,
    *,
    limit_per_set: int | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: Progress | None = None,
) -> MinimalPairReport:
    """Compare summed log-probabilities of both sentences, each after `document_start` (see `opened`).

    Args:
        limit_per_set: take only the first so many pairs of each set.
    """
    chosen: list[MinimalPair] = []
    counts: dict[str, int] = {}
    for pair in pairs:
        counts[pair.set] = counts.get(pair.set, 0) + 1
        if limit_per_set is None or counts[pair.set] <= limit_per_set:
            chosen.append(pair)
    sentences = [sentence for pair in chosen for sentence in (pair.good, pair.bad)]
    requests = [opened(ids, document_start) for ids in tokenizer.encode_batch(sentences)]
    scores = continuation_logprobs(model, requests, tokens_per_batch=tokens_per_batch, progress=progress)
    points: dict[str, list[float]] = {}
    for index, pair in enumerate(chosen):
        good, bad = scores[2 * index].logprob, scores[2 * index + 1].logprob
        points.setdefault(pair.set, []).append(1.0 if good > bad else 0.5 if good == bad else 0.0)
    return MinimalPairReport(points)
