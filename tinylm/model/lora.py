"""Low-rank adapters: fine-tune few extra weights (LoRA, Hu et al. 2021, arXiv:2106.09685).

Shapes: R rank; x [..., C_in], A [R, C_in], B [C_out, R].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.files.untrusted import shown
from tinylm.model.weights import plain_name, unwrapped

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoRAConfig:
    """What to adapt, and how strongly."""

    rank: int = 8
    """Inner width R of the adapters."""
    alpha: float = 16
    """The adapter's output is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout probability on the adapter's input, while training."""
    target_modules: tuple[str, ...] = PROJECTIONS
    """Names of the projections to adapt."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank is {shown(self.rank)}; it must be a whole number of at least 1")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is {shown(self.alpha)}; it must be a number above 0, or the adapter does nothing")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {shown(self.dropout)}; it must be a probability below 1")
        if not self.target_modules:
            raise ValueError(f"target_modules is empty; choose from {', '.join(PROJECTIONS)}")
        for name in self.target_modules:
            if name not in PROJECTIONS:
                raise ValueError(f"target module {shown(name)} is unknown; choose from {', '.join(PROJECTIONS)}")


class LoRALinear(nn.Module):
    """y = base(x) + (alpha / rank) * B(A(dropout(x))).

    A starts Kaiming-uniform and B at zero, so that the adapted model starts as exactly the base model.

    Args:
        base: the linear layer to adapt, [C_in] -> [C_out]; it is frozen and kept as it is.
        rank: R, alpha: the scale's numerator, dropout: probability on the adapter's input in training.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        self.base = base
        self.scaling = alpha / rank
        self.dropout = dropout
        self.enabled = True
        where = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, **where)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, **where)
        # PEFT's and the authors' choice: the bound that nn.Linear itself uses, 1 / sqrt(C_in).
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.enabled:
            return y
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        return y + self.lora_B(self.lora_A(x)) * self.scaling

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """Add (alpha / rank) * B A into the base weight, summed in float32, and return the base layer."""
        update = self.lora_B.weight.float() @ self.lora_A.weight.float() * self.scaling  # [C_out, C_in]
        self.base.weight.copy_(self.base.weight.float() + update)
        return self.base


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every adapter by its plain name, e.g. `model.layers.0.self_attn.q_proj`."""
    modules = unwrapped(model).named_modules()
    return {plain_name(name): module for name, module in modules if isinstance(module, LoRALinear)}


def has_lora(model: nn.Module) -> bool:
    """Whether adapters are attached."""
    return bool(lora_layers(model))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(unwrapped(model).get_submodule(parent), leaf, module)


def apply_lora(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """Attach adapters to every target projection, in place, and freeze everything else; returns the model.

    Raises:
        ValueError: adapters are attached already, or no layer has a target's name.
    """
    if has_lora(model):
        raise ValueError("the model has adapters already; merge_lora or unload_lora them before applying others")
    targets = {}
    for name, module in unwrapped(model).named_modules():
        if name.rpartition(".")[2] in config.target_modules and isinstance(module, nn.Linear):
            targets[name] = module
    if not targets:
        raise ValueError(f"the model has no layer named {' or '.join(config.target_modules)}; nothing to adapt")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, linear in targets.items():
        adapter = LoRALinear(linear, config.rank, config.alpha, config.dropout)
        _replace(model, name, adapter.train(linear.training))
    return model


def lora_parameters(model: nn.Module) -> list[Tensor]:
    """The adapters' weights, the only ones to train."""
    return [p for layer in lora_layers(model).values() for p in (layer.lora_A.weight, layer.lora_B.weight)]


def merge_lora(model: nn.Module) -> nn.Module:
    """Add every adapter into its base weight and remove it, in place; returns the model, trainable again."""
    for name, layer in lora_layers(model).items():
        _replace(model, name, layer.merge())
    return model.requires_grad_(True)


def unload_lora(model: nn.Module) -> nn.Module:
    """Remove every adapter and leave the base weights bit for bit; returns the model, trainable again."""
    for name, layer in lora_layers(model).items():
        _replace(model, name, layer.base)
    return model.requires_grad_(True)


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Switch the adapters off inside: DPO's reference policy then needs no second copy of the weights."""
    layers = list(lora_layers(model).values())
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, was_enabled in zip(layers, before, strict=True):
            layer.enabled = was_enabled


def adaptable_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer by its plain name, looking through adapters that are attached."""
    found = {}
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, nn.Linear) and ".lora_" not in name:
            found[plain_name(name).removesuffix(".base")] = module
    return found


def indistinct_tokens(table: Tensor, token_ids: Tensor, cosine: float = 0.995) -> Tensor:
    """[N] bool: which of `token_ids` [N] have a row in `table` [V, C] that points the same way as another row.

    All tokens that never occur in training are pushed away from every output alike, so their rows become one. A model
    whose table is frozen cannot learn to write such a token rather than another. In our models such rows have a cosine
    of at least 0.999. `<|im_end|>` of SmolLM2-135M-Instruct, which fine-tuning alone has taught, has 0.991.
    """
    rows = F.normalize(table.detach().float(), dim=1)
    found = []
    for ids in token_ids.split(1024):  # 1024 x V numbers at a time
        likeness = rows[ids] @ rows.T
        likeness[torch.arange(len(ids), device=ids.device), ids] = -1.0  # each row is like itself
        found.append(likeness.amax(dim=1) > cosine)
    return torch.cat(found)
