"""GGUF files of others: the header is checked against the file's size before memory is taken for what it promises.

A `.gguf` file is `GGUF`, a version, two counts, keys with values (settings, the tokenizer), the name, shape, type and
place of every tensor, and the numbers. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinylm.checkpoint.weights_file import check_name
from tinylm.files.untrusted import MAX_JSON_BYTES, check_file, shown

TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
)  # fmt: skip
"""The types of numbers that are read."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type of a value -> its code in `struct` and numpy."""
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_MAX_KEYS = _MAX_TENSORS = 1 << 16
_MAX_ITEMS = 1 << 22  # texts in all arrays together; 262,144 tokens with their merges are 800,000
_MAX_ITEM_BYTES = 1 << 16
_SHORT_LIST = 1 << 12  # numbers; longer arrays are skipped, unless they are the types of the tokens
_LONG_LISTS = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type")
_DAMAGED = "the file is cut short or damaged: copy, download or export it again"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's numbers are in its file, and of which type."""

    kind: str
    shape: tuple[int, ...]
    begin: int
    num_bytes: int


@dataclass(frozen=True)
class GGUFContents:
    """What the header says. `values` has None for what is too long to be of use here."""

    values: dict[str, Any]
    tensors: dict[str, StoredTensor]


class _Header:
    """Reads forward through a file of `size` bytes, never beyond its end."""

    def __init__(self, file: BufferedReader, size: int) -> None:
        self.file, self.size, self.place, self.num_items = file, size, 0, 0

    def need(self, num_bytes: int, what: str) -> None:
        """Raise ValueError unless that many bytes are left."""
        if num_bytes > self.size - self.place:
            raise ValueError(
                f"{what} at byte {self.place:,} needs {num_bytes:,} bytes; only {self.size - self.place:,} of "
                f"{self.size:,} are left: {_DAMAGED}"
            )

    def take(self, num_bytes: int, what: str) -> bytes:
        self.need(num_bytes, what)
        self.place += num_bytes
        data = self.file.read(num_bytes)
        if len(data) != num_bytes:
            raise ValueError(f"{what} ends early; the file became shorter while it was read: read it again")
        return data

    def skip(self, num_bytes: int, what: str) -> None:
        self.need(num_bytes, what)
        self.place += num_bytes
        self.file.seek(self.place)

    def number(self, code: str, what: str) -> Any:
        size = struct.calcsize(code)
        return struct.unpack(f"<{code}", self.take(size, what))[0]

    def name(self, what: str) -> str:
        """A key or a tensor's name."""
        length = self.number("Q", what)
        self.need(length, what)
        if length > 4 * 512:
            raise ValueError(f"{what} at byte {self.place:,} has {length:,} bytes; expected up to 512: {_DAMAGED}")
        name = self.take(length, what).decode("utf-8", errors="replace")
        check_name(name)
        return name


def read_gguf(path: Path) -> GGUFContents:
    """The header of a GGUF of one file, version 2 or 3, little-endian; the numbers are not read.

    Every text and array must end within the file. The tensors must follow each other without gaps or shared bytes, as
    llama.cpp demands it, and fill the rest of the file. So no header can claim more memory than the file's size.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a GGUF, shorter or longer than its header says, or an impossible header.
    """
    check_file(path, "a GGUF file is expected there")
    size = path.stat().st_size
    with path.open("rb") as file:
        header = _Header(file, size)
        if size < 24 or header.take(4, "the start") != b"GGUF":
            raise ValueError(f"not a GGUF file ({size:,} bytes, not beginning with `GGUF`); give a .gguf file")
        version = header.number("I", "the version")
        if version not in (2, 3):
            what = "is big-endian" if version & 0xFFFF == 0 and version else f"is of version {version}"
            raise ValueError(f"it {what}; expected a little-endian GGUF of version 2 or 3: convert it again")
        num_tensors, num_keys = header.number("Q", "a count"), header.number("Q", "a count")
        for what, count, most, least_bytes in (
            ("tensors", num_tensors, _MAX_TENSORS, 32),
            ("keys", num_keys, _MAX_KEYS, 13),
        ):
            if count > most or count * least_bytes > size:
                raise ValueError(f"it promises {count:,} {what} in {size:,} bytes, at most {most:,} each: {_DAMAGED}")
        values: dict[str, Any] = {}
        for _ in range(num_keys):
            key = header.name("a key")
            if key in values:
                raise ValueError(f"the key {key} appears twice; two readers would see two models: export it again")
            values[key] = _value(header, header.number("I", key), key)
        found = [_tensor_info(header) for _ in range(num_tensors)]
    return GGUFContents(values, _placed(found, _aligned(header.place, values), _alignment(values), size))


def _value(header: _Header, kind: int, key: str) -> Any:
    if kind in _SCALARS:
        return _plain(kind, header.number(_SCALARS[kind], key))
    if kind == _STRING:
        length = header.number("Q", key)
        if length > MAX_JSON_BYTES:
            header.skip(length, key)
            return None
        return header.take(length, key).decode("utf-8", errors="replace")
    if kind != _ARRAY:
        raise ValueError(f"{key} has the type {kind}; expected 0 to 12: {_DAMAGED}")
    kind, count = header.number("I", key), header.number("Q", key)
    if kind == _STRING:
        return _texts(header, count, key)
    if kind not in _SCALARS:
        raise ValueError(f"{key} is a list of type {kind}; expected numbers or texts: {_DAMAGED}")
    num_bytes = count * struct.calcsize(f"<{_SCALARS[kind]}")
    if count > _SHORT_LIST and key not in _LONG_LISTS:
        return header.skip(num_bytes, key)
    header.need(num_bytes, key)
    if count > _MAX_ITEMS:
        raise ValueError(f"{key} has {count:,} items; expected up to {_MAX_ITEMS:,}: {_DAMAGED}")
    code = "u1" if _SCALARS[kind] == "?" else _SCALARS[kind]
    return [_plain(kind, value) for value in np.frombuffer(header.take(num_bytes, key), f"<{code}").tolist()]


