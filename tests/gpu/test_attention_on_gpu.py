"""Attention on CUDA against the equation, evaluated in float64: outputs and gradients, packed or not."""

from __future__ import annotations

import pytest
import torch

from tinylm.model.attention import AttentionPlan, attention, blocked_attention, document_starts, plan_attention

TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3, torch.float32: 1e-5}


def inputs(kv_heads: int, time: int, dtype: torch.dtype, heads: int = 8, dim: int = 64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(kv_heads * 1000 + time)
    shapes = [(3, heads, time, dim), (3, kv_heads, time, dim), (3, kv_heads, time, dim), (3, heads, time, dim)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def with_gradients(run, tensors: list[torch.Tensor], upstream: torch.Tensor) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def assert_close(ours: list[torch.Tensor], exact: list[torch.Tensor], dtype: torch.dtype) -> None:
    for name, x, reference in zip(("out", "dq", "dk", "dv"), ours, exact, strict=True):
        assert x.dtype == dtype
        error = (x.cpu().double() - reference).norm() / reference.norm()
        assert error < TOLERANCE[dtype], (name, float(error))


def documents(time: int) -> torch.Tensor:
    """Rows of many documents, of one, and of two of which the second is filler."""
    ids = torch.empty(3, time, dtype=torch.int64)
    ids[0] = torch.arange(time) // 7
    ids[1] = 1000
    ids[2] = torch.where(torch.arange(time) < time - 5, 2000, -1)
    return ids


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("time", [64, 333])
def test_packed_documents(kv_heads, time, dtype):
    *qkv, upstream = inputs(kv_heads, time, dtype)
    ids = documents(time)
    mask = plan_attention(3, time, time, torch.device("cpu"), torch.float64, document_ids=ids).mask
    exact = with_gradients(
        lambda q, k, v: blocked_attention(q, k, v, mask), [x.double() for x in qkv], upstream.double()
    )
    plan = AttentionPlan(cu_seqlens=document_starts(ids).cuda(), max_seqlen=time)
    ours = with_gradients(lambda q, k, v: attention(q, k, v, plan), [x.cuda() for x in qkv], upstream.cuda())
    assert_close(ours, exact, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_plain_causal_and_masked(kv_heads, dtype):
    time = 200
    *qkv, upstream = inputs(kv_heads, time, dtype)
    for ids in (None, documents(time)):
        mask = plan_attention(3, time, time, torch.device("cpu"), torch.float64, document_ids=ids).mask
        exact = with_gradients(
            lambda q, k, v, mask=mask: blocked_attention(q, k, v, mask), [x.double() for x in qkv], upstream.double()
        )
        on_gpu = None if ids is None else ids.cuda()
        plan = plan_attention(3, time, time, torch.device("cuda"), dtype, document_ids=on_gpu)
        assert plan.causal == (ids is None)
        ours = with_gradients(
            lambda q, k, v, plan=plan: attention(q, k, v, plan), [x.cuda() for x in qkv], upstream.cuda()
        )
        assert_close(ours, exact, dtype)


def test_one_query_against_a_cache():
    q, k, v, _ = inputs(2, 150, torch.bfloat16)
    q = q[:, :, :1]
    exact = blocked_attention(q.double(), k.double(), v.double(), None)
    ours = attention(q.cuda(), k.cuda(), v.cuda(), plan_attention(3, 1, 150, torch.device("cuda"), torch.bfloat16))
    assert (ours.cpu().double() - exact).norm() / exact.norm() < TOLERANCE[torch.bfloat16]
