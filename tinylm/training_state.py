"""Training state on disk: nested tensors and plain values, exactly, without a pickle.

A folder with `state.safetensors` (the tensors) and `state.json` (everything else, and the other file's
checksum). It is replaced as a whole: until the new state is complete, the old one stays.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from tinylm.model.weights_file import read_json, read_tensors, replaceable_folder, write_tensors

_TENSORS, _VALUES = "state.safetensors", "state.json"
_TENSOR, _TUPLE, _ITEMS = "__tensor__", "__tuple__", "__items__"


def save_training_state(folder: str | Path, state: dict[str, Any]) -> None:
    """Write nested dicts, lists and tuples of tensors, str, int, float, bool and None, atomically.

    Dtypes, tuples and integer keys (an optimizer's) come back as they were.

    Raises:
        TypeError: a value of another type (a bug of the caller: it could not be restored).
        ValueError: the folder holds other files.
    """
    tensors: dict[str, Tensor] = {}
    values = _flatten(state, tensors, "state")
    with replaceable_folder(folder, _VALUES) as fresh:
        write_tensors(fresh / _TENSORS, tensors)
        record = {"format": 1, "sha256": _sha256(fresh / _TENSORS), "state": values}
        (fresh / _VALUES).write_text(json.dumps(record), encoding="utf-8")


def load_training_state(folder: str | Path) -> dict[str, Any]:
    """What `save_training_state` wrote, tensors on the CPU.

    Raises:
        FileNotFoundError: no state there. ValueError: a damaged file.
    """
    folder = _existing(Path(folder))
    record = _read_record(folder)
    tensors = read_tensors(folder / _TENSORS)
    if _sha256(folder / _TENSORS) != record.get("sha256"):
        raise ValueError(f"{folder / _TENSORS} does not match its checksum; restore it from a copy or start afresh")
    state = _unflatten(record["state"], tensors)
    assert isinstance(state, dict)
    return state


def read_training_values(folder: str | Path) -> dict[str, Any]:
    """A training state without its tensors, which are None here: a look at the small file, and none at the large one.

    Raises:
        FileNotFoundError: no state there. ValueError: a damaged file.
    """
    state = _unflatten(_read_record(_existing(Path(folder)))["state"], None)
    assert isinstance(state, dict)
    return state


def _read_record(folder: Path) -> dict[str, Any]:
    record = read_json(folder / _VALUES)
    if record.get("format") != 1:
        raise ValueError(f"{folder / _VALUES} has format {record.get('format')!r}; expected 1: it is not ours")
    return record


def _existing(folder: Path) -> Path:
    """The folder, or what a crash between the two renames of a replacement left of the previous one."""
    if not folder.exists():
        left = sorted(folder.parent.glob(f".{folder.name}.*.old"), key=lambda path: path.stat().st_mtime)
        if left and (left[-1] / _VALUES).is_file():
            return left[-1]
        raise FileNotFoundError(f"{folder} does not exist; there is no training state to resume from")
    return folder


def _flatten(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {_TENSOR: name}
    if isinstance(value, dict):
        plain = all(isinstance(key, str) and not key.startswith("__") for key in value)
        items = [[key, _flatten(item, tensors, f"{path}.{key}")] for key, item in value.items()]
        return dict(items) if plain else {_ITEMS: items}
    if isinstance(value, list):
        return [_flatten(item, tensors, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, tuple):
        return {_TUPLE: [_flatten(item, tensors, f"{path}[{i}]") for i, item in enumerate(value)]}
    # Exact types: a numpy number or an enum would come back as something else.
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise TypeError(f"{path} is a {type(value).__name__}; training state holds tensors and plain JSON values only")


def _unflatten(value: Any, tensors: dict[str, Tensor] | None) -> Any:
    if isinstance(value, list):
        return [_unflatten(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return None if tensors is None else tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(_unflatten(item, tensors) for item in value[_TUPLE])
    if _ITEMS in value:
        return {key: _unflatten(item, tensors) for key, item in value[_ITEMS]}
    return {key: _unflatten(item, tensors) for key, item in value.items()}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
