"""A copy of a model for generation only: adapters merged, projections joined, norms folded, weights in the kernels'
layout.

When it computes one token at a time, a CPU spends nearly all its time on reading weights and starting operations. So
the copy reads its weights in a few large pieces instead of many small ones, stored in the order that the bf16 kernel
needs (which otherwise reorders them at every call). Each norm only divides: its scale is multiplied into the weights of
the product after it. The results are those of the model; with int8 weights they are close to those. The copy is never
saved.

Shapes: B batch, T time, C width, H query heads, K key/value heads, D head dim, F feed-forward width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.model.linear import linear
from tinylm.model.lora import LoRALayer
from tinylm.model.model_tinylm import Attention, Block, ForwardContext, RMSNorm, SwiGLU, TinyLMForCausalLM
from tinylm.model.positions import apply_rotary
from tinylm.model.weights import unwrapped
from tinylm.system.runtime import device_has_bf16

ONEDNN_IS_ON = torch._C._get_mkldnn_enabled()
SMALLEST = 1e-30
"""In place of the largest number of a row of zeros."""
INT8_COLUMNS = 32
"""The int8 kernel reads so many weights of a row at a time: rows are padded with zeros to a multiple."""
INT8_TOKENS = 32
"""Most tokens that the int8 kernel multiplies at a time."""


@torch.no_grad()
def inference_copy(model: nn.Module, dtype: torch.dtype | None = None) -> TinyLMForCausalLM:
    """A copy of `model` in `dtype` (None: its own), in eval mode and without gradients, for generation only.

    torch.int8 stores the weights of all products in 8 bits (see `_Int8`) and computes the rest in bfloat16.

    Call it like the model (`hidden_states`, then `lm_head`, with a cache); it gives the same logits, to rounding. Its
    hidden states lack the final norm's scale, which is in its `lm_head`. Adapters are merged. It cannot be trained,
    saved or moved: make a new copy from the model instead.
    """
    source = unwrapped(model)
    assert isinstance(source, TinyLMForCausalLM)
    weights_dtype = dtype or source.dtype
    dtype = _computed_in(weights_dtype)
    # The modules are copied and their weights are not: what is made of a weight below takes its place.
    fast = copy.deepcopy(source, {id(weight): weight for weight in source.parameters()}).eval()
    assert isinstance(fast, TinyLMForCausalLM)
    fast.model.layers = nn.ModuleList(_JoinedBlock(layer, weights_dtype) for layer in fast.model.layers)
    fast.lm_head = _product([fast.lm_head], weights_dtype, fast.model.norm)  # type: ignore[assignment]
    fast.model.norm = _Division(fast.model.norm)  # type: ignore[assignment]
    fast.model.embed_tokens = nn.Embedding.from_pretrained(fast.model.embed_tokens.weight.to(dtype, copy=True))
    for module in fast.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(weight.to(dtype, copy=True), requires_grad=False))
    return fast.to(dtype)


def _computed_in(weights: torch.dtype) -> torch.dtype:
    """The dtype of everything but the weights of products."""
    return torch.bfloat16 if weights == torch.int8 else weights


def _base(linear: nn.Module) -> nn.Linear:
    """The layer, or the one that its adapter is on: it has the bias and the sizes. Weights include the adapter."""
    base = linear.base if isinstance(linear, LoRALayer) else linear
    assert isinstance(base, nn.Linear)
    return base


def norm_scale(norm: RMSNorm) -> Tensor:
    """The part of a norm that `_Division` leaves out: sqrt(width) times its weight, float32."""
    return norm.weight.float() * norm.weight.numel() ** 0.5


class _Division(nn.Module):
    """x / sqrt(|x|^2 + width * eps) over the last axis: an RMSNorm without its `norm_scale`."""

    def __init__(self, norm: RMSNorm):
        super().__init__()
        self.root_eps = torch.tensor((norm.weight.numel() * norm.eps) ** 0.5, device=norm.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)
        return (x / torch.hypot(length, self.root_eps)).to(x.dtype)  # a quotient in float32


def _product(linears: Sequence[nn.Linear], dtype: torch.dtype, norm: RMSNorm | None = None) -> _Packed | _Int8:
    """Linear layers of one input, side by side as one: y = [W1 x, W2 x, ...].

    Args:
        linears: the layers.
        dtype: of the weights.
        norm: the norm before these layers; its scale is multiplied into the weights.
    """
    weight = torch.cat(tuple(linear.weight for linear in linears)).float()
    if norm is not None:
        weight = weight * norm_scale(norm)
    biases = [_base(linear).bias for linear in linears]
    bias = None if biases[0] is None else torch.cat(tuple(biases)).float()
    return _Int8(weight, bias) if dtype == torch.int8 else _Packed(weight, bias, dtype)


class _Packed(nn.Module):
    """y = W x + b in the dtype of the weights.

    On a CPU, one token in bfloat16 is multiplied by torch's own kernel, which reads the weights as fast as the memory
    gives them and adds in float32; so it is fast on a CPU without bfloat16 products, too. `small` took 1.8 ms a token
    on two cores, and 2.8 ms with oneDNN's packed weights. These take less time for several tokens. A CPU with bfloat16
    products therefore holds the weights in both layouts.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.weight: Tensor = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.out_features, self.in_features = self.weight.shape
        self.is_packed = _has_packed_kernel(self.weight)
        self.rows: Tensor | None = None
        if self.weight.device.type == "cpu" and dtype == torch.bfloat16:
            self.rows = self.weight
        self.multiplies_in_float32 = self.rows is not None and not device_has_bf16(self.weight.device)
        if self.is_packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), 1)

    def of_one(self, x: Tensor) -> Tensor:
        """Of one token, [K] to [N]; call it without oneDNN."""
        if self.rows is None:
            return self.forward(x)
        y = torch.mv(self.rows, x)
        return y if self.bias is None else y + self.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.rows is not None and x.numel() == self.in_features:
            return _without_onednn(self.of_one, x.flatten()).view(*x.shape[:-1], -1)
        if self.is_packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        if self.multiplies_in_float32:
            bias = None if self.bias is None else self.bias.float()
            return F.linear(x.float(), self.weight.float(), bias).to(x.dtype)
        return linear(x, self.weight, self.bias)


