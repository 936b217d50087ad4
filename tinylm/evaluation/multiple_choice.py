"""Multiple choice and last-word prediction, scored by likelihood.

`acc` picks the choice with the highest log P(choice | query); `acc_norm` divides by the choice's UTF-8 bytes
first, so that long answers are not punished for being long (the custom of the GPT-3 paper, Brown et al.,
2020,
https://arxiv.org/abs/2005.14165, and of the lm-evaluation-harness). Last-word prediction is LAMBADA's task
(Paperno et al., 2016, https://arxiv.org/abs/1606.06031).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tinylm.evaluation.results import Measure, mean_and_error, measure_of
from tinylm.evaluation.sequence_logprob import (
    TOKENS_PER_BATCH,
    Progress,
    Score,
    TokenIds,
    continuation_logprobs,
    perplexity,
)


@dataclass(frozen=True)
class ChoiceQuestion:
    """A query and its possible continuations, of which number `gold` is right."""

    query: str
    choices: tuple[str, ...]
    gold: int

    def __post_init__(self) -> None:
        if len(self.choices) < 2:
            raise ValueError(f"{len(self.choices)} choices; expected at least two")
        if not 0 <= self.gold < len(self.choices):
            raise ValueError(f"gold {self.gold}; expected a number from 0 to {len(self.choices) - 1}")


@dataclass(frozen=True)
class ChoiceReport:
    """1.0 for each question answered rightly, 0.0 for each other, by both rules."""

    by_sum: list[float]
    by_byte: list[float]
    chance: float
    """Expected accuracy of blind guessing."""

    def measures(self, task: str) -> list[Measure]:
        """Rows for a report."""
        return [
            measure_of(task, "acc", self.by_sum),
            measure_of(task, "acc_norm (per byte)", self.by_byte),
            Measure(task, "chance", self.chance, None, len(self.by_sum)),
        ]


@dataclass(frozen=True)
class LastWordReport:
    """Greedy hits (1.0 or 0.0) and log-probabilities (nats) of the last words."""

    hits: list[float]
    logprobs: list[float]

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability of a word (not of a token)."""
        return perplexity(-mean_and_error(self.logprobs)[0])

    def measures(self, task: str) -> list[Measure]:
        """Rows for a report."""
        value = self.perplexity
        error = mean_and_error(self.logprobs)[1]
        return [
            measure_of(task, "exact match (greedy)", self.hits),
            # d exp(x) = exp(x) dx carries the error of the mean over to the perplexity
            Measure(task, "perplexity (per word)", value, None if error is None else value * error, len(self.hits)),
        ]


def join_query(query: str, answer: str) -> tuple[str, str]:
    """Context and continuation as they are scored: the space between them belongs to the continuation.

    That is where the tokenizer puts it, so both sides encode as they would together. A query marked
    `Question:` gets an `Answer:` line, as in the harness's ARC and PIQA.
    """
    context = query.rstrip()
    if context.startswith("Question:") and not context.endswith("Answer:"):
        context += "\nAnswer:"
    return context, " " + answer.lstrip()


def continuation_scores(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    document_start: TokenIds,
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: Progress | None = None,
) -> list[Score]:
    """Score texts (context, continuation), each context after `document_start`.

    An empty context is `<|endoftext|>`, whether or not the model has seen a document begin with it.
    """
    contexts = tokenizer.encode_batch([context for context, _ in pairs])
    continuations = tokenizer.encode_batch([continuation for _, continuation in pairs])
    whole = [[*document_start, *ids] or [tokenizer.endoftext_id] for ids in contexts]
    requests = list(zip(whole, continuations, strict=True))
    return continuation_logprobs(model, requests, tokens_per_batch=tokens_per_batch, progress=progress)


def multiple_choice_accuracy(
    model: Any,
    tokenizer: Any,
    questions: Sequence[ChoiceQuestion],
    document_start: TokenIds,
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: Progress | None = None,
) -> ChoiceReport:
    """Accuracy by summed and by per-byte log-probability. Among tied choices the first is taken."""
    pairs = [join_query(question.query, choice) for question in questions for choice in question.choices]
    scores = continuation_scores(
        model, tokenizer, pairs, document_start, tokens_per_batch=tokens_per_batch, progress=progress
    )
    by_sum, by_byte, position = [], [], 0
    for question in questions:
        sums = [score.logprob for score in scores[position : position + len(question.choices)]]
        position += len(question.choices)
        per_byte = [
            value / max(1, len(choice.strip().encode("utf-8")))
            for value, choice in zip(sums, question.choices, strict=True)
        ]
        by_sum.append(float(sums.index(max(sums)) == question.gold))
        by_byte.append(float(per_byte.index(max(per_byte)) == question.gold))
    chance, _ = mean_and_error([1 / len(question.choices) for question in questions])
    return ChoiceReport(by_sum, by_byte, chance)


def last_word_accuracy(
    model: Any,
    tokenizer: Any,
    passages: Sequence[tuple[str, str]],
    document_start: TokenIds,
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: Progress | None = None,
) -> LastWordReport:
    """Does greedy decoding of each passage (context, last word) give the word?

    Token by token the greedy choice is compared with the word's own tokens, which is the same thing: decoding
    leaves the word's path at its first difference.
    """
    pairs = [(context.rstrip(), " " + word.strip()) for context, word in passages]
    scores = continuation_scores(
        model, tokenizer, pairs, document_start, tokens_per_batch=tokens_per_batch, progress=progress
    )
    return LastWordReport([float(score.is_greedy) for score in scores], [score.logprob for score in scores])
