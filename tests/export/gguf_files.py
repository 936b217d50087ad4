"""GGUF files that others might write: one of ours with other keys, tensors and types of numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType as ValueType

TYPE_OF = {bool: ValueType.BOOL, int: ValueType.UINT32, float: ValueType.FLOAT32, str: ValueType.STRING}
_SCALES = {
    Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,),
}  # fmt: skip
"""Where in a block its scales in half precision are."""
Change = Callable[[str, np.ndarray], "tuple[np.ndarray, Kind] | None"]


def rewrite(
    source: Path,
    target: Path,
    values: dict[str, Any] | None = None,
    tensors: Change | None = None,
    architecture: str | None = None,
) -> Path:
    """Write `source` again with other values (None leaves a key out), tensors and architecture.

    Args:
        tensors: (name, float32 numbers) -> (raw rows, their type), or None to leave the tensor out.
    """
    reader = gguf.GGUFReader(source)
    old = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture or old)
    changes = dict(values or {})
    for name, field in reader.fields.items():
        name = name.replace(f"{old}.", f"{architecture}.", 1) if architecture and name.startswith(f"{old}.") else name
        if name.startswith("GGUF.") or (name == "general.architecture" and name not in changes):
            continue
        if name in changes:
            continue
        is_list = field.types[0] is ValueType.ARRAY
        writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if is_list else None)
    for name, value in changes.items():
        if name == "general.architecture":
            writer.kv_data[0][name].value = value
        elif isinstance(value, list):
            writer.add_key_value(name, value, ValueType.ARRAY, TYPE_OF[type(value[0])])
        elif value is not None:
            writer.add_key_value(name, value, TYPE_OF[type(value)])
    for tensor in reader.tensors:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        kept = (numbers, Kind.F32) if tensors is None else tensors(tensor.name, numbers)
        if kept is not None:
            raw, kind = kept
            writer.add_tensor(tensor.name, np.ascontiguousarray(raw), raw_dtype=None if kind is Kind.F32 else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def quantised(kind: Kind) -> Change:
    """Matrices in this type of numbers; those that the package cannot write have random bits and a small scale."""
    rng = np.random.default_rng(0)

    def change(name: str, numbers: np.ndarray) -> tuple[np.ndarray, Kind]:
        if numbers.ndim == 1:
            return numbers, Kind.F32
        if kind not in _SCALES:
            return gguf.quants.quantize(numbers, kind), kind
        block, num_bytes = gguf.GGML_QUANT_SIZES[kind]
        scale = {Kind.Q5_K: 3e-4, Kind.Q6_K: 5e-5}.get(kind, 1e-3)
        raw = rng.integers(0, 256, (len(numbers), numbers.shape[1] // block, num_bytes), dtype=np.uint8)
        for place in _SCALES[kind]:
            raw[..., place : place + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
        return raw.reshape(len(numbers), -1), kind

    return change
