"""A folder to publish on the Hugging Face hub: weights in the numbers that were asked for, tokenizer, model card.

It holds no path of this machine. `lineage.json` is there with its plain facts, which `tinylm import` reads again.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinylm.checkpoint.lineage import facts_of
from tinylm.checkpoint.model_folder import write_configs
from tinylm.checkpoint.model_path import ADAPTER
from tinylm.checkpoint.weight_shards import write_weights
from tinylm.checkpoint.weights_file import read_weights, write_tensors
from tinylm.export.tokenizer_check import check_tokenizer_json
from tinylm.files.atomic import atomic_folder, require_new, require_room, write_json
from tinylm.files.untrusted import read_json, shown
from tinylm.model.hf_config import require_llama_shape
from tinylm.model.lora import has_lora
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.model.weights import base_state
from tinylm.tokenizer.tokenizer import Tokenizer

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_OURS = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|lineage|adapter_config|model\.safetensors\.index)\.json"
    r"|(model|model-\d+-of-\d+|adapter_model)\.safetensors|chat_template\.jinja|README\.md"
)
"""The names of all files that an export writes."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB)", flags=re.IGNORECASE)
_OTHER_FILES_BYTES = 1 << 20


def export_hf(
    model: TinyLMForCausalLM,
    tokenizer: Tokenizer,
    lineage: dict[str, Any],
    folder: Path,
    dtype: str,
    card: str,
    shard_bytes: int = 0,
    overwrite: bool = False,
) -> list[str]:
    """Write the folder completely or not at all; returns the names of its weight files.

    Args:
        dtype: one of `DTYPES`, for all weights.
        card: the text of README.md.
        shard_bytes: largest size of a weight file; 0 means one file for all.

    Raises:
        ValueError: transformers has no class for the model, a weight does not fit the dtype, the disk has too little
            room, the folder exists, or its tokenizer.json gives a text other tokens.
    """
    if has_lora(model):
        raise ValueError("the model has adapters attached; merge_lora, or export them with export_hf_adapter")
    require_llama_shape(model.config)
    tensors = _converted(base_state(model), dtype)
    with _published(folder, tensors, overwrite) as fresh:
        files = write_weights(fresh, tensors, shard_bytes)
        write_configs(fresh, model.config, DTYPES[dtype])
        tokenizer.save(fresh)
        check_tokenizer_json(tokenizer, fresh / "tokenizer.json")
        _write_origin(fresh, lineage, card)
    return files


def export_hf_adapter(
    adapter: Path,
    lineage: dict[str, Any],
    folder: Path,
    dtype: str,
    card: str,
    base_model: str,
    overwrite: bool = False,
) -> list[str]:
    """Write an adapter folder for PEFT, as `export_hf` writes a model.

    Args:
        adapter: the adapter's folder.
        base_model: what adapter_config.json names as the base model.
    """
    tensors = _converted(read_weights(adapter / _ADAPTER_WEIGHTS), dtype)
    config = {**read_json(adapter / ADAPTER), "base_model_name_or_path": base_model}
    with _published(folder, tensors, overwrite) as fresh:
        write_tensors(fresh / _ADAPTER_WEIGHTS, tensors)
        write_json(fresh / ADAPTER, config)
        _write_origin(fresh, lineage, card)
    return [_ADAPTER_WEIGHTS]


def num_bytes_of(size: str) -> int:
    """2,000,000,000 for "2GB"; 0 for the empty text.

    Raises:
        ValueError: it is not a number of KB, MB or GB.
    """
    if not size:
        return 0
    found = _SIZE.fullmatch(size.strip())
    num_bytes = int(float(found[1]) * {"KB": 1e3, "MB": 1e6, "GB": 1e9}[found[2].upper()]) if found else 0
    if not num_bytes:
        raise ValueError(f"shard_size is {shown(size)}; expected a size above 0, such as 2GB or 500MB")
    return num_bytes


def require_publishable(folder: Path, overwrite: bool) -> None:
    """Refuse to replace a folder, unless that was asked for and it holds nothing but files of an export.

    Raises:
        NotADirectoryError, ValueError: the message says what is there.
    """
    if folder.is_dir() and not any(folder.iterdir()):
        return
    require_new(folder, overwrite, "output")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; expected a folder name; choose another --output")
    other = (
        [path.name for path in sorted(folder.iterdir()) if not _OURS.fullmatch(path.name)] if folder.exists() else []
    )
    if other:
        raise ValueError(f"{folder} also holds {shown(other[0])}, which would be deleted; choose another --output")


def _converted(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The tensors in another type of numbers.

    Raises:
        ValueError: a number is not finite, or too large for the type.
    """
    converted = {}
    for name, tensor in tensors.items():
        converted[name] = tensor.detach().to("cpu", DTYPES[dtype])
        if converted[name].isfinite().all():
            continue
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinite numbers; the model is broken: export an earlier one")
        wider = "bf16 or f32" if dtype == "f16" else "f32"
        raise ValueError(
            f"{name} holds {float(tensor.detach().abs().max()):.4g}, too large for {dtype}; use --dtype {wider}"
        )
    return converted


@contextlib.contextmanager
def _published(folder: Path, tensors: Mapping[str, Tensor], overwrite: bool) -> Iterator[Path]:
    """A fresh folder that becomes `folder` when it is complete; room for the tensors is there."""
    require_publishable(folder, overwrite)
    require_room(folder, sum(tensor.nbytes for tensor in tensors.values()) + _OTHER_FILES_BYTES)
    with atomic_folder(folder) as fresh:
        yield fresh


def _write_origin(folder: Path, lineage: dict[str, Any], card: str) -> None:
    write_json(folder / "lineage.json", facts_of(lineage))
    (folder / "README.md").write_text(card, encoding="utf-8")