def _plain(kind: int, value: Any) -> Any:
    """A float32 as the shortest decimal that means it: 1e-05, and not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if kind == _FLOAT32 else value


def _texts(header: _Header, count: int, key: str) -> list[str] | None:
    header.need(8 * count, key)
    header.num_items += count
    if header.num_items > _MAX_ITEMS:
        raise ValueError(f"{key} has {count:,} items; expected up to {_MAX_ITEMS:,} in all lists: {_DAMAGED}")
    items: list[str] = []
    for number in range(count):
        length = header.number("Q", key)
        if length > _MAX_ITEM_BYTES:
            raise ValueError(f"item {number} of {key} has {length:,} bytes; expected up to {_MAX_ITEM_BYTES}")
        item = header.take(length, key)
        if key in _LONG_LISTS:
            items.append(_text(item, key, number))
    return items if key in _LONG_LISTS else None


def _text(item: bytes, key: str, number: int) -> str:
    try:
        return item.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"item {number} of {key} is {shown(item)}, not UTF-8: {_DAMAGED}") from None


def _tensor_info(header: _Header) -> tuple[str, list[int], int, int]:
    """(name, dimensions with the row length first, type, offset)."""
    name = header.name("a tensor's name")
    num_dimensions = header.number("I", name)
    if not 1 <= num_dimensions <= 4:
        raise ValueError(f"{name} has {num_dimensions:,} dimensions; expected 1 to 4: {_DAMAGED}")
    dimensions = [header.number("Q", name) for _ in range(num_dimensions)]
    return name, dimensions, header.number("I", name), header.number("Q", name)


def _alignment(values: dict[str, Any]) -> int:
    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {shown(alignment)}; expected a power of two, such as 32: {_DAMAGED}")
    return alignment


def _aligned(place: int, values: dict[str, Any]) -> int:
    alignment = _alignment(values)
    return -(-place // alignment) * alignment


def _placed(
    found: list[tuple[str, list[int], int, int]], start: int, alignment: int, size: int
) -> dict[str, StoredTensor]:
    """The tensors by name, when each follows the one before it and the last one ends the file."""
    tensors: dict[str, StoredTensor] = {}
    end = 0
    for name, dimensions, number, offset in sorted(found, key=lambda info: info[3]):
        if name in tensors:
            raise ValueError(f"the tensor {name} appears twice; two readers would see two models: export it again")
        kind = _kind_of(name, number)
        block, block_bytes = _block_of(kind)
        if min(dimensions) < 1 or dimensions[0] % block:
            raise ValueError(
                f"{name} has the shape {shown(dimensions)}; expected numbers from 1, the first a multiple of {block} "
                f"for {kind}: {_DAMAGED}"
            )
        num_bytes = math.prod(dimensions) // block * block_bytes
        if start + offset + num_bytes > size:
            raise ValueError(
                f"{name} needs {num_bytes:,} bytes at byte {start + offset:,}; the file has {size:,}: {_DAMAGED}"
            )
        if offset != end:
            what = "shares bytes with another tensor" if offset < end else "leaves a hole before it"
            raise ValueError(f"the tensor {name} {what} at byte {start + offset:,}; llama.cpp refuses it: {_DAMAGED}")
        tensors[name] = StoredTensor(kind, tuple(reversed(dimensions)), start + offset, num_bytes)
        end = -(-(offset + num_bytes) // alignment) * alignment
    if size > start + end:
        raise ValueError(f"the file has {size:,} bytes; its header promises {start + end:,}: {_DAMAGED}")
    return tensors


def _package() -> Any:
    try:
        import gguf
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise ValueError("the package gguf is not installed; install it with: pip install 'tinylm[export]'") from None
    return gguf


def _kind_of(name: str, number: int) -> str:
    known = {kind.value: kind.name for kind in _package().GGMLQuantizationType}
    kind = known.get(number, str(number))
    if kind not in TYPES:
        raise ValueError(f"{name} is of type {kind}; expected {', '.join(TYPES)}: take another file of this model")
    return kind


def _block_of(kind: str) -> tuple[int, int]:
    """(numbers, bytes) of a block."""
    gguf = _package()
    block, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return int(block), int(num_bytes)


def read_gguf_tensor(path: Path, name: str, stored: StoredTensor) -> Tensor:
    """The numbers of a tensor in float32, as llama.cpp's own package turns them into float32.

    Raises:
        ValueError: some are NaN or infinite, or the file became shorter since its header was read.
    """
    gguf = _package()
    block, block_bytes = _block_of(stored.kind)
    raw = np.fromfile(path, np.uint8, stored.num_bytes, offset=stored.begin)
    if raw.nbytes != stored.num_bytes:
        raise ValueError(f"{name} ends early; the file became shorter while it was read: read it again")
    with np.errstate(all="ignore"):  # the check below says what is wrong
        rows = raw.reshape(-1, stored.shape[-1] // block * block_bytes)
        values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[stored.kind])
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds NaN or infinite numbers; {_DAMAGED}")
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).reshape(stored.shape)
