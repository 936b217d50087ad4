"""Packed documents on CUDA: torch's variable-length kernel is called as the installed torch wants it.

The kernel needs a GPU, so a reference with the same signature replaces it here.
"""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen

from tests.model.small_models import random_ids, small_model
from tinylm.model import model_tinylm
from tinylm.model.attention import AttentionPlan, attention, document_starts, plan_attention

SIGNATURE = inspect.signature(varlen.varlen_attn)


def reference_varlen(*arguments, **options):
    """`varlen_attn` as documented: each document alone, in float64; it takes the arguments of the real one."""
    given = SIGNATURE.bind(*arguments, **options)
    given.apply_defaults()
    query, key, value, starts, key_starts, longest, longest_key = list(given.arguments.values())[:7]
    assert starts.dtype == torch.int32 and torch.equal(starts, key_starts)
    assert longest == longest_key >= int(starts.diff().max())
    left, right = given.arguments["window_size"]
    documents = []
    for begin, end in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        distance = torch.arange(end - begin) - torch.arange(end - begin)[:, None]  # key - query
        visible = ((left < 0) | (distance >= -left)) & ((right < 0) | (distance <= right))
        q, k, v = (x[begin:end].transpose(0, 1).double() for x in (query, key, value))  # [heads, T, D]
        seen = F.scaled_dot_product_attention(q, k, v, visible, enable_gqa=given.arguments.get("enable_gqa", True))
        documents.append(seen.transpose(0, 1))
    return torch.cat(documents).to(query.dtype)


def test_attention_with_dropout_takes_the_mask(monkeypatch):
    """The kernel has no dropout, and what ran in its place once had no mask: every token saw those after it."""
    calls = []
    monkeypatch.setattr(varlen, "varlen_attn", lambda *a, **k: calls.append(1) or reference_varlen(*a, **k))
    monkeypatch.setattr(model_tinylm, "can_use_varlen", lambda *_: True)
    model = small_model(attention_dropout=0.5)
    ids = random_ids(1, 9)
    documents = torch.tensor([[0] * 4 + [1] * 5])
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % model.config.vocab_size
    hidden = []
    for tokens in (ids, changed):
        torch.manual_seed(0)
        hidden.append(model.train().hidden_states(tokens, document_ids=documents)[0, :-1])
    assert not calls and torch.equal(*hidden), "a token saw the one after it"
    model.eval().hidden_states(ids, document_ids=documents)
    assert calls


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_installed_kernel_takes_our_call_and_gives_what_the_mask_gives(monkeypatch, kv_heads):
    """torch 2.10 lacks `window_size` and 2.11 lacks `enable_gqa`: the call failed on both, though both were allowed."""
    monkeypatch.setattr(varlen, "varlen_attn", reference_varlen)
    ids = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [2, 2, 2, 2, 2, 3, 3]])  # row 2 begins with the id that row 1 ends with
    starts = document_starts(ids)
    q, k, v = (torch.randn(2, heads, 7, 8) for heads in (4, kv_heads, kv_heads))
    masked = plan_attention(2, 7, 7, torch.device("cpu"), torch.float32, document_ids=ids)
    ours = attention(q, k, v, AttentionPlan(cu_seqlens=starts, max_seqlen=7))
    torch.testing.assert_close(ours, attention(q, k, v, masked), rtol=1e-5, atol=1e-5)
