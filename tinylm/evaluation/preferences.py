"""Preference accuracy: does the model lean towards the chosen answer?

The implicit reward of DPO (Rafailov et al., 2023, https://arxiv.org/abs/2305.18290), up to the factor beta:

    r(x, y) = log pi(y | x) - log pi_ref(y | x)

A pair counts when r(x, chosen) > r(x, rejected). Without a reference model, log pi alone is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from tinylm.evaluation.results import Measure, measure_of
from tinylm.evaluation.sequence_logprob import TOKENS_PER_BATCH, Progress, TokenIds, sequence_logprobs
from tinylm.tokenizer.chat_template import Message

EncodeChat = Callable[[list[Message]], tuple[TokenIds, Sequence[bool]]]
"""Messages to (ids, mask of the assistant's tokens), the tokenizer and its template bound in."""
ReferenceModel = Callable[[], AbstractContextManager[Any]]
"""Opens a context that yields the reference model: another model, or the same one with its adapters switched
off."""


def as_reference(model: Any) -> ReferenceModel:
    """A model that needs no switching, as a reference."""
    return lambda: nullcontext(model)


@dataclass(frozen=True)
class PreferenceReport:
    """Margins r(chosen) - r(rejected) in nats, one for each pair."""

    margins: list[float]
    has_reference: bool

    @property
    def points(self) -> list[float]:
        """1 where the chosen answer wins, 0.5 for a tie, 0 otherwise."""
        return [1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in self.margins]

    def measures(self, task: str) -> list[Measure]:
        """Rows for a report."""
        against = "relative to the reference" if self.has_reference else "no reference"
        return [
            measure_of(task, f"preference accuracy ({against})", self.points),
            measure_of(task, f"log-probability margin (nats, {against})", self.margins),
        ]


def answer_mask(mask: Sequence[bool], prompt_mask: Sequence[bool]) -> list[bool]:
    """Of a conversation's mask, the part after its prompt: earlier assistant turns are equal on both sides.

    The prompt's ids are a prefix of the conversation's, because the template renders message by message.
    """
    return [marked and index >= len(prompt_mask) for index, marked in enumerate(mask)]


def answer_logprobs(
    model: Any,
    encode_chat: EncodeChat,
    prompts: Sequence[list[Message]],
    answers: Sequence[list[Message]],
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: Progress | None = None,
) -> list[float]:
    """log P(answer | prompt) in nats, over the assistant's tokens after each prompt."""
    sequences = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids, mask = encode_chat([*prompt, *answer])
        sequences.append((ids, answer_mask(mask, encode_chat(prompt)[1])))
    scores = sequence_logprobs(model, sequences, tokens_per_batch=tokens_per_batch, progress=progress)
    return [score.logprob for score in scores]


def preference_accuracy(
    model: Any,
    encode_chat: EncodeChat,
    pairs: Sequence[tuple[list[Message], list[Message], list[Message]]],
    *,
    reference: ReferenceModel | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: Progress | None = None,
) -> PreferenceReport:
    """Margins of (prompt, chosen, rejected) pairs.

    Args:
        pairs: each part is a list of messages; chosen and rejected hold what follows the prompt.
        reference: opens a context that yields the model that training started from; None compares
            log-probabilities alone.
    """
    prompts = [prompt for prompt, _, _ in pairs for _ in range(2)]
    answers = [answer for _, chosen, rejected in pairs for answer in (chosen, rejected)]
    rewards = answer_logprobs(
        model, encode_chat, prompts, answers, tokens_per_batch=tokens_per_batch, progress=progress
    )
    if reference is not None:
        with reference() as reference_model:
            subtract = answer_logprobs(
                reference_model, encode_chat, prompts, answers, tokens_per_batch=tokens_per_batch
            )
        rewards = [ours - theirs for ours, theirs in zip(rewards, subtract, strict=True)]
    margins = [rewards[2 * i] - rewards[2 * i + 1] for i in range(len(pairs))]
    return PreferenceReport(margins, reference is not None)