def _without_onednn(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """A function's result with torch's own kernels in place of oneDNN's."""
    torch._C._set_mkldnn_enabled(False)
    try:
        return function(*args)
    finally:
        torch._C._set_mkldnn_enabled(ONEDNN_IS_ON)


def _has_packed_kernel(weight: Tensor) -> bool:
    """Whether torch has oneDNN's linear layer on packed weights, and it is faster here (bf16 on a CPU)."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not device_has_bf16(weight.device):
        return False
    return hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class _Int8(nn.Module):
    """y = s (Q x) + b: weights W = s Q in int8, symmetric, with one scale s for each row; x and s are bfloat16.

    The kernel turns the weights into float32 as it reads them. For many tokens this would cost more than it saves: then
    the weights are turned into a matrix first, for one large product.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        # Rounded before the weights are divided by it: so its rounding makes no error.
        self.scale = (weight.abs().amax(1).clamp(min=SMALLEST) / 127).bfloat16()  # [N]
        quantised = (weight / self.scale[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.in_features = weight.shape[1]
        self.padding = -self.in_features % INT8_COLUMNS
        self.quantised = F.pad(quantised, (0, self.padding)).contiguous()  # [N, K + padding]
        self.bias = None if bias is None else bias.bfloat16()

    def of_one(self, x: Tensor) -> Tensor:
        """Of one token, [K] to [N]."""
        if self.padding:
            x = F.pad(x, (0, self.padding))
        y = torch._weight_int8pack_mm(x[None], self.quantised, self.scale)[0]
        return y if self.bias is None else y + self.bias

    @property
    def weight(self) -> Tensor:
        """s Q, float32: what the products approximate."""
        return self.quantised[:, : self.in_features] * self.scale.float()[:, None]

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > INT8_TOKENS * self.in_features:
            dtype = torch.bfloat16 if device_has_bf16(x.device) else torch.float32
            y = F.linear(x.to(dtype), self.quantised[:, : self.in_features].to(dtype)).to(x.dtype) * self.scale
        else:
            columns = x.reshape(-1, self.in_features)
            if self.padding:
                columns = F.pad(columns, (0, self.padding))
            y = torch._weight_int8pack_mm(columns.contiguous(), self.quantised, self.scale).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class _JoinedBlock(Block):
    """A block of joined products, with a way of its own for one token of one text."""

    def __init__(self, base: nn.Module, dtype: torch.dtype):
        assert isinstance(base, Block)
        nn.Module.__init__(self)
        self.dropout = 0.0
        self.self_attn = _JoinedAttention(base.self_attn, base.input_layernorm, dtype)
        self.mlp = _JoinedSwiGLU(base.mlp, base.post_attention_layernorm, dtype)
        self.input_layernorm = _Division(base.input_layernorm)  # type: ignore[assignment]
        self.post_attention_layernorm = _Division(base.post_attention_layernorm)  # type: ignore[assignment]

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        if x.shape[:2] == (1, 1) and context.cache is not None:
            return _without_onednn(self._of_one, x.flatten(), context).view(x.shape)
        return super().forward(x, context)

    def _of_one(self, x: Tensor, context: ForwardContext) -> Tensor:
        """The same, [C] to [C], on vectors: beside the products, a step is the time that its operations take to start.

        With it `small` made 1.19 times as many tokens a second in bfloat16, and 1.11 times in int8.
        """
        attention: Any = self.self_attn
        mlp: Any = self.mlp
        queries, keys, values = attention.heads
        width = attention.head_dim
        joined = attention.qkv_proj.of_one(self.input_layernorm.forward(x)).view(1, 1, -1, width)
        qk, v = attention.rotated(joined, context.rotation)
        k, v = qk[:, :, queries:].view(1, keys, 1, width), v.view(1, values, 1, width)
        assert context.cache is not None
        k, v = context.cache.update(attention.layer_idx, k, v, context.places)  # [1, K, S, D]
        q = qk[:, :, :queries].view(1, keys, -1, width)  # a group's heads in the place of queries, as in `attention`
        heads = F.scaled_dot_product_attention(q, k, v)
        x = x + attention.o_proj.of_one(heads.view(-1))
        gate, up = mlp.gate_up_proj.of_one(self.post_attention_layernorm.forward(x)).chunk(2)
        return x + mlp.down_proj.of_one(F.silu(gate) * up)


class _JoinedAttention(Attention):
    """Attention with one product for queries, keys and values, and one rotation for queries and keys."""

    def __init__(self, base: Attention, norm: RMSNorm, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.layer_idx, self.head_dim, self.dropout = base.layer_idx, base.head_dim, 0.0
        self.qk_norm = base.qk_norm
        linears = [base.q_proj, base.k_proj, base.v_proj]
        queries, keys, _ = self.heads = [_base(linear).out_features // self.head_dim for linear in linears]
        if base.qk_norm:
            scales = [norm_scale(base.q_norm).expand(queries, -1), norm_scale(base.k_norm).expand(keys, -1)]
            self.qk_scale = torch.cat(scales).to(_computed_in(dtype))  # [H+K, D]
            self.qk_division = _Division(base.q_norm)
        self.qkv_proj = _product(linears, dtype, norm)
        self.o_proj = _product([base.o_proj], dtype)  # type: ignore[assignment]

    def project(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys, _ = self.heads
        qk, v = self.rotated(self.qkv_proj(x).view(*x.shape[:2], -1, self.head_dim), rotation)
        q, k = qk.split([queries, keys], dim=2)
        return q, k, v

    def rotated(self, joined: Tensor, rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Queries and keys, ready to attend, [B, T, H+K, D], and values, of what the product gives [B, T, H+2K, D]."""
        queries, keys, _ = self.heads
        qk, v = joined[:, :, : queries + keys], joined[:, :, queries + keys :]
        if self.qk_norm:
            qk = self.qk_division(qk) * self.qk_scale
        if rotation is not None:
            qk = apply_rotary(qk, *rotation)
        return qk, v


class _JoinedSwiGLU(SwiGLU):
    """SwiGLU with one product for gate and up."""

    def __init__(self, base: SwiGLU, norm: RMSNorm, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.gate_up_proj = _product([base.gate_proj, base.up_proj], dtype, norm)
        self.down_proj = _product([base.down_proj], dtype)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)  # [B, T, F] each
        return self.down_proj(F.silu(gate) * up)
