"""A copy of a model for generation only: adapters merged, projections joined, weights in the kernels' layout.

At one token a step a CPU does little but read weights. Reading them in two large pieces instead of five small
ones, already in the order that the bf16 kernel wants (it otherwise reorders them at every call), is most of
the speed to be had. The numbers are those of the model; the file format never sees this form.

Shapes: B batch, T time, C width, H query heads, K key/value heads, D head dim, F feed-forward width.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.model.model_lora import merge_lora
from tinylm.model.model_tinylm import Attention, Block, SwiGLU, TinyLMForCausalLM
from tinylm.model.weights_file import unwrapped
from tinylm.runtime import device_has_bf16


def inference_copy(model: nn.Module, dtype: torch.dtype | None = None) -> TinyLMForCausalLM:
    """A copy of `model` in `dtype` (None: its own), in eval mode and without gradients, to be only run.

    It is called as the model is (`hidden_states`, `lm_head`, with a cache) and gives the same logits, to
    rounding. Adapters are merged in. It cannot be trained, saved or moved: make another from the model.
    """
    source = unwrapped(model)
    assert isinstance(source, TinyLMForCausalLM)
    fast = merge_lora(copy.deepcopy(source))
    assert isinstance(fast, TinyLMForCausalLM)
    fast = fast.to(dtype or source.dtype).eval().requires_grad_(False)
    for layer in fast.model.layers:
        assert isinstance(layer, Block)
        layer.self_attn = _JoinedAttention(layer.self_attn)
        layer.mlp = _JoinedSwiGLU(layer.mlp)
    fast.lm_head = _Packed([fast.lm_head])  # type: ignore[assignment]
    return fast


class _Packed(nn.Module):
    """Linear layers of one input, side by side as one: y = [W1 x, W2 x, ...]."""

    def __init__(self, linears: list[nn.Linear]):
        super().__init__()
        self.weight: Tensor = torch.cat(tuple(linear.weight for linear in linears))
        biases = [linear.bias for linear in linears]
        self.bias = None if biases[0] is None else torch.cat(tuple(biases))
        self.out_features = self.weight.shape[0]
        self.is_packed = _has_packed_kernel(self.weight)
        if self.is_packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


def _has_packed_kernel(weight: Tensor) -> bool:
    """Whether torch was built with oneDNN's linear on packed weights, and it pays (bf16 on a CPU)."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not device_has_bf16(weight.device):
        return False
    return hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class _JoinedAttention(Attention):
    """Attention with one product for queries, keys and values."""

    def __init__(self, base: Attention):
        nn.Module.__init__(self)
        self.layer_idx, self.head_dim, self.dropout = base.layer_idx, base.head_dim, 0.0
        self.qk_norm = base.qk_norm
        if base.qk_norm:
            self.q_norm, self.k_norm = base.q_norm, base.k_norm
        linears = [base.q_proj, base.k_proj, base.v_proj]
        self.heads = [linear.out_features // self.head_dim for linear in linears]
        self.qkv_proj = _Packed(linears)
        self.o_proj = _Packed([base.o_proj])  # type: ignore[assignment]

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        joined = self.qkv_proj(x).view(*x.shape[:2], -1, self.head_dim)  # [B, T, H+2K, D]
        q, k, v = joined.split(self.heads, dim=2)
        return q, k, v


class _JoinedSwiGLU(SwiGLU):
    """SwiGLU with one product for gate and up."""

    def __init__(self, base: SwiGLU):
        nn.Module.__init__(self)
        self.gate_up_proj = _Packed([base.gate_proj, base.up_proj])
        self.down_proj = _Packed([base.down_proj])  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)  # [B, T, F] each
        return self.down_proj(F.silu(gate) * up)
