"""The linear layer, y = W x + b.

Shapes: K inputs, N outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_TOKENS = 32
"""Most tokens for which oneDNN's float32 product is taken."""
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(nn.Linear):
    """nn.Linear with a product for few tokens (see `linear`)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y [..., N] of x [..., K]. Without gradients, few float32 tokens on a CPU are multiplied by oneDNN.

    torch takes MKL, which multiplies one token on one core only (AMD EPYC): on two cores all products of `small` took
    9.4 ms for one token, and take 5.3 here; for 16 tokens 13.4 and 9.7; for 32 tokens 17.8 and 13.0.
    """
    if not torch.is_grad_enabled() and _are_few(x, weight):
        y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        assert isinstance(y, Tensor)
        return y
    return F.linear(x, weight, bias)


def _are_few(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    fits = HAS_ONEDNN and x.device.type == weight.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    return fits and 0 < x.numel() <= FEW_TOKENS * weight.shape[1]
