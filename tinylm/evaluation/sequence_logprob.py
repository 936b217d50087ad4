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

from tinylm.model.kv_cache import KVCache
from tinylm.model.log_probs import exact_logits, target_log_probs

TokenIds = Sequence[int]
Progress = Callable[[int, int], None]
"""Called with (done, total) during the work."""

TOKENS_PER_BATCH = 4096
"""Tokens in one forward pass; enough to keep two CPU cores at full speed, while the logits stay near 100
MB."""

SMALL_BATCH = 256
"""Tokens from which on a batch may end early, for the sake of less padding."""

MIN_SHARED = 16
"""Tokens of a shared context from which on it is computed once: for less, the cache costs more than it saves."""

CACHED_TOKENS = 4
"""Tokens in the cache of a batch with shared contexts, for each token of a forward pass."""


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

    @property
    def num_context(self) -> int:
        """How many ids come before the first one whose output is needed."""
        return self.positions[0] - 1

    @property
    def num_rest(self) -> int:
        """Inputs after these."""
        return len(self.ids) - 1 - self.num_context

    def after(self, num_ids: int) -> _Piece:
        """The piece without its first ids."""
        return _Piece(self.owner, self.ids[num_ids:], [position - num_ids for position in self.positions])


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

    Equal sequences are computed once, so equal inputs have exactly equal scores. So is a context that several
    sequences share, such as a question before its choices: each of them continues from its keys and values.
    Sequences are batched by length and padded on the right: under causal attention no token sees the padding, so no
    mask is needed and almost nothing is wasted. A sequence longer than `window` inputs (default: the model's
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
        for batch, (values, hits, rows) in _scored_batches(model, pieces, tokens_per_batch, window):
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


def _group_by_context(pieces: list[_Piece]) -> tuple[list[list[_Piece]], list[_Piece]]:
    """Pieces whose common context is worth computing once, in groups; and all others."""
    by_context: dict[tuple[int, ...], list[_Piece]] = {}
    for piece in pieces:
        by_context.setdefault(tuple(piece.ids[: piece.num_context]), []).append(piece)
    groups, lone = [], []
    for context, group in by_context.items():
        saved = len(context) * (len(group) - 1)
        is_worth = len(context) >= MIN_SHARED and 4 * saved >= sum(len(piece.ids) for piece in group)
        if is_worth:
            groups.append(group)
        else:
            lone += group
    return groups, lone


def _batches_of_groups(groups: list[list[_Piece]], tokens_per_batch: int, window: int) -> Iterator[list[list[_Piece]]]:
    """Groups with nearly equal lengths, longest first; a group too large for a batch is cut."""

    def fits(batch: list[list[_Piece]]) -> bool:
        context = max(group[0].num_context for group in batch)
        rest = max(piece.num_rest for group in batch for piece in group)
        rows = sum(len(group) for group in batch)
        largest = max(len(batch) * context, rows * rest, rows * (context + rest) // CACHED_TOKENS)
        return context + rest <= window and largest <= tokens_per_batch

    batch: list[list[_Piece]] = []
    for group in sorted(groups, key=lambda group: (group[0].num_context, len(group)), reverse=True):
        rest = max(piece.num_rest for piece in group)
        held = CACHED_TOKENS * tokens_per_batch // (group[0].num_context + rest)
        size = max(1, min(tokens_per_batch // rest, held))
        for start in range(0, len(group), size):
            part = group[start : start + size]
            if batch and not fits([*batch, part]):
                yield batch
                batch = []
            batch.append(part)
    if batch:
        yield batch


_Scores = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Log-probability [N] float64, was it the most probable [N] bool, and row in the batch [N], of scored tokens."""


def _scored_batches(
    model: Any, pieces: list[_Piece], tokens_per_batch: int, window: int
) -> Iterator[tuple[list[_Piece], _Scores]]:
    """Every piece once, in batches, with its scores."""
    groups, lone = _group_by_context(pieces)
    for groups_here in _batches_of_groups(groups, tokens_per_batch, window):
        batch = [piece.after(piece.num_context) for group in groups_here for piece in group]
        yield batch, _score_batch(model, batch, _cache_of_contexts(model, groups_here))
    for batch in _batches_by_length(lone, tokens_per_batch):
        yield batch, _score_batch(model, batch)


def _cache_of_contexts(model: Any, groups: list[list[_Piece]]) -> KVCache:
    """The context of each group, computed once, in one row for each of its pieces."""
    contexts = [group[0].ids[: group[0].num_context] for group in groups]
    inputs = _padded(contexts)
    rows = [row for row, group in enumerate(groups) for _ in group]
    rest = max(piece.num_rest for group in groups for piece in group)
    weight = next(model.parameters())
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    cache = KVCache(model.config, len(rows), inputs.shape[1] + rest, weight.device, dtype)
    cache.select_rows(range(len(groups)))
    model.hidden_states(inputs.to(weight.device), cache=cache)
    cache.rewind([len(context) for context in contexts])
    cache.select_rows(rows)
    return cache


def _padded(rows: Sequence[TokenIds]) -> torch.Tensor:
    """Rows of ids as [B, T] int64, with zeros on the right."""
    padded = torch.zeros(len(rows), max(len(ids) for ids in rows), dtype=torch.int64)
    for row, ids in enumerate(rows):
        padded[row, : len(ids)] = torch.tensor(ids)
    return padded


def _score_batch(model: Any, batch: list[_Piece], cache: KVCache | None = None) -> _Scores:
    """Score the marked tokens of a batch, whose rows follow those in `cache`."""
    device = next(model.parameters()).device
    inputs = _padded([piece.ids[:-1] for piece in batch])
    rows = torch.tensor([row for row, piece in enumerate(batch) for _ in piece.positions])
    columns = torch.tensor([position - 1 for piece in batch for position in piece.positions])
    targets = torch.tensor([piece.ids[position] for piece in batch for position in piece.positions])
    hidden = model.hidden_states(inputs.to(device), cache=cache)  # [B, T, C]
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
