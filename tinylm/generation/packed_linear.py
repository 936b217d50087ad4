"""Weights laid out once for the CPU's matrix kernels.

At one token a step a linear layer reads its whole weight to do little arithmetic, so its speed is that of memory. From
a plain bfloat16 matrix oneDNN (the library behind torch on a CPU) reaches about half of it; from its own blocked layout
nearly all: one row through 512 x 6400 took 298 microseconds instead of 745 (1 thread, AVX512-BF16). The numbers are the
same up to the order of summation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """y = x W^T + b with W in oneDNN's blocked layout, for inference only.

    Args:
        linear: the layer to take over; bfloat16, on the CPU.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """True where packing exists and helps: bfloat16 on a CPU whose torch was built with oneDNN."""
    if device.type != "cpu" or dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    return hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def pack_linears(model: nn.Module) -> None:
    """Replace every nn.Linear in `model` by a PackedLinear, in place. The model can no longer train or be saved."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child))
