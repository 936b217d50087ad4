"""Read `.pth` files, as `torch.save` writes them, without unpickling.

A `.pth` is a zip archive: `<name>/data.pkl` describes the objects, and `<name>/data/0`, `1`, ... hold the numbers of
one storage each, uncompressed. The description is a program for Python's pickle machine: push a string, make a tuple
of the last three values, call a function with it. These calls make pickles dangerous.

`torch.load` with weights_only=True calls few functions, but a program of a kilobyte can still (torch 2.13):

- take a terabyte of memory, with `bytearray(10**12)`;
- run for ever: with a key of 60 nested tuples, each of which holds the next one twice (2^60 steps to hash it), or by
  calling a tensor of 14 dimensions (the error message prints 6^14 of its numbers);
- end the process, with a key of 200,000 nested tuples (the stack overflows).

Only a machine that knows the values on its stack can refuse these programs, so this module has its own machine. State
dicts need two dozen instructions and three functions. The machine executes them symbolically: the results are names and
`StoredTensor`s, which describe where a tensor's numbers are. They are checked against the archive's list of contents
before any memory is taken.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinylm.checkpoint.weights_file import check_name
from tinylm.files.untrusted import shown

_MAX_PICKLE = 1 << 20  # bytes; the 150 tensors of a model take 30 KB
_MAX_STEPS = 200_000  # instructions; a tensor takes about 30. This bounds the time: a million take a second
_MAX_READ = 1 << 20  # bytes at a time; also the limit of the list of contents, enough for 10,000 storages
_DAMAGED = (
    zipfile.BadZipFile, RuntimeError, EOFError, ValueError, IndexError, KeyError, TypeError, AttributeError,
    OverflowError, OSError, struct.error, zlib.error,
)  # fmt: skip
_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Where a `.pth` holds a tensor's numbers: at `offset`, `offset + stride`, ... of a storage."""

    entry: str
    """Name of the storage in the archive."""
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


class _Global(NamedTuple):
    """The name of a function or class. It is not imported."""

    module: str
    name: str


class _Storage(NamedTuple):
    entry: str
    dtype: torch.dtype
    size: int


class _Refused(ValueError):
    """The file is not damaged, but has an instruction that no state dict needs."""


