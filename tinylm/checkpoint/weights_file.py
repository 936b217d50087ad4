"""Weights in safetensors files: read and write them, and check the header before memory is taken.

A `.safetensors` file is 8 bytes (little-endian header length), a JSON header with the dtype, shape and place of every
tensor, and the numbers. So the first kilobytes show whether a file was cut short or does not fit its config.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeGuard

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tinylm.files.atomic import MANIFEST, atomic_folder, check_manifest, write_manifest
from tinylm.files.untrusted import MAX_JSON_BYTES, check_file, parse_json, shown

_MAX_NAME = 512  # characters; PEFT's longest names have about 80
_MAX_DIMENSIONS = 8
# Types that torch has. The format also has types smaller than a byte; no model here uses them.
_ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8, "I64": 8, "I32": 4, "I16": 2,
    "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
Shapes = dict[str, tuple[int, ...]]


def read_header(path: Path) -> Shapes:
    """Name and shape of every tensor in a safetensors file, without reading the numbers.

    Every tensor must have as many bytes as its type and shape need. Together the tensors must fill the rest of the file
    without holes or shared bytes. So no header can claim more memory than the file's size.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, shorter or longer than its header says, or an impossible header.
    """
    check_file(path, "a safetensors file with the weights is expected there")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_JSON_BYTES):
            raise ValueError(f"{path} is cut short or not a safetensors file ({size} bytes); copy or save it again")
        raw = file.read(length)
    try:
        header = parse_json(raw)
        if not isinstance(header, dict) or not isinstance(header.pop("__metadata__", {}), dict):
            raise ValueError("it is not an object")
        places = sorted(_checked_entry(name, entry) for name, entry in header.items())
    except ValueError as error:
        raise ValueError(f"{path} has an unreadable safetensors header ({error}); copy or save it again") from None
    end = 0
    for begin, stop, name in places:
        if begin != end:
            what = "shares bytes with another tensor" if begin < end else "leaves a hole before it"
            raise ValueError(f"{path}: the tensor {name} {what}; it would not load elsewhere: save it again")
        end = stop
    if 8 + length + end != size:
        raise ValueError(f"{path} has {size} bytes; its header promises {8 + length + end}: copy or save it again")
    return {name: tuple(entry["shape"]) for name, entry in header.items()}


def check_name(name: str) -> None:
    """Raise ValueError for a long tensor name, or one that is unsafe to print (escape sequences)."""
    if not name.isprintable() or len(name) > _MAX_NAME:
        raise ValueError(f"the tensor name {shown(name)}; expected up to {_MAX_NAME} printable characters")


def _checked_entry(name: str, entry: object) -> tuple[int, int, str]:
    """(begin, end, name) of a tensor's bytes, from its entry in a header."""
    check_name(name)
    if not isinstance(entry, dict):
        raise ValueError(f"{shown(name)} is not an object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise ValueError(f"{shown(name)} has the dtype {shown(dtype)}; expected {', '.join(_ITEM_BYTES)}")
    if not _whole_numbers(shape) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"{shown(name)} has the shape {shown(shape)}; expected a list of whole numbers")
    needed = math.prod(shape) * _ITEM_BYTES[dtype]
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != needed:
        raise ValueError(f"{shown(name)} has the data_offsets {shown(offsets)}; expected {needed} bytes")
    return offsets[0], offsets[1], name


def _whole_numbers(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, copied into memory (not mapped onto the file)."""
    read_header(path)
    try:
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}); copy or save it again") from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """`read_tensors` for a file of model weights, which must be floating-point numbers.

    Raises:
        ValueError: the file does not match the manifest beside it, or holds a tensor of whole numbers. These are
            quantised weights, which are useless without their scales.
    """
    if (path.parent / MANIFEST).is_file():
        try:
            check_manifest(path.parent, path.name)
        except ValueError as error:
            raise ValueError(f"{error}; if it was changed on purpose, delete {MANIFEST}") from None
    tensors = read_tensors(path)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(
                f"{path}: {name} is of type {str(tensor.dtype).removeprefix('torch.')}; expected floating-point "
                "weights: save the model again, unquantised"
            )
    return tensors


def check_shapes(path: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError, with the first tensor and the count, unless names and shapes are the same."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    wrong = [name for name in expected if name in found and found[name] != expected[name]]
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} tensors, the first {missing[0]}; it must hold all {len(expected)} "
            "of "
            "its config: check that both come from the same model"
        )
    if extra:
        raise ValueError(
            f"{path} has {len(extra)} tensors too many, the first {extra[0]}; its config knows none of them: "
            "check that both come from the same model"
        )
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{path} has {len(wrong)} tensors of another shape, the first {name} {list(found[name])}; its "
            "config "
            f"expects {list(expected[name])}: check that both come from the same model"
        )


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file that transformers, PEFT and vLLM accept; exact dtypes, any device."""
    written: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        data = tensor.detach().to("cpu").contiguous()
        # The format has no shared memory: a second view of the same memory is written as a copy.
        if data.untyped_storage().data_ptr() in written or data.untyped_storage().nbytes() != data.nbytes:
            data = data.clone()
        written.add(data.untyped_storage().data_ptr())
        plain[name] = data
    try:
        save_file(plain, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(
            f"{path} cannot be written ({error}); make room on the disk, then try again, in training with --resume"
        ) from None


def num_elements(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many numbers tensors of these shapes hold together."""
    return sum(math.prod(shape) for shape in shapes.values())


@contextlib.contextmanager
def replaceable_folder(path: str | Path, marker: str) -> Iterator[Path]:
    """`atomic_folder` with a manifest; it replaces only a folder of the same kind.

    Raises:
        ValueError: the folder exists, is not empty and has no file `marker`.
    """
    folder = Path(path)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise ValueError(
            f"{folder} exists and holds other files (no {marker}), which would be deleted: choose another folder"
        )
    with atomic_folder(folder) as fresh:
        yield fresh
        write_manifest(fresh)
