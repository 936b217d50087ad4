"""How probable a model finds given tokens: the one helper behind every likelihood-based measure.

    log P(continuation | context) = sum_t log softmax(logits_{t-1})[continuation_t]

Shapes: B sequences in a batch, T longest of them, C width, N scored tokens, V vocabulary.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tinylm.model.log_probs import exact_logits, target_log_probs

TokenIds = Sequence[int]
Progress = Callable[[int, int], None]
"""Called with (done, total) during the work."""

TOKENS_PER_BATCH = 4096
"""Tokens in one forward pass; enough to keep two CPU cores at full speed, while the logits stay near 100
MB."""

SMALL_BATCH = 256
"""Tokens from which on a batch may end early, for the sake of less padding."""


@dataclass(frozen=True)
class Score:
    """What a model says about the scored tokens of one sequence."""

    logprob: float
    """Summed natural-log probability (nats)."""
    is_greedy: bool
    """True when each scored token is the model's most probable one, given the true tokens before it."""
    num_tokens: int
    """How many tokens were scored."""


@dataclass(frozen=True)
class _Piece:
    """At most `window` inputs of a sequence, with the positions of the tokens scored here."""

    owner: int
    ids: TokenIds
    positions: list[int]
    """Indices into `ids` of the scored tokens; each at least 1, because a token needs one before it."""


def continuation_logprobs(
    model: Any,
    requests: Sequence[tuple[TokenIds, TokenIds]],
    *,
    window: int | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: Progress | None = None,
) -> list[Score]:
    """Score each continuation given its context; requests are pairs (context ids, continuation ids).

    Raises:
        ValueError: a context is empty; give at least `<|endoftext|>`, the token that begins a document.
    """
    sequences = []
    for context, continuation in requests:
        if not context:
            raise ValueError("an empty context; expected at least one token; begin the context with <|endoftext|>")
        sequences.append(([*context, *continuation], [False] * len(context) + [True] * len(continuation)))
    return sequence_logprobs(model, sequences, window=window, tokens_per_batch=tokens_per_batch, progress=progress)


def opened(ids: TokenIds, document_start: TokenIds) -> tuple[TokenIds, TokenIds]:
    """A text as (context, continuation): `document_start` is the context, or else the text's own first token.

    Args:
        document_start: what a document began with when the model was trained; empty if with its own first token.
    """
    whole = [*document_start, *ids]
    given = len(document_start) or 1
    return whole[:given], whole[given:]


@torch.inference_mode()
def sequence_logprobs(
    model: Any,
    sequences: Sequence[tuple[TokenIds, Sequence[bool]]],
    *,
    window: int | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: Progress | None = None,
) -> list[Score]:
    """Score the marked tokens of each sequence; sequences are pairs (ids, mask of the tokens to score).

    Equal sequences are computed once, so equal inputs have exactly equal scores. Sequences are batched by
    length and padded on the right: under causal attention no token sees the padding, so no mask is needed and
    almost nothing is wasted. A sequence longer than `window` inputs (default: the model's
    `max_position_embeddings`) is split: each token is scored once, with at least half a window before it (less only
    at the sequence's start).

    Raises:
        ValueError: a sequence's first token is marked, or ids and mask differ in length.
        RuntimeError: the model gave NaN.
    """
    window = window or int(model.config.max_position_embeddings)
    owners: dict[tuple[tuple[int, ...], tuple[bool, ...]], int] = {}
    order = [owners.setdefault((tuple(ids), tuple(mask)), len(owners)) for ids, mask in sequences]
    pieces = [
        piece for owner, (ids, mask) in enumerate(owners) for piece in split_into_windows(owner, ids, mask, window)
    ]
    logprobs = torch.zeros(len(owners), dtype=torch.float64)
    greedy = torch.ones(len(owners), dtype=torch.bool)
    counts = torch.zeros(len(owners), dtype=torch.int64)
    was_training = model.training
    model.eval()
    try:
        done = 0
        for batch in _batches_by_length(pieces, tokens_per_batch):
            values, hits, rows = _score_batch(model, batch)
            owner_ids = torch.tensor([piece.owner for piece in batch])[rows]
            logprobs.index_add_(0, owner_ids, values)
            counts.index_add_(0, owner_ids, torch.ones_like(owner_ids))
            greedy[owner_ids[~hits]] = False
            done += len(batch)
            if progress is not None:
                progress(done, len(pieces))
    finally:
        model.train(was_training)
    if torch.isnan(logprobs).any():
        raise RuntimeError("the model gave NaN log-probabilities; its weights or its precision are broken")
    results = [Score(*row) for row in zip(logprobs.tolist(), greedy.tolist(), counts.tolist(), strict=True)]
    return [results[index] for index in order]


