"""Models on disk: write a model folder atomically; load a model folder, an adapter folder, a `.pth` or `.gguf` file.

A model folder is a Hugging Face folder: config.json, generation_config.json, model.safetensors, the tokenizer's files,
and lineage.json (where the model comes from). Loading checks sizes before it takes memory, demands every tensor under
its exact name and shape, and unpickles nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinylm.checkpoint.adapter_folder import load_adapter
from tinylm.checkpoint.gguf_model import open_gguf
from tinylm.checkpoint.model_path import ADAPTER, CONFIG, resolve_model_path
from tinylm.checkpoint.original_pth import config_from_tensors, read_pth
from tinylm.checkpoint.weight_shards import shapes_of, weight_files, write_weights
from tinylm.checkpoint.weights_file import (
    check_shapes,
    num_elements,
    read_weights,
    replaceable_folder,
)
from tinylm.files.atomic import write_json
from tinylm.files.untrusted import read_json, shown
from tinylm.model.config import TinyLMConfig
from tinylm.model.hf_config import config_from_hf, config_to_hf
from tinylm.model.lora import has_lora
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.model.weights import base_state, unwrapped
from tinylm.tokenizer.tokenizer import Tokenizer

GENERATION_CONFIG = "generation_config.json"
_LAYER_0 = "model.layers.0."
_MAX_PATH = 1000  # characters; systems take 1,024 or more


def save_model(folder: str | Path, model: torch.nn.Module, tokenizer: Tokenizer, lineage: dict[str, Any]) -> None:
    """Write a model folder. An existing model folder at that path is replaced when the new one is complete.

    Args:
        model: a TinyLMForCausalLM, compiled or not, without adapters.
        lineage: JSON values: stage, settings, parent, fingerprints, seed, version.

    Raises:
        ValueError: adapters are attached, the tokenizer has more entries than the model, or the folder holds
            other files.
    """
    inner = unwrapped(model)
    assert isinstance(inner, TinyLMForCausalLM)
    if has_lora(inner):
        raise ValueError("the model has adapters attached; save them with save_adapter, or merge_lora first")
    _check_vocab(tokenizer, inner.config, Path(folder))
    with replaceable_folder(folder, CONFIG) as fresh:
        write_weights(fresh, base_state(inner))
        write_configs(fresh, inner.config, inner.dtype)
        tokenizer.save(fresh)
        write_json(fresh / "lineage.json", lineage)


def write_configs(folder: Path, config: TinyLMConfig, dtype: torch.dtype) -> None:
    """Write config.json and generation_config.json; `dtype` is that of the weights beside them."""
    name = str(dtype).removeprefix("torch.")
    write_json(folder / CONFIG, {**config_to_hf(config), "torch_dtype": name, "dtype": name})
    write_json(folder / GENERATION_CONFIG, _generation_config(config))


def _generation_config(config: TinyLMConfig) -> dict[str, Any]:
    """Defaults for `generate` in other engines: our own sampling settings, and both tokens that end a text."""
    stops = [i for i in dict.fromkeys((*config.eos_token_ids, config.pad_token_id)) if i is not None]
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": stops or None,
        "pad_token_id": config.pad_token_id,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
    }


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    tokenizer_path: str | Path | None = None,
) -> tuple[TinyLMForCausalLM, Tokenizer, dict[str, Any]]:
    """(model in eval mode, tokenizer, lineage) from a folder, a GGUF, or a `.pth` of lyuzlion/Tiny-Language-Model.

    Args:
        path: as for `resolve_model_path`. For an adapter folder, its base model is loaded and the adapter attached.
        dtype: of the weights; None means float32, whatever the file holds, because training needs it.
        tokenizer_path: the tokenizer to use instead of the folder's own.

    Raises:
        FileNotFoundError, ValueError: the message says which file is wrong, how, and what to do.
    """
    path = resolve_model_path(path)
    if path.is_file():
        load = _load_gguf if path.suffix == ".gguf" else _load_pth
        model, tokenizer, lineage = load(path, tokenizer_path)
    elif (path / CONFIG).is_file():
        model, tokenizer, lineage = _load_folder(path, tokenizer_path)
    else:
        model, tokenizer, lineage = _load_adapter_folder(path, tokenizer_path)
    return model.to(device=device, dtype=dtype or torch.float32).eval(), tokenizer, lineage


def _load_folder(folder: Path, tokenizer_path: str | Path | None) -> tuple[TinyLMForCausalLM, Tokenizer, dict]:
    try:
        config = config_from_hf(read_json(folder / CONFIG))
    except ValueError as error:
        raise ValueError(str(error) if str(folder) in str(error) else f"{folder / CONFIG}: {error}") from None
    files = weight_files(folder)
    shapes = shapes_of(folder, files)
    _check_size(files[0], config, shapes)
    tied_copy = config.tie_word_embeddings and shapes.pop("lm_head.weight", None) is not None
    check_shapes(files[0], _without_tables(shapes), _expected_shapes(config))
    tokenizer = _tokenizer_for(folder, config, tokenizer_path)

    tensors = {name: tensor for file in files for name, tensor in read_weights(file).items()}
    if tied_copy and not torch.equal(tensors.pop("lm_head.weight"), tensors["model.embed_tokens.weight"]):
        raise ValueError(
            f"{files[0]} has an lm_head.weight that differs from the embedding; {CONFIG} says they are "
            "tied: "
            "set tie_word_embeddings to false there"
        )
    lineage_path = folder / "lineage.json"
    lineage = read_json(lineage_path) if lineage_path.is_file() else {}
    return _assemble(config, tensors), tokenizer, lineage


def _without_tables(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Drop the rotary frequencies that old Llama checkpoints hold; they follow from the config."""
    return {name: shape for name, shape in shapes.items() if not name.endswith("rotary_emb.inv_freq")}


