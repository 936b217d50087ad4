"""Validation loss and bits per byte.

    bits per byte = sum over tokens of -log2 P(token | tokens before it) / UTF-8 bytes of the text

Loss per token depends on how coarse the tokenizer is; bits per byte does not, so it compares models across
tokenizers. It is also the size, relative to the text's, that an arithmetic coder with this model would
compress to (Shannon, 1948).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tinylm.evaluation.results import Measure, ratio_and_error
from tinylm.evaluation.sequence_logprob import (
    TOKENS_PER_BATCH,
    Progress,
    TokenIds,
    continuation_logprobs,
    opened,
    perplexity,
)


@dataclass(frozen=True)
class LossReport:
    """How well a model predicts texts."""

    nats: float
    """Summed negative log-probability over all targets."""
    num_tokens: int
    num_bytes: int
    """UTF-8 bytes of the predicted texts; special tokens are not text and count zero."""
    num_texts: int
    loss_error: float | None = None
    """Standard error of `loss` over texts."""
    bits_per_byte_error: float | None = None

    @property
    def loss(self) -> float:
        """Nats per token; NaN when nothing was predicted."""
        return self.nats / self.num_tokens if self.num_tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte; NaN when the targets hold no text."""
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else math.nan

    def measures(self, task: str) -> list[Measure]:
        """Rows for a report."""
        rows = [Measure(task, "loss (nats/token)", self.loss, self.loss_error, self.num_texts)]
        rows.append(Measure(task, "perplexity", self.perplexity, None, self.num_texts))
        if self.num_bytes:
            error = self.bits_per_byte_error
            rows.append(Measure(task, "bits per byte", self.bits_per_byte, error, self.num_texts))
        return rows


def text_loss(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    document_start: TokenIds,
    *,
    window: int | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: Progress | None = None,
) -> LossReport:
    """Loss over whole texts of any length, each after `document_start` (see `opened`).

    A text longer than the window is scored in sliding windows: each token once, with at least half a window
    of context. Empty texts are left out.
    """
    texts = [text for text in texts if text]
    requests = [opened(ids, document_start) for ids in tokenizer.encode_batch(list(texts))]
    scores = continuation_logprobs(model, requests, window=window, tokens_per_batch=tokens_per_batch, progress=progress)
    nats = [-score.logprob for score in scores]
    tokens = [score.num_tokens for score in scores]
    sizes = [sum(len(tokenizer.token_bytes(token_id)) for token_id in ids) for _, ids in requests]
    _, loss_error = ratio_and_error(nats, tokens)
    _, nats_per_byte_error = ratio_and_error(nats, sizes)
    bits_error = None if nats_per_byte_error is None else nats_per_byte_error / math.log(2)
    return LossReport(math.fsum(nats), sum(tokens), sum(sizes), len(texts), loss_error, bits_error)