def split_into_windows(owner: int, ids: TokenIds, mask: Sequence[bool], window: int) -> Iterator[_Piece]:
    """Cut one sequence into pieces of at most `window` inputs (`window` + 1 ids).

    A later piece begins half a window before its first scored token; the last piece, and any that has room,
    begins as early as it can, so every token keeps the most context that the window gives.
    """
    if len(ids) != len(mask):
        raise ValueError(f"{len(ids)} ids with a mask of {len(mask)}; expected one mark for each id")
    if mask and mask[0]:
        raise ValueError("the first token is marked; nothing precedes it; begin the sequence with <|endoftext|>")
    if window < 2:
        raise ValueError(f"window {window}; expected at least 2 tokens")
    scored = [index for index, marked in enumerate(mask) if marked]
    done = 0
    while done < len(scored):
        begin = scored[done]
        start = max(0, begin - (window + 1) // 2)
        end = min(len(ids), start + window + 1)
        here = scored[done : bisect.bisect_left(scored, end)]
        end = here[-1] + 1
        start = max(0, end - window - 1)
        yield _Piece(owner, ids[start:end], [index - start for index in here])
        done += len(here)


def _batches_by_length(pieces: list[_Piece], tokens_per_batch: int) -> Iterator[list[_Piece]]:
    """Longest first, so that memory runs out at the start if it does; neighbours have nearly equal lengths.

    A batch ends when it is full, or when it is large enough and the next piece would be a quarter padding.
    """
    batch: list[_Piece] = []
    for piece in sorted(pieces, key=lambda piece: len(piece.ids), reverse=True):
        longest = len(batch[0].ids) - 1 if batch else 0
        is_full = (len(batch) + 1) * longest > tokens_per_batch
        is_padded = len(batch) * longest >= SMALL_BATCH and 4 * (len(piece.ids) - 1) < 3 * longest
        if batch and (is_full or is_padded):
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


def _score_batch(model: Any, batch: list[_Piece]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probability [N] float64, was it the most probable [N] bool, and row in the batch [N], of scored
    tokens."""
    length = max(len(piece.ids) for piece in batch) - 1
    device = next(model.parameters()).device
    inputs = torch.zeros(len(batch), length, dtype=torch.int64)
    for row, piece in enumerate(batch):
        inputs[row, : len(piece.ids) - 1] = torch.tensor(piece.ids[:-1])
    rows = torch.tensor([row for row, piece in enumerate(batch) for _ in piece.positions])
    columns = torch.tensor([position - 1 for piece in batch for position in piece.positions])
    targets = torch.tensor([piece.ids[position] for piece in batch for position in piece.positions])
    hidden = model.hidden_states(inputs.to(device))  # [B, T, C]
    wanted = hidden[rows.to(device), columns.to(device)]  # [N, C]: the head runs on scored positions only
    values, hits = token_logprobs(model, wanted, targets.to(device))
    return values.cpu(), hits.cpu(), rows


def token_logprobs(
    model: Any, hidden: torch.Tensor, targets: torch.Tensor, rows_per_step: int = 4096
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target and whether it is the most probable token, from exact logits.

    It takes a few thousand rows at a time: for long texts, N x V numbers at once would not fit into memory.

    Args:
        hidden: [N, C], after the final norm.
        targets: [N] int64.

    Returns:
        [N] float64 (nats; float32 on MPS, which has no float64) and [N] bool. A target that shares the top
        score with another token counts as the most probable.
    """
    sum_dtype = torch.float32 if hidden.device.type == "mps" else torch.float64
    values, hits = [hidden.new_zeros(0, dtype=sum_dtype)], [hidden.new_zeros(0, dtype=torch.bool)]
    for part, wanted in zip(hidden.split(rows_per_step), targets.split(rows_per_step), strict=True):
        logits = exact_logits(model.lm_head, part)  # [n, V]
        values.append(target_log_probs(logits, wanted).to(sum_dtype))
        hits.append(logits.gather(1, wanted[:, None])[:, 0] >= logits.amax(dim=-1))
    return torch.cat(values), torch.cat(hits)


def perplexity(loss: float) -> float:
    """exp(loss), with loss in nats per token; infinite rather than an overflow error."""
    return math.exp(loss) if loss < 700 else math.inf
