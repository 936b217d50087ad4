"""A copy of a model for generation only: adapters merged, projections joined, norms folded, weights in the kernels'
layout.

When it computes one token at a time, a CPU spends nearly all its time on reading weights and starting operations. So
the copy reads its weights in a few large pieces instead of many small ones, stored in the order that the bf16 kernel
needs (which otherwise reorders them at every call). Each norm only divides: its scale is multiplied into the weights of
the product after it. The results are those of the model. The copy is never saved.

Shapes: B batch, T time, C width, H query heads, K key/value heads, D head dim, F feed-forward width.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.model.lora import LoRALayer
from tinylm.model.model_tinylm import Attention, Block, RMSNorm, SwiGLU, TinyLMForCausalLM
from tinylm.model.positions import apply_rotary
from tinylm.model.weights import unwrapped
from tinylm.system.runtime import device_has_bf16


@torch.no_grad()
def inference_copy(model: nn.Module, dtype: torch.dtype | None = None) -> TinyLMForCausalLM:
    """A copy of `model` in `dtype` (None: its own), in eval mode and without gradients, for generation only.

    Call it like the model (`hidden_states`, then `lm_head`, with a cache); it gives the same logits, to rounding. Its
    hidden states lack the final norm's scale, which is in its `lm_head`. Adapters are merged. It cannot be trained,
    saved or moved: make a new copy from the model instead.
    """
    source = unwrapped(model)
    assert isinstance(source, TinyLMForCausalLM)
    dtype = dtype or source.dtype
    # The modules are copied and their weights are not: what is made of a weight below takes its place.
    fast = copy.deepcopy(source, {id(weight): weight for weight in source.parameters()}).eval()
    assert isinstance(fast, TinyLMForCausalLM)
    for layer in fast.model.layers:
        assert isinstance(layer, Block)
        layer.self_attn = _JoinedAttention(layer.self_attn, layer.input_layernorm, dtype)
        layer.mlp = _JoinedSwiGLU(layer.mlp, layer.post_attention_layernorm, dtype)
        layer.input_layernorm = _Division(layer.input_layernorm)  # type: ignore[assignment]
        layer.post_attention_layernorm = _Division(layer.post_attention_layernorm)  # type: ignore[assignment]
    fast.lm_head = _Packed([fast.lm_head], dtype, fast.model.norm)  # type: ignore[assignment]
    fast.model.norm = _Division(fast.model.norm)  # type: ignore[assignment]
    fast.model.embed_tokens = nn.Embedding.from_pretrained(fast.model.embed_tokens.weight.to(dtype, copy=True))
    for module in fast.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(weight.to(dtype, copy=True), requires_grad=False))
    return fast.to(dtype)


def _base(linear: nn.Module) -> nn.Linear:
    """The layer, or the one that its adapter is on: it has the bias and the sizes. Weights include the adapter."""
    base = linear.base if isinstance(linear, LoRALayer) else linear
    assert isinstance(base, nn.Linear)
    return base


def _scale(norm: RMSNorm) -> Tensor:
    """The part of a norm that `_Division` leaves out: sqrt(width) times its weight, float32."""
    return norm.weight.float() * norm.weight.numel() ** 0.5


class _Division(nn.Module):
    """x / sqrt(|x|^2 + width * eps) over the last axis: an RMSNorm without its `_scale`."""

    def __init__(self, norm: RMSNorm):
        super().__init__()
        self.root_eps = torch.tensor((norm.weight.numel() * norm.eps) ** 0.5, device=norm.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        exact = x.float()
        length = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
        return (exact / torch.hypot(length, self.root_eps)).to(x.dtype)


class _Packed(nn.Module):
    """Linear layers of one input, side by side as one: y = [W1 x, W2 x, ...].

    Args:
        linears: the layers.
        dtype: of the product.
        norm: the norm before these layers; its scale is multiplied into the weights.
    """

    def __init__(self, linears: list[nn.Linear], dtype: torch.dtype, norm: RMSNorm | None = None):
        super().__init__()
        weight = torch.cat(tuple(linear.weight for linear in linears)).float()
        if norm is not None:
            weight = weight * _scale(norm)
        self.weight: Tensor = weight.to(dtype)
        biases = [_base(linear).bias for linear in linears]
        self.bias = None if biases[0] is None else torch.cat(tuple(biases)).to(dtype)
        self.out_features = self.weight.shape[0]
        self.is_packed = _has_packed_kernel(self.weight)
        if self.is_packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


def _has_packed_kernel(weight: Tensor) -> bool:
    """Whether torch has oneDNN's linear layer on packed weights, and it is faster here (bf16 on a CPU)."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not device_has_bf16(weight.device):
        return False
    return hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class _JoinedAttention(Attention):
    """Attention with one product for queries, keys and values, and one rotation for queries and keys."""

    def __init__(self, base: Attention, norm: RMSNorm, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.layer_idx, self.head_dim, self.dropout = base.layer_idx, base.head_dim, 0.0
        self.qk_norm = base.qk_norm
        linears = [base.q_proj, base.k_proj, base.v_proj]
        queries, keys, _ = self.heads = [_base(linear).out_features // self.head_dim for linear in linears]
        if base.qk_norm:
            scales = [_scale(base.q_norm).expand(queries, -1), _scale(base.k_norm).expand(keys, -1)]
            self.qk_scale = torch.cat(scales).to(dtype)  # [H+K, D]
            self.qk_division = _Division(base.q_norm)
        self.qkv_proj = _Packed(linears, dtype, norm)
        self.o_proj = _Packed([base.o_proj], dtype)  # type: ignore[assignment]

    def project(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        joined = self.qkv_proj(x).view(*x.shape[:2], -1, self.head_dim)  # [B, T, H+2K, D]
        queries, keys, values = self.heads
        qk, v = joined.split([queries + keys, values], dim=2)
        if self.qk_norm:
            qk = self.qk_division(qk) * self.qk_scale
        if rotation is not None:
            qk = apply_rotary(qk, *rotation)
        q, k = qk.split([queries, keys], dim=2)
        return q, k, v


class _JoinedSwiGLU(SwiGLU):
    """SwiGLU with one product for gate and up."""

    def __init__(self, base: SwiGLU, norm: RMSNorm, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.gate_up_proj = _Packed([base.gate_proj, base.up_proj], dtype, norm)
        self.down_proj = _Packed([base.down_proj], dtype)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)  # [B, T, F] each
        return self.down_proj(F.silu(gate) * up)
