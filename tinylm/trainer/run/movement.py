"""How far training moves the weights: near 0 means that it changed nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor, nn

from tinylm.trainer.core.distributed import full_tensor


def snapshot(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """A copy of the trainable weights."""
    return [p.detach().clone() for p in parameters if p.requires_grad]


def values_fingerprint(weights: Iterable[Tensor]) -> str:
    """16 hex digits of a SHA-256 over the exact values."""
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(full_tensor(weight).cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def relative_change(before: list[Tensor], parameters: Iterable[nn.Parameter]) -> float:
    """|after - before| / |before|, L2 over all trainable weights."""
    after = [p.detach() for p in parameters if p.requires_grad]
    moved = sum(float(full_tensor((a - b).float().pow(2).sum())) for a, b in zip(after, before, strict=True))
    size = sum(float(full_tensor(b.float().pow(2).sum())) for b in before)
    return (moved / size) ** 0.5 if size else float("inf") if moved else 0.0


class Movement:
    """How far the weights of a model have moved since the start of its run, whatever came between.

    A training state does not hold the first weights. It holds their fingerprint, and a recipe makes the same weights
    again from the seed; where another torch or device draws other numbers, the movement counts from the resume and
    says so.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.first_weights = snapshot(model.parameters())
        self.known_fingerprint: str | None = None
        """Of the run's first weights, from the state it was resumed from."""
        self.since = ""
        """Empty, or from which step on the movement counts: ", since step 1,200"."""

    @cached_property
    def own_fingerprint(self) -> str:
        """Of the weights that the recipe made; all processes must ask."""
        return values_fingerprint(self.first_weights)

    @property
    def fingerprint(self) -> str | None:
        """Of the run's first weights, for its training state."""
        return self.known_fingerprint if self.since else self.own_fingerprint

    def resume(self, fingerprint: str | None, step: int) -> None:
        """Continue a run whose first weights had this fingerprint; the model has the weights of `step` already."""
        if fingerprint != self.own_fingerprint:
            self.first_weights = snapshot(self.model.parameters())
            self.known_fingerprint, self.since = fingerprint, f", since step {step:,}"

    def measure(self) -> float:
        """The L2 norm of the change, relative to that of the first weights."""
        return relative_change(self.first_weights, self.model.parameters())