class _BoundedFile(io.FileIO):
    """A file that refuses large reads: `zipfile` would read a list of contents of any size at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:  # read to the end; zipfile does this only near the end
            size = _MAX_READ
        if size > _MAX_READ:
            raise zipfile.BadZipFile("its list of contents is too long")
        return super().read(size)


def read_contents(path: Path) -> Any:
    """The saved dicts, lists, numbers and strings, with a `StoredTensor` for each tensor.

    Raises:
        ValueError: the file holds code or other objects, the archive is damaged or compressed, or a tensor does not fit
            its storage.
    """
    with path.open("rb") as opened:
        start = opened.read(2)
    if start[:1] == b"\x80":
        raise ValueError(
            f"{path} is a bare pickle, as torch.save wrote before version 1.6, and could run code; save only the "
            "state_dict with torch.save"
        )
    try:
        with _BoundedFile(path) as file, zipfile.ZipFile(file) as archive:
            sizes = _checked_sizes(archive, path.stat().st_size)
            (description,) = [name for name in sizes if name.count("/") == 1 and name.endswith("/data.pkl")]
            folder = description.removesuffix("data.pkl")
            if sizes[description] > _MAX_PICKLE:
                raise ValueError(f"its data.pkl has {sizes[description]} bytes")
            if f"{folder}byteorder" in sizes and archive.read(f"{folder}byteorder") != b"little":
                raise ValueError("its numbers are not little-endian")
            return _Machine(folder, sizes).run(archive.read(description))
    except _Refused as error:
        raise ValueError(
            f"{path} holds more than tensors ({error}) and was not loaded, because it could run code; "
            "save only the state_dict with torch.save"
        ) from None
    except _DAMAGED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{path} is damaged or not a PyTorch file ({shown(reason, 100)}); copy or save it again"
        ) from None


def load_tensors(path: Path, stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """The tensors, each in its own memory; one storage is read at a time.

    Raises:
        ValueError: the tensors need more than twice the file's size (views of the same numbers), or it is damaged.
    """
    total, size = sum(t.num_elements * t.dtype.itemsize for t in stored.values()), path.stat().st_size
    if total > 2 * size:  # twice, because input and output embeddings may share their numbers
        raise ValueError(
            f"{path} has {size} bytes and tensors of {total} bytes, which are views of the same numbers; "
            "save it with contiguous tensors of their own"
        )
    users: dict[tuple[str, torch.dtype], list[str]] = {}
    for name, tensor in stored.items():
        users.setdefault((tensor.entry, tensor.dtype), []).append(name)
    loaded: dict[str, Tensor] = {}
    try:
        with _BoundedFile(path) as file, zipfile.ZipFile(file) as archive:
            for (entry, dtype), names in users.items():
                numbers = _read_storage(archive, entry, dtype)
                for name in names:
                    tensor = stored[name]
                    view = numbers.as_strided(tensor.shape, tensor.stride, tensor.offset)
                    whole = len(names) == 1 and view.numel() == numbers.numel()
                    loaded[name] = view.contiguous() if whole else view.clone(memory_format=torch.contiguous_format)
    except _DAMAGED as error:
        raise ValueError(f"{path} is damaged ({shown(str(error), 100)}); copy or save it again") from None
    return {name: loaded[name] for name in stored}


def _read_storage(archive: zipfile.ZipFile, entry: str, dtype: torch.dtype) -> Tensor:
    """A storage's numbers, [n], read in pieces, so that they are never in memory twice."""
    raw = bytearray(archive.getinfo(entry).file_size)
    if not raw:
        return torch.empty(0, dtype=dtype)
    filled = 0
    with archive.open(entry) as source:
        while piece := source.read(min(_MAX_READ, len(raw) - filled)):
            raw[filled : filled + len(piece)] = piece
            filled += len(piece)
    if filled < len(raw):
        raise EOFError(f"{entry} is cut short")
    return torch.frombuffer(raw, dtype=dtype)


def _checked_sizes(archive: zipfile.ZipFile, file_size: int) -> dict[str, int]:
    """Entry -> bytes. Entries must not be compressed, so all of them together are at most as large as the file."""
    sizes: dict[str, int] = {}
    for entry in archive.infolist():
        check_name(entry.filename)
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise ValueError("its entries are compressed or encrypted, which torch.save never does")
        if entry.filename in sizes:
            raise ValueError(f"it holds {shown(entry.filename)} twice")
        sizes[entry.filename] = entry.file_size
    if sum(sizes.values()) > file_size:
        raise ValueError(f"its entries claim {sum(sizes.values())} bytes, and it has {file_size}")
    return sizes


