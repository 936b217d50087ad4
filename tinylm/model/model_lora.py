"""Low-rank adapters: fine-tune few extra weights (LoRA, Hu et al. 2021, arXiv:2106.09685).

Shapes: R rank; x [..., C_in], A [R, C_in], B [C_out, R].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.model.weights_file import (
    check_shapes,
    plain_name,
    read_header,
    read_weights,
    replaceable_folder,
    unwrapped,
    weights_fingerprint,
    write_json,
    write_tensors,
)
from tinylm.untrusted_files import read_json, shown

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PEFT_PREFIX = "base_model.model."
_UNSUPPORTED = (
    "use_dora", "use_rslora", "use_qalora", "use_bdlora", "rank_pattern", "alpha_pattern", "modules_to_save",
    "layers_to_transform", "layers_pattern", "exclude_modules", "fan_in_fan_out", "lora_bias",
    "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "arrow_config",
    "velora_config", "corda_config", "megatron_config", "layer_replication",
)  # fmt: skip


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


def _lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every adapter by its plain name, e.g. `model.layers.0.self_attn.q_proj`."""
    modules = unwrapped(model).named_modules()
    return {plain_name(name): module for name, module in modules if isinstance(module, LoRALinear)}


def has_lora(model: nn.Module) -> bool:
    """Whether adapters are attached."""
    return bool(_lora_layers(model))


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
    return [p for layer in _lora_layers(model).values() for p in (layer.lora_A.weight, layer.lora_B.weight)]


def merge_lora(model: nn.Module) -> nn.Module:
    """Add every adapter into its base weight and remove it, in place; returns the model, trainable again."""
    for name, layer in _lora_layers(model).items():
        _replace(model, name, layer.merge())
    return model.requires_grad_(True)


def unload_lora(model: nn.Module) -> nn.Module:
    """Remove every adapter and leave the base weights bit for bit; returns the model, trainable again."""
    for name, layer in _lora_layers(model).items():
        _replace(model, name, layer.base)
    return model.requires_grad_(True)


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """The base model for a while: the reference policy of DPO costs no second copy of the weights."""
    layers = list(_lora_layers(model).values())
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, was_enabled in zip(layers, before, strict=True):
            layer.enabled = was_enabled


def save_adapter(
    model: nn.Module, folder: str | Path, base_model_path: str | Path, lineage: dict[str, Any] | None = None
) -> None:
    """Write a PEFT folder: adapter_config.json, adapter_model.safetensors, and lineage.json beside them.

    Args:
        base_model_path: where the base model is, absolute or relative to the adapter's own folder.
        lineage: what to record besides the base weights' fingerprint.

    Raises:
        ValueError: the model has no adapters, or they differ in rank; the folder holds other files.
    """
    layers = _lora_layers(model)
    if not layers:
        raise ValueError("the model has no adapters to save; apply_lora first")
    if len({(layer.lora_A.out_features, layer.scaling, layer.dropout) for layer in layers.values()}) != 1:
        raise ValueError("the adapters differ in rank, alpha or dropout; one adapter_config.json states one of each")
    first = next(iter(layers.values()))
    rank = first.lora_A.out_features
    alpha = first.scaling * rank
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_model_path),
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": first.dropout,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{_PEFT_PREFIX}{name}.lora_A.weight"] = layer.lora_A.weight
        tensors[f"{_PEFT_PREFIX}{name}.lora_B.weight"] = layer.lora_B.weight
    record = {**(lineage or {}), "base_fingerprint": weights_fingerprint(model)}
    with replaceable_folder(folder, "adapter_config.json") as fresh:
        write_json(fresh / "adapter_config.json", config)
        write_tensors(fresh / "adapter_model.safetensors", tensors)
        write_json(fresh / "lineage.json", record)


def read_adapter_config(folder: str | Path) -> LoRAConfig:
    """The settings in a PEFT folder.

    Raises:
        FileNotFoundError: no adapter_config.json. ValueError: it asks for something we do not do.
    """
    path = Path(folder) / "adapter_config.json"
    data = read_json(path)
    if data.get("peft_type") != "LORA":
        raise ValueError(f"{path} has peft_type {shown(data.get('peft_type'))}; only LORA adapters can be loaded")
    for name in _UNSUPPORTED:
        if data.get(name):
            raise ValueError(f"{path} sets {name}; only plain LoRA of the same rank everywhere can be loaded")
    if data.get("bias", "none") != "none":
        raise ValueError(f"{path} has bias {shown(data['bias'])}; only adapters without biases can be loaded")
    targets = data.get("target_modules")
    if targets == "all-linear":
        targets = PROJECTIONS
    if not isinstance(targets, list | tuple):
        raise ValueError(f"{path} has target_modules {shown(targets)}; a list of names is expected")
    try:
        rank, alpha = data.get("r", 8), data.get("lora_alpha", 8)
        return LoRAConfig(rank, alpha, data.get("lora_dropout", 0.0), tuple(targets))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}; correct the file or save the adapter again") from None


def load_adapter(model: nn.Module, folder: str | Path, model_path: str | Path | None = None) -> nn.Module:
    """Attach the adapter in a PEFT folder, in place of any that is attached; returns the model.

    Every tensor must be there, under its exact name and shape, and no other: an adapter that is loaded in
    part is silently useless. Where the folder records its base weights' fingerprint, the model must match it.

    Args:
        model_path: where the model is from, for the message when it is not the adapter's base.

    Raises:
        FileNotFoundError, ValueError: as said; the model is then as it was.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    _check_base(model, folder, model_path)
    path = folder / "adapter_model.safetensors"
    expected: dict[str, tuple[int, ...]] = {}
    for name, module in _adaptable(model).items():
        if name.rpartition(".")[2] in config.target_modules:
            expected[f"{_PEFT_PREFIX}{name}.lora_A.weight"] = (config.rank, module.in_features)
            expected[f"{_PEFT_PREFIX}{name}.lora_B.weight"] = (module.out_features, config.rank)
    check_shapes(path, read_header(path), expected)
    tensors = read_weights(path)

    apply_lora(unload_lora(model), config)
    with torch.no_grad():
        for name, layer in _lora_layers(model).items():
            layer.lora_A.weight.copy_(tensors[f"{_PEFT_PREFIX}{name}.lora_A.weight"])
            layer.lora_B.weight.copy_(tensors[f"{_PEFT_PREFIX}{name}.lora_B.weight"])
    return model


def _adaptable(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer by its plain name, looking through adapters that are attached."""
    found = {}
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, nn.Linear) and ".lora_" not in name:
            found[plain_name(name).removesuffix(".base")] = module
    return found


def _check_base(model: nn.Module, folder: Path, model_path: str | Path | None) -> None:
    path = folder / "lineage.json"
    lineage = read_json(path) if path.is_file() else {}
    recorded, parent = lineage.get("base_fingerprint"), lineage.get("parent")
    if recorded and recorded != (actual := weights_fingerprint(model)):
        stated = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        # Of a base that was a `.pth`, the parent is a name and no record.
        base = (parent.get("path") if isinstance(parent, dict) else parent) or stated
        raise ValueError(
            f"{folder} was trained on {_plain(base)} (weights {_plain(recorded)}); {model_path or 'this model'} has "
            f"weights {actual}: "
            "load it onto its own base model (and convert to half precision only afterwards)"
        )


def _plain(text: object) -> str:
    """What a file says, as it stands if it is fit for a terminal."""
    return text if isinstance(text, str) and text.isprintable() and len(text) < 1000 else shown(text)
