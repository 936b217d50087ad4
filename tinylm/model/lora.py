"""Low-rank adapters: fine-tune few extra weights (LoRA, Hu et al. 2021, arXiv:2106.09685).

Shapes: R rank; x [..., C_in], A [R, C_in], B [C_out, R]; V vocabulary, C width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.files.untrusted import shown
from tinylm.model.parameter_roles import Role
from tinylm.model.weights import is_tied, plain_name, unwrapped

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TABLES = ("embed_tokens", "lm_head")
"""The tables of a row for each token; adapted only when asked for."""
TABLE_NAMES = ("model.embed_tokens", "lm_head")


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
    """Names of the layers to adapt: of `PROJECTIONS` and `TABLES`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank is {shown(self.rank)}; it must be a whole number of at least 1")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is {shown(self.alpha)}; it must be a number above 0, or the adapter does nothing")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {shown(self.dropout)}; it must be a probability below 1")
        choices = ", ".join((*PROJECTIONS, *TABLES))
        if not self.target_modules:
            raise ValueError(f"target_modules is empty; choose from {choices}")
        for name in self.target_modules:
            if name not in (*PROJECTIONS, *TABLES):
                raise ValueError(f"target module {shown(name)} is unknown; choose from {choices}")


class LoRALayer(nn.Module):
    """An adapted layer: `base`, frozen and kept as it is, and two small matrices whose product is added to its weight.

    `adapter` gives these by PEFT's names; the scale is alpha / rank.
    """

    base: nn.Linear | nn.Embedding

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.base = base  # type: ignore[assignment]
        self.rank = rank
        self.scaling = alpha / rank
        self.dropout = dropout
        self.enabled = True

    def adapter(self) -> dict[str, Tensor]:
        """The trainable weights, by their names in a PEFT file."""
        raise NotImplementedError

    def update(self) -> Tensor:
        """What is added to the base weight, of its shape, in float32 (float64 for a float64 model)."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The weight that this layer computes with, added up at each call, in the precision of `update`."""
        return self.base.weight + self.update() if self.enabled else self.base.weight

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Add the adapter into the base weight, rounded once, and return the base layer."""
        self.base.weight.copy_(self.base.weight + self.update())
        return self.base


class LoRALinear(LoRALayer):
    """y = base(x) + (alpha / rank) * B(A(dropout(x))).

    A starts Kaiming-uniform and B at zero, so that the adapted model starts as exactly the base model.

    Args:
        base: the linear layer to adapt, [C_in] -> [C_out].
        rank: R, alpha: the scale's numerator, dropout: probability on the adapter's input in training.
    """

    base: nn.Linear

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__(base, rank, alpha, dropout)
        where = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, **where)
        # Of the base's class, which states its role: B of the output head has a row for each token too.
        self.lora_B = type(base)(rank, base.out_features, bias=False, **where)
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

    def adapter(self) -> dict[str, Tensor]:
        return {"lora_A.weight": self.lora_A.weight, "lora_B.weight": self.lora_B.weight}

    def update(self) -> Tensor:  # [C_out, C_in]
        return _exact(self.lora_B.weight) @ _exact(self.lora_A.weight) * self.scaling


class LoRAEmbedding(LoRALayer):
    """y = base(token) + (alpha / rank) * B A[:, token], with A [R, V] and B [C, R]; there is no input to drop.

    A starts at zero. B starts normal with the root mean square of the table (in PEFT with 1, whatever the table), so
    that the first steps change a table of small numbers by no larger share than one of large numbers.
    """

    base: nn.Embedding
    parameter_roles: ClassVar[dict[str, Role]] = {"lora_embedding_A": "table", "lora_embedding_B": "matrix"}

    def __init__(self, base: nn.Embedding, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__(base, rank, alpha, dropout)
        self.lora_embedding_A = nn.Parameter(base.weight.new_zeros(rank, base.num_embeddings))
        size = base.weight.detach().square().mean().sqrt()
        self.lora_embedding_B = nn.Parameter(base.weight.new_empty(base.embedding_dim, rank).normal_() * size)

    def forward(self, token_ids: Tensor) -> Tensor:
        y = self.base(token_ids)
        if not self.enabled:
            return y
        return y + F.linear(F.embedding(token_ids, self.lora_embedding_A.T), self.lora_embedding_B) * self.scaling

    def adapter(self) -> dict[str, Tensor]:
        return {"lora_embedding_A": self.lora_embedding_A, "lora_embedding_B": self.lora_embedding_B}

    def update(self) -> Tensor:  # [V, C]
        return _exact(self.lora_embedding_A.T) @ _exact(self.lora_embedding_B.T) * self.scaling


def _exact(x: Tensor) -> Tensor:
    """In float32, or float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Every adapter by its plain name, e.g. `model.layers.0.self_attn.q_proj`."""
    modules = unwrapped(model).named_modules()
    return {plain_name(name): module for name, module in modules if isinstance(module, LoRALayer)}


def has_lora(model: nn.Module) -> bool:
    """Whether adapters are attached."""
    return bool(lora_layers(model))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(unwrapped(model).get_submodule(parent), leaf, module)


def apply_lora(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """Attach adapters to every target layer, in place, and freeze everything else; returns the model.

    Raises:
        ValueError: adapters are attached already, or no layer has a target's name.
    """
    if has_lora(model):
        raise ValueError("the model has adapters already; merge_lora or unload_lora them before applying others")
    targets = {}
    for name, module in unwrapped(model).named_modules():
        if name.rpartition(".")[2] in config.target_modules and isinstance(module, nn.Linear | nn.Embedding):
            targets[name] = module
    if not targets:
        raise ValueError(f"the model has no layer named {' or '.join(config.target_modules)}; nothing to adapt")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, base in targets.items():
        kind = LoRALinear if isinstance(base, nn.Linear) else LoRAEmbedding
        adapter = kind(base, config.rank, config.alpha, config.dropout)  # type: ignore[arg-type]
        _replace(model, name, adapter.train(base.training))
    return model


def lora_parameters(model: nn.Module) -> list[Tensor]:
    """The adapters' weights, the only ones to train."""
    return [weight for layer in lora_layers(model).values() for weight in layer.adapter().values()]


def merge_lora(model: nn.Module) -> nn.Module:
    """Add every adapter into its base weight and remove it, in place; returns the model, trainable again.

    Tied embeddings are one table for two layers. An adapter of one, added to this table, would change the other layer
    too (PEFT warns and does it). So each layer gets a table of its own, unless both adapters add the same.
    """
    layers, bases = lora_layers(model), adaptable_layers(model)
    is_shared = is_tied(model) and not layers.keys().isdisjoint(TABLE_NAMES)
    if is_shared:
        bases["lm_head"].weight = nn.Parameter(bases["lm_head"].weight.detach().clone())
    for name, layer in layers.items():
        _replace(model, name, layer.merge())
    if is_shared and torch.equal(*(bases[name].weight for name in TABLE_NAMES)):
        bases["lm_head"].weight = bases["model.embed_tokens"].weight
    elif is_shared:
        _set_untied(unwrapped(model))
    return model.requires_grad_(True)


def _set_untied(model: Any) -> None:
    model.config = model.model.config = replace(model.config, tie_word_embeddings=False)


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


def adaptable_layers(model: nn.Module) -> dict[str, nn.Linear | nn.Embedding]:
    """Every linear layer and embedding by its plain name, looking through adapters that are attached."""
    found = {}
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and ".lora_" not in name:
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