def _check_size(path: Path, config: TinyLMConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a config that implies far more weights or layers than the file has, before the model is built."""
    stored = num_elements(shapes)
    if config.num_parameters() > 4 * max(stored, 1):
        raise ValueError(
            f"{path} holds {stored:,} numbers; its config implies {config.num_parameters():,}: "
            "check that both come from the same model"
        )
    if config.num_hidden_layers > len(shapes):
        raise ValueError(
            f"{path} holds {len(shapes)} tensors; its config implies {config.num_hidden_layers} layers: "
            "check that both come from the same model"
        )


def _expected_shapes(config: TinyLMConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight, from a model of one layer: all layers have the same shapes.

    Building all layers takes a millisecond each, and the config's number of layers may be false.
    """
    with torch.device("meta"):
        one_layer = TinyLMForCausalLM(replace(config, num_hidden_layers=1))
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in base_state(one_layer).items():
        layers = range(config.num_hidden_layers) if name.startswith(_LAYER_0) else (0,)
        for layer in layers:
            shapes[name.replace(_LAYER_0, f"model.layers.{layer}.", 1)] = tuple(tensor.shape)
    return shapes


def _assemble(config: TinyLMConfig, tensors: dict[str, Tensor]) -> TinyLMForCausalLM:
    """A model with these tensors as its weights. It is not initialised, so no random numbers are drawn."""
    with torch.device("meta"):
        model = TinyLMForCausalLM(config)
    # Convert one tensor at a time and free its half-precision original, so that memory never holds all of both.
    weights = {name: tensors.pop(name).to(torch.float32) for name in list(tensors) if not name.endswith("inv_freq")}
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, strict=True, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.build_position_tables()
    return model


def adapter_base(folder: Path) -> Path:
    """The base model that an adapter folder names: a model folder, or a `.pth` file.

    Raises:
        FileNotFoundError, ValueError: it names none, or the named one does not exist or is not a full model.
    """
    stated = read_json(folder / ADAPTER).get("base_model_name_or_path")
    if not stated:
        raise ValueError(f"{folder / ADAPTER} names no base_model_name_or_path; write the base model's path there")
    if not isinstance(stated, str):
        raise ValueError(
            f"{folder / ADAPTER}: base_model_name_or_path is of type {type(stated).__name__}; expected a string: "
            "write the base model's path there"
        )
    if not stated.isprintable() or len(stated) > _MAX_PATH:
        raise ValueError(
            f"{folder / ADAPTER}: base_model_name_or_path is {shown(stated)}; expected a path: write the base "
            "model's path there"
        )
    candidates = [folder / stated, Path(stated)]  # the same if `stated` is absolute
    base = next((candidate for candidate in candidates if candidate.exists()), None)
    if base is None:
        raise FileNotFoundError(
            f"{folder / ADAPTER} names the base model {stated}, which does not exist; correct "
            "base_model_name_or_path (absolute, or relative to the adapter's folder)"
        )
    plain = Path(os.path.normpath(base))  # without `..`, for people to read; behind a link it may be another place
    if plain.exists() and plain.samefile(base):
        base = plain
    try:
        base = resolve_model_path(base)
    except (ValueError, OSError) as error:
        raise ValueError(f"{folder / ADAPTER} names the base model {stated}, which cannot be used: {error}") from None
    if base.is_dir() and not (base / CONFIG).is_file():
        raise ValueError(f"{folder / ADAPTER} names {stated}, an adapter itself; the base must be a full model")
    return base


def _load_adapter_folder(folder: Path, tokenizer_path: str | Path | None) -> tuple[TinyLMForCausalLM, Tokenizer, dict]:
    base = adapter_base(folder)
    model, tokenizer, base_lineage = load_model(base, tokenizer_path=tokenizer_path)
    load_adapter(model, folder, base)
    check_tokenizer(tokenizer, recorded_tokenizer(folder), folder, tokenizer_path or base)
    lineage_path = folder / "lineage.json"
    return model, tokenizer, read_json(lineage_path) if lineage_path.is_file() else base_lineage


def _load_pth(path: Path, tokenizer_path: str | Path | None) -> tuple[TinyLMForCausalLM, Tokenizer, dict]:
    tensors = read_pth(path)
    config = config_from_tensors(path, tensors)
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    _check_size(path, config, found)
    check_shapes(path, found, _expected_shapes(config))
    tokenizer = _tokenizer_for(path.with_suffix(""), config, tokenizer_path)
    return _assemble(config, tensors), tokenizer, {"stage": "original", "parent": path.name}


def _load_gguf(path: Path, tokenizer_path: str | Path | None) -> tuple[TinyLMForCausalLM, Tokenizer, dict]:
    file = open_gguf(path)
    _check_size(path, file.config, file.shapes)
    check_shapes(path, file.shapes, _expected_shapes(file.config))
    tokenizer = Tokenizer.load(tokenizer_path) if tokenizer_path else file.tokenizer()
    _check_vocab(tokenizer, file.config, path)
    return _assemble(file.config, file.read()), tokenizer, file.lineage()


def _tokenizer_for(folder: Path, config: TinyLMConfig, tokenizer_path: str | Path | None) -> Tokenizer:
    """The tokenizer at `tokenizer_path`, else the folder's own, else (for a `.pth`) the default one if it fits.

    Raises:
        ValueError: there is none, or it is not the one that the model was trained with.
    """
    has_own = (folder / "tokenizer.json").is_file()
    if tokenizer_path is not None:
        tokenizer, where = Tokenizer.load(tokenizer_path), Path(tokenizer_path)
    elif has_own:
        tokenizer, where = Tokenizer.load(folder), folder / "tokenizer.json"
    elif not folder.is_dir() and config.vocab_size == (default := Tokenizer.default()).vocab_size:
        return default
    else:
        raise ValueError(
            f"{folder} comes with no tokenizer.json for its {config.vocab_size} entries; give --tokenizer_path"
        )
    _check_vocab(tokenizer, config, folder)
    trained_with = recorded_tokenizer(folder)
    if trained_with is None and has_own and tokenizer_path is not None:
        trained_with = Tokenizer.load(folder).fingerprint
    check_tokenizer(tokenizer, trained_with, folder, where)
    return tokenizer


def recorded_tokenizer(folder: Path) -> str | None:
    """The fingerprint of the tokenizer that a model or adapter was trained with; None if it is not recorded."""
    path = folder / "lineage.json"
    recorded = read_json(path).get("tokenizer_fingerprint") if path.is_file() else None
    return recorded if isinstance(recorded, str) else None


def check_tokenizer(tokenizer: Tokenizer, trained_with: str | None, model: Path, where: str | Path) -> None:
    """Refuse a tokenizer with other entries than in training: each id would mean another text.

    Args:
        trained_with: the fingerprint of the model's tokenizer; None if it is not known.
        where: where the tokenizer comes from.
    """
    if trained_with not in (None, tokenizer.fingerprint):
        raise ValueError(
            f"the tokenizer of {where} is another one than {model} was trained with (fingerprint "
            f"{tokenizer.fingerprint}, expected {shown(trained_with)}): the model would read and write noise; leave "
            "out --tokenizer_path, or restore the model's own tokenizer.json"
        )


def _check_vocab(tokenizer: Tokenizer, config: TinyLMConfig, where: Path) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} entries and the model only "
            f"{config.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )
