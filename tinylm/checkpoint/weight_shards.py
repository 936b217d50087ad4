"""The weight files of a model folder: one safetensors file, or several (shards) that an index lists."""

from __future__ import annotations

import re
from pathlib import Path

from tinylm.checkpoint.weights_file import read_header
from tinylm.files.untrusted import read_json, shown

WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"\w[\w.-]{0,200}\.safetensors", flags=re.ASCII)


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
