"""Scaled dot-product attention, softmax(q k^T / sqrt(D) + mask) v, in the form each machine runs fastest.

Shapes: B batch, T queries, S keys (S >= T: the queries are the last T of S), H query heads,
K key/value heads, G = H/K query heads per key/value head, D head dim, N documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylm.system.runtime import device_has_bf16

QUERY_BLOCK = 128
"""Rows per block of `blocked_attention`. 128 was faster than 256 at T = 512, slower at T = 256, on AVX512-BF16."""
GROUPED: dict[str, Any] = {"enable_gqa": True} if torch.__version__ >= "2.12" else {}
"""Told to `varlen_attn`: key/value heads are shared. torch 2.11 needs no telling."""
MAX_SCORES = 2**28
"""With more scores B*H*T*S than this (half a gigabyte in bf16), use the flash kernel, which stores no scores."""


@dataclass(frozen=True)
class AttentionPlan:
    """What all layers share in one forward pass: who may look at whom. Built once, by `plan_attention`.

    mask: added to the scores, [T, S] or [B, 1, T, S], 0 where a query may look and a large negative number
        where not; None if every query sees every key.
    causal: the mask is exactly the causal triangle (so a kernel that knows it needs no mask).
    cu_seqlens, max_seqlen: the documents' starts in the flattened [B*T] rows, [N+1] int32, and a bound on their
        lengths; set only where the variable-length kernel will be used.
    """

    mask: Tensor | None = None
    causal: bool = False
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0


def plan_attention(
    batch_size: int,
    num_queries: int,
    num_keys: int,
    device: torch.device,
    dtype: torch.dtype,
    document_ids: Tensor | None = None,
    query_positions: Tensor | None = None,
) -> AttentionPlan:
    """Decide who may look at whom, once per forward pass for all layers.

    Args:
        num_queries, num_keys: T and S; without `query_positions` the queries are the last T of the S positions.
        dtype: the dtype of the scores (the compute dtype, bf16 under autocast).
        document_ids: [B, T] or None; attention only between equal ids (needs T == S).
        query_positions: [B, T] places of the queries among the keys, for rows of unequal length, or None. A query
            sees the keys up to its own place.
    """
    if document_ids is None and query_positions is None:
        if num_queries == 1:
            return AttentionPlan()
        if device.type == "cuda" and num_queries == num_keys:
            return AttentionPlan(causal=True)
    keys = torch.arange(num_keys, device=device)
    if query_positions is None:
        visible = keys <= keys[num_keys - num_queries :, None]  # [T, S]
    else:
        visible = keys <= query_positions[:, None, :, None]  # [B, 1, T, S]
    if document_ids is not None:
        visible = visible & (document_ids[:, None, :, None] == document_ids[:, None, None, :])  # [B, 1, T, S]
    mask = torch.zeros(visible.shape, device=device, dtype=dtype)
    mask.masked_fill_(~visible, torch.finfo(dtype).min)
    plain = document_ids is None and query_positions is None and num_queries == num_keys
    return AttentionPlan(mask=mask, causal=plain)


def document_starts(document_ids: Tensor) -> Tensor:
    """[N+1] int32: where each run of equal ids in [B, T] starts in the flattened rows, and their end.

    A row always starts a new document, whatever the id at the end of the row before. Empty documents at the end fill
    N up to a power of two, so that a compiled model sees few shapes.
    """
    is_start = torch.ones_like(document_ids, dtype=torch.bool)
    is_start[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = is_start.flatten().nonzero().flatten()
    size = 2 ** (len(starts) - 1).bit_length() + 1
    return F.pad(starts, (0, size - len(starts)), value=document_ids.numel()).to(torch.int32)


def can_use_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """True where torch's variable-length flash kernel runs: half precision on CUDA from sm80 on, heads of 8 to 256."""
    fits = dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256
    return device.type == "cuda" and fits and device_has_bf16(device)


def attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, dropout: float = 0.0) -> Tensor:
    """q [B, H, T, D] against k, v [B, K, S, D] under `plan`; returns [B, H, T, D] in q's dtype.

    dropout: probability of dropping an attention weight (0 outside training).
    """
    batch, heads, num_queries, _ = q.shape
    if plan.cu_seqlens is not None:
        assert dropout == 0.0, "the variable-length kernel has no dropout"
        return _varlen_attention(q, k, v, plan)
    if num_queries == 1:
        # A single query sees every key of its row, so the heads of a group can take the place of queries: no key or
        # value is copied for the group. This kernel is not rebuilt for each S, as oneDNN's products are (214
        # microseconds a layer instead of 17).
        grouped = q.reshape(batch, k.shape[1], -1, q.shape[-1])  # [B, K, G, D]
        return F.scaled_dot_product_attention(grouped, k, v, plan.mask, dropout).reshape(q.shape)
    small = batch * heads * num_queries * k.shape[2] <= MAX_SCORES
    if q.device.type == "cpu" and small:
        return blocked_attention(q, k, v, plan.mask, dropout)
    mask = None if plan.causal else plan.mask
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=plan.causal, enable_gqa=True)


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """The equation itself, as batched matrix products over blocks of queries: the fast way on a CPU.

    A block of queries multiplies only the keys up to its own end, so nearly half of the causal square is
    never computed. The G query heads that share a key/value head lie along the query axis, so keys and
    values are never copied. At B=8, T=512, H=8, K=2, D=64 in bf16, forward and backward took 78 ms where
    `F.scaled_dot_product_attention` took 189 (1 thread, AVX512-BF16).
    """
    batch, heads, num_queries, dim = q.shape
    kv_heads, num_keys = k.shape[1], k.shape[2]
    group = heads // kv_heads
    past = num_keys - num_queries
    # The scale belongs to q: D * T numbers to multiply instead of T * S.
    q = (q * dim**-0.5).view(batch, kv_heads, group, num_queries, dim)
    k = k.flatten(0, 1).transpose(1, 2)  # [B*K, D, S]
    v = v.flatten(0, 1)  # [B*K, S, D]
    outputs = []
    for start in range(0, num_queries, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, num_queries)
        rows, seen = end - start, past + end
        q_block = q[:, :, :, start:end].reshape(batch * kv_heads, group * rows, dim)
        scores = torch.bmm(q_block, k[:, :, :seen]).view(batch, heads, rows, seen)
        if mask is not None:
            scores = scores + mask[..., start:end, :seen]
        weights = torch.softmax(scores, dim=-1)
        if dropout:
            weights = F.dropout(weights, dropout)
        weights = weights.view(batch * kv_heads, group * rows, seen)
        outputs.append(torch.bmm(weights, v[:, :seen]).view(batch, heads, rows, dim))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _varlen_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """Packed documents on CUDA: each attends causally within itself, with no mask and no wasted pairs."""
    from torch.nn.attention.varlen import varlen_attn  # takes seconds to import; only CUDA needs it

    batch, _, time, _ = q.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B*T, heads, D]
    starts, longest = plan.cu_seqlens, plan.max_seqlen
    assert starts is not None
    # A window of (-1, 0) looks back without limit and never ahead: causal attention.
    out = varlen_attn(q, k, v, starts, starts, longest, longest, window_size=(-1, 0), **GROUPED)
    assert isinstance(out, Tensor)
    return out.view(batch, time, *out.shape[1:]).transpose(1, 2)
