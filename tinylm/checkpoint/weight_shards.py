"""The weight files of a model folder: one safetensors file, or several (shards) that an index lists."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tinylm.checkpoint.weights_file import read_header, write_tensors
from tinylm.files.atomic import write_json
from tinylm.files.untrusted import read_json, shown

WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"\w[\w.-]{0,200}\.safetensors", flags=re.ASCII)


def write_weights(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int = 0) -> list[str]:
    """Write `model.safetensors`, or shards of up to `shard_bytes` and their index; returns the names of the files.

    Tensors keep their order. One that is larger than a shard has a shard of its own. 0 means one file for all.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shard_bytes and shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        write_tensors(folder / WEIGHTS, tensors)
        return [WEIGHTS]
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, shard)
        places |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    return [*dict.fromkeys(places.values()), _INDEX]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: the single one, or those that the index names."""
    if (folder / WEIGHTS).is_file() or not (folder / _INDEX).is_file():
        return [folder / WEIGHTS]
    return [folder / name for name in sorted(set(_weight_map(folder).values()))]


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor -> file name, from the index. A name must be in the same folder: `../` and other folders are refused."""
    found = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{folder / _INDEX} names no files; save the model again")
    for name in found.values():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise ValueError(
                f"{folder / _INDEX} names the file {shown(name)}; expected names such as "
                "model-00001-of-00002.safetensors, in the same folder: save the model again"
            )
    return found


def shapes_of(folder: Path, files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in the files; each must be in exactly one file, the one that the index names."""
    shapes: dict[str, tuple[int, ...]] = {}
    index = {} if files == [folder / WEIGHTS] else _weight_map(folder)
    for file in files:
        for name, shape in read_header(file).items():
            if name in shapes or index.get(name, file.name) != file.name:
                raise ValueError(f"{file} holds {name}, and so does another file; save the model again")
            shapes[name] = shape
    if elsewhere := [name for name in index if name not in shapes]:
        raise ValueError(
            f"{folder / _INDEX} names {shown(elsewhere[0])}, which {shown(index[elsewhere[0]])} does not hold; "
            "save the model again"
        )
    return shapes
