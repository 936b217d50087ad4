"""Adapters on disk, as PEFT folders: `adapter_config.json` and `adapter_model.safetensors`, with PEFT's names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinylm.checkpoint.weights_file import (
    check_shapes,
    read_header,
    read_weights,
    replaceable_folder,
    write_tensors,
)
from tinylm.files.atomic import write_json
from tinylm.files.untrusted import read_json, shown
from tinylm.model.lora import (
    PROJECTIONS,
    TABLE_NAMES,
    TABLES,
    LoRAConfig,
    adaptable_layers,
    apply_lora,
    lora_layers,
    unload_lora,
)
from tinylm.model.weights import is_tied, weights_fingerprint

_PEFT_PREFIX = "base_model.model."
_UNSUPPORTED = (
    "use_dora", "use_rslora", "use_qalora", "use_bdlora", "rank_pattern", "alpha_pattern", "modules_to_save",
    "layers_to_transform", "layers_pattern", "exclude_modules", "fan_in_fan_out", "lora_bias",
    "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "arrow_config",
    "velora_config", "corda_config", "megatron_config", "layer_replication", "kasa_config", "monteclora_config",
)  # fmt: skip
_PEFT_NAMES = {"model.embed_tokens": "embed_tokens"}
"""The one name that PEFT itself writes with its path: for `ensure_weight_tying`."""
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that do not change the base. PiSSA, OLoRA, LoftQ and others change its weights."""


def save_adapter(
    model: nn.Module, folder: str | Path, base_model_path: str | Path, lineage: dict[str, Any] | None = None
) -> None:
    """Write a PEFT folder: adapter_config.json, adapter_model.safetensors, and lineage.json beside them.

    Args:
        base_model_path: where the base model is, absolute or relative to the adapter's own folder.
        lineage: facts to record beside the fingerprint of the base weights.

    Raises:
        ValueError: the model has no adapters, or they differ in rank; the folder holds other files.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no adapters to save; apply_lora first")
    if len({(layer.rank, layer.scaling, layer.dropout) for layer in layers.values()}) != 1:
        raise ValueError("the adapters differ in rank, alpha or dropout; adapter_config.json can hold only one of each")
    first = next(iter(layers.values()))
    alpha = first.scaling * first.rank
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_model_path),
        "r": first.rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": first.dropout,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    tensors = {
        f"{_PEFT_PREFIX}{name}.{part}": weight
        for name, layer in layers.items()
        for part, weight in layer.adapter().items()
    }
    record = {**(lineage or {}), "base_fingerprint": weights_fingerprint(model)}
    with replaceable_folder(folder, "adapter_config.json") as fresh:
        write_json(fresh / "adapter_config.json", config)
        write_tensors(fresh / "adapter_model.safetensors", tensors)
        write_json(fresh / "lineage.json", record)


def read_adapter_config(folder: str | Path, tied: bool = False) -> LoRAConfig:
    """The settings in a PEFT folder.

    Args:
        tied: whether the base model has one table for tokens and output.

    Raises:
        FileNotFoundError: there is no adapter_config.json.
        ValueError: it asks for something that is not supported.
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
    if (start := data.get("init_lora_weights")) not in _PLAIN_STARTS:
        raise ValueError(
            f"{path} has init_lora_weights {shown(start)}, which changes the base model's weights; convert it with "
            "PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    targets = data.get("target_modules")
    if targets == "all-linear":
        targets = PROJECTIONS
    if not isinstance(targets, list | tuple):
        raise ValueError(f"{path} has target_modules {shown(targets)}; a list of names is expected")
    targets = [_PEFT_NAMES.get(name, name) if isinstance(name, str) else name for name in targets]
    if data.get("ensure_weight_tying") and tied and any(name in TABLES for name in targets):
        targets += TABLES  # the file holds an adapter for each of the two; they are equal
    try:
        rank, alpha = data.get("r", 8), data.get("lora_alpha", 8)
        return LoRAConfig(rank, alpha, data.get("lora_dropout", 0.0), tuple(targets))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}; correct the file or save the adapter again") from None


