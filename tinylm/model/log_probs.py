"""Log-probabilities of target tokens: the one place for training and evaluation.

Shapes: N positions, C width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def target_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[target], [N] float32 nats (float64 for float64 logits).

    Args:
        logits: [N, V] in any precision; the softmax runs in float32 at least.
        targets: [N] int64.
    """
    return -F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")


def head_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`target_log_probs` of the output head [V, C] on hidden states [N, C]: one function, to compile as a whole."""
    return target_log_probs(F.linear(hidden, weight), targets)


def exact_logits(head: nn.Linear, hidden: Tensor) -> Tensor:
    """Logits [N, V] of hidden states [N, C] in float32 (float64 for a float64 model), whatever the model computes in.

    A bfloat16 logit near 16 is rounded to a multiple of 1/8, enough to make ties of close calls.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.to(dtype), head.weight.to(dtype))