class _Machine:
    """The part of Python's pickle machine that state dicts need: a stack with marks, and a memo of values."""

    def __init__(self, folder: str, sizes: Mapping[str, int]) -> None:
        self.folder, self.sizes = folder, sizes
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        for step, (instruction, argument, _) in enumerate(pickletools.genops(program)):
            if step >= _MAX_STEPS:
                raise ValueError(f"its data.pkl has more than {_MAX_STEPS} instructions")
            if instruction.name in _PUSHED:
                self.stack.append(argument)
            elif instruction.name == "STOP":
                return self.stack.pop()
            elif instruction.name not in _INSTRUCTIONS:
                raise _Refused(f"instruction {instruction.name}")
            else:
                _INSTRUCTIONS[instruction.name](self, argument)
        raise EOFError("its data.pkl has no end")

    def pop(self, count: int) -> list[Any]:
        """Take the last `count` values off the stack."""
        if count > len(self.stack):
            raise IndexError("an instruction takes more values than there are")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def pop_to_mark(self) -> list[Any]:
        return self.pop(len(self.stack) - self.marks.pop())

    def set_items(self, flat: list[Any]) -> None:
        """Put keys and values into the last dict. Keys must be strings or numbers: hashing others may never end."""
        target = self.stack[-1]
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            if not isinstance(target, dict) or not isinstance(key, str | int):
                raise _Refused(f"a key of type {type(key).__name__}")
            target[key] = value

    def extend(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("values are appended to something that is not a list")
        self.stack[-1].extend(values)

    def call(self) -> None:
        """Compute the result of a function that state dicts call, without calling it."""
        function, arguments = self.pop(2)
        if function == _Global("collections", "OrderedDict") and arguments == ():
            self.stack.append({})
        elif function == _Global("torch._utils", "_rebuild_tensor_v2"):
            self.stack.append(self.tensor(*arguments[:4]))
        elif function == _Global("torch._utils", "_rebuild_parameter"):
            self.stack.append(arguments[0])
        else:
            raise _Refused(".".join(function) if isinstance(function, _Global) else "a call")

    def storage(self, described: Any) -> _Storage:
        """A storage from its persistent id: ("storage", type, key, device, number of elements)."""
        kind, storage_type, key, _, size = described
        if not isinstance(key, str) or type(size) is not int:
            raise ValueError(f"a storage claims numbers of type {type(size).__name__}, under a {type(key).__name__}")
        dtype = _STORAGES.get(storage_type.name) if storage_type.module == "torch" else None
        if kind != "storage" or dtype is None:
            raise _Refused(f"a storage of type {storage_type.name}")
        entry = f"{self.folder}data/{key}"
        if self.sizes[entry] != size * dtype.itemsize:
            raise ValueError(f"a storage claims {size} numbers, and has {self.sizes[entry]} bytes")
        return _Storage(entry, dtype, size)

    def tensor(self, storage: Any, offset: Any, shape: Any, stride: Any) -> StoredTensor:
        """As `torch._utils._rebuild_tensor_v2`: a view of a storage, which must lie inside the storage."""
        numbers = (offset, *shape, *stride)
        if not isinstance(storage, _Storage) or len(shape) != len(stride) or len(shape) > 8:
            raise ValueError("a tensor without a storage, or of unequal shape and stride")
        if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise ValueError("a tensor with a shape or stride that is not whole numbers")
        elements = math.prod(shape)
        last = offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True)) if elements else 0
        # A stride of 0 repeats a number, so that there are more elements than stored numbers; saved weights never do.
        if elements > storage.size or last >= max(storage.size, 1):
            raise ValueError(f"a tensor of shape {shown(shape)} over a storage of {storage.size} numbers")
        return StoredTensor(storage.entry, storage.dtype, offset, tuple(shape), tuple(stride))


_PUSHED = {
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
}  # fmt: skip
_INSTRUCTIONS: dict[str, Callable[[_Machine, Any], object]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "NONE": lambda machine, _: machine.stack.append(None),
    "NEWTRUE": lambda machine, _: machine.stack.append(True),
    "NEWFALSE": lambda machine, _: machine.stack.append(False),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_TUPLE": lambda machine, _: machine.stack.append(()),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "TUPLE1": lambda machine, _: machine.stack.append(tuple(machine.pop(1))),
    "TUPLE2": lambda machine, _: machine.stack.append(tuple(machine.pop(2))),
    "TUPLE3": lambda machine, _: machine.stack.append(tuple(machine.pop(3))),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.pop_to_mark())),
    "SETITEM": lambda machine, _: machine.set_items(machine.pop(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    "APPEND": lambda machine, _: machine.extend(machine.pop(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.pop_to_mark()),
    "BINPUT": lambda machine, place: machine.memo.__setitem__(place, machine.stack[-1]),
    "LONG_BINPUT": lambda machine, place: machine.memo.__setitem__(place, machine.stack[-1]),
    "MEMOIZE": lambda machine, _: machine.memo.__setitem__(len(machine.memo), machine.stack[-1]),
    "BINGET": lambda machine, place: machine.stack.append(machine.memo[place]),
    "LONG_BINGET": lambda machine, place: machine.stack.append(machine.memo[place]),
    "GLOBAL": lambda machine, name: machine.stack.append(_Global(*name.split(" "))),
    "STACK_GLOBAL": lambda machine, _: machine.stack.append(_Global(*machine.pop(2))),
    "BINPERSID": lambda machine, _: machine.stack.append(machine.storage(machine.pop(1)[0])),
    "REDUCE": lambda machine, _: machine.call(),
    # Sets the `_metadata` of a state dict, which is not needed here.
    "BUILD": lambda machine, _: machine.pop(1),
}
