"""Copies for generation that share one base's weights: a model with many adapters costs the memory of one.

Shapes: C_in, C_out sizes of a product; R rank.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.model.inference_copy import norm_scale
from tinylm.model.lora import LoRAEmbedding, LoRALinear
from tinylm.model.model_tinylm import RMSNorm, TinyLMForCausalLM


@torch.no_grad()
def adapted_copy(base: TinyLMForCausalLM, adapted: TinyLMForCausalLM) -> TinyLMForCausalLM:
    """`inference_copy(adapted)`, but with the weights of `base` and beside them only the adapters' own.

    An adapted table of embeddings is the exception: it is added up, and takes the memory of a table.

    Args:
        base: `inference_copy` of the model without adapters.
        adapted: the model with adapters attached.
    """

    def with_adapters(product: nn.Module, linears: list[nn.Module], norm: RMSNorm | None = None) -> nn.Module:
        has_adapter = any(isinstance(linear, LoRALinear) for linear in linears)
        return _AdaptedProduct(product, linears, norm, base.dtype) if has_adapter else product

    fast = _with_own_modules(base)
    pairs: Iterable[tuple[Any, Any]] = zip(fast.model.layers, adapted.model.layers, strict=True)
    for layer, source in pairs:
        attention, mlp = source.self_attn, source.mlp
        heads = [attention.q_proj, attention.k_proj, attention.v_proj]
        layer.self_attn.qkv_proj = with_adapters(layer.self_attn.qkv_proj, heads, source.input_layernorm)
        layer.self_attn.o_proj = with_adapters(layer.self_attn.o_proj, [attention.o_proj])
        gates = [mlp.gate_proj, mlp.up_proj]
        layer.mlp.gate_up_proj = with_adapters(layer.mlp.gate_up_proj, gates, source.post_attention_layernorm)
        layer.mlp.down_proj = with_adapters(layer.mlp.down_proj, [mlp.down_proj])
    fast.lm_head = with_adapters(fast.lm_head, [adapted.lm_head], adapted.model.norm)
    if isinstance(table := adapted.model.embed_tokens, LoRAEmbedding):
        fast.model.embed_tokens = nn.Embedding.from_pretrained(table.weight.to(base.dtype))
    return fast


def _with_own_modules(module: nn.Module):  # type: ignore[no-untyped-def]
    """The module with new submodules, whose weights are the same objects."""
    same = copy.copy(module)
    same._modules = {name: child and _with_own_modules(child) for name, child in module._modules.items()}
    return same


class _AdaptedProduct(nn.Module):
    """y = W x + B A x, for layers of one input: the As are one below the other, the Bs the blocks of a diagonal.

    The scale of the norm before the layers is multiplied into A, as `inference_copy` does with W.
    """

    def __init__(self, product: nn.Module, linears: list[nn.Module], norm: RMSNorm | None, dtype: torch.dtype):
        super().__init__()
        self.product = product
        down: list[Tensor] = []  # each [R, C_in]
        up: list[Tensor] = []  # each [C_out, R]
        for linear in linears:
            if isinstance(linear, LoRALinear):
                down.append(linear.lora_A.weight.float() * linear.scaling)
                up.append(linear.lora_B.weight.float())
            else:
                assert isinstance(linear, nn.Linear)
                down.append(linear.weight.new_zeros(0, linear.in_features))
                up.append(linear.weight.new_zeros(linear.out_features, 0))
        scale = 1.0 if norm is None else norm_scale(norm)
        self.down, self.up = (torch.cat(down) * scale).to(dtype), torch.block_diag(*up).to(dtype)

    def of_one(self, x: Tensor) -> Tensor:
        """Of one token, [C_in] to [C_out]."""
        return self.product.of_one(x) + F.linear(F.linear(x, self.down), self.up)  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x) + F.linear(F.linear(x, self.down), self.up)