def load_adapter(model: nn.Module, folder: str | Path, model_path: str | Path | None = None) -> nn.Module:
    """Attach the adapter in a PEFT folder and remove any other; returns the model.

    The file must hold exactly the expected tensors, by name and shape: an adapter that is loaded in part is silently
    useless. If the folder records the fingerprint of its base weights, the model must match it.

    Args:
        model_path: the model's path, for the error message if the model is not the adapter's base.

    Raises:
        FileNotFoundError, ValueError: the adapter does not fit, or cannot be read. The model is unchanged.
    """
    folder = Path(folder)
    config = read_adapter_config(folder, tied=is_tied(model))
    _check_base(model, folder, model_path)
    path = folder / "adapter_model.safetensors"
    found = read_header(path)
    expected, tables = _expected(model, config, found)
    try:
        check_shapes(path, found, expected)
    except ValueError as error:
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise ValueError(
            f"{folder} does not fit {model_path or 'this model'}; it was trained on {_plain(base)}: give that model "
            f"({error})"
        ) from None
    tensors = read_weights(path)
    for name, table in tables.items():
        if not torch.equal(tensors[name], table.detach().to("cpu", tensors[name].dtype)):
            raise ValueError(
                f"{path} holds another table as {name} than {model_path or 'this model'}: give the model that the "
                "adapter was trained on"
            )
    apply_lora(unload_lora(model), config)
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            for part, weight in layer.adapter().items():
                weight.copy_(tensors[f"{_PEFT_PREFIX}{name}.{part}"])
    return model


def _expected(
    model: nn.Module, config: LoRAConfig, found: Mapping[str, Any]
) -> tuple[dict[str, tuple[int, ...]], dict[str, Tensor]]:
    """Name and shape of every tensor in the file, and the base model's tables of which PEFT puts a copy into it."""
    shapes: dict[str, tuple[int, ...]] = {}
    tables: dict[str, Tensor] = {}
    for name, module in adaptable_layers(model).items():
        if name.rpartition(".")[2] not in config.target_modules:
            continue
        rows, columns = module.weight.shape
        if isinstance(module, nn.Embedding):
            shapes[f"{_PEFT_PREFIX}{name}.lora_embedding_A"] = (config.rank, rows)
            shapes[f"{_PEFT_PREFIX}{name}.lora_embedding_B"] = (columns, config.rank)
        else:
            shapes[f"{_PEFT_PREFIX}{name}.lora_A.weight"] = (config.rank, columns)
            shapes[f"{_PEFT_PREFIX}{name}.lora_B.weight"] = (rows, config.rank)
        if name in TABLE_NAMES and (copy := f"{_PEFT_PREFIX}{name}.base_layer.weight") in found:
            tables[copy], shapes[copy] = module.weight, (rows, columns)
    return shapes, tables


def _check_base(model: nn.Module, folder: Path, model_path: str | Path | None) -> None:
    path = folder / "lineage.json"
    lineage = read_json(path) if path.is_file() else {}
    recorded, parent = lineage.get("base_fingerprint"), lineage.get("parent")
    if recorded and recorded != (actual := weights_fingerprint(model)):
        stated = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        # If the base was a `.pth`, the parent is a name, not a record.
        base = (parent.get("path") if isinstance(parent, dict) else parent) or stated
        raise ValueError(
            f"{folder} was trained on {_plain(base)} (weights {_plain(recorded)}); {model_path or 'this model'} has "
            f"weights {actual}: load it onto its own base model, which --model_path {folder} alone does (and convert "
            "to half precision only afterwards)"
        )


def _plain(text: object) -> str:
    """A text from a file, unquoted if it can safely be printed."""
    return text if isinstance(text, str) and text.isprintable() and len(text) < 1000 else shown(text)
