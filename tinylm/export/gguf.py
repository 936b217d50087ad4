"""Export to GGUF, the file format of llama.cpp and Ollama: a model, or an adapter for one.

Shapes: H heads, D head dim, C width, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from io import BufferedWriter
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.gguf_writer import WriterState
from torch import Tensor

from tinylm.export.gguf_metadata import (
    add_general,
    add_shape,
    add_tokenizer,
    architecture_of,
    rope_factors,
)
from tinylm.export.tokenizer_check import check_gguf
from tinylm.files.atomic import atomic_write, require_room
from tinylm.model.config import TinyLMConfig
from tinylm.model.lora import TABLE_NAMES, LoRAEmbedding, has_lora, lora_layers
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.model.weights import base_state, is_tied
from tinylm.tokenizer.tokenizer import Tokenizer

DTYPES = {"f32": Kind.F32, "f16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0, "q4_0": Kind.Q4_0}
_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
_LARGEST = {Kind.F16: 65504.0, Kind.Q8_0: 127 * 65504.0, Kind.Q4_0: 8 * 65504.0}
"""The largest number of each type: blocks of 32 share a scale in half precision."""
_EMBEDDINGS = ("token_embd.weight", "output.weight")


@dataclass
class Written:
    """What was written, for the command to say."""

    num_bytes: int = 0
    tensors: dict[str, int] = field(default_factory=dict)
    """Type of numbers -> how many tensors have it."""
    kept: int = 0
    """Matrices whose rows or values do not fit the type that was asked for; they are in a wider one."""
    unused: int = 0
    """Entries of the embedding that have no token."""


@dataclass(frozen=True)
class _Planned:
    name: str
    kind: Kind
    shape: tuple[int, ...]
    values: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape)) // block * size


def export_gguf(
    model: TinyLMForCausalLM,
    tokenizer: Tokenizer,
    lineage: dict[str, Any],
    path: str | Path,
    dtype: str = "f16",
    name: str = "",
    license_name: str = "",
) -> Written:
    """Write a model with its tokenizer and chat template, completely or not at all.

    Norms and biases stay float32. With `q4_0`, the embedding and the output projection are `q8_0`: they lose most.

    Args:
        dtype: one of `DTYPES`.
        name, license_name: for the file's metadata; the licence as an SPDX identifier, empty if it is not known.

    Raises:
        ValueError: llama.cpp cannot express the model, a weight is not finite, the disk has too little room, or the
            file gives a text other tokens than the tokenizer.
    """
    if has_lora(model):
        raise ValueError("the model has adapters attached; merge_lora, or export them with export_gguf_adapter")
    architecture = architecture_of(model.config)
    writer = gguf.GGUFWriter(None, architecture)
    add_general(writer, "model", lineage, name or Path(path).stem, license_name)
    writer.add_size_label(f"{model.config.num_parameters() / 1e6:.3g}M")
    add_shape(writer, model.config)
    written = Written(unused=add_tokenizer(writer, model.config, tokenizer, lineage))
    writer.add_file_type(_FILE_TYPES[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    names = _names(architecture, model.config)
    planned = []
    for ours, tensor in base_state(model).items():
        planned.append(_plan(names(ours), partial(_in_llama_order, ours, tensor, model.config), dtype, written))
    if (factors := rope_factors(model.config)) is not None:
        planned.append(_plan("rope_freqs.weight", lambda: factors, "f32", written))
    return _write(writer, Path(path), planned, written, partial(check_gguf, tokenizer))


def export_gguf_adapter(
    model: TinyLMForCausalLM,
    lineage: dict[str, Any],
    path: str | Path,
    dtype: str = "f16",
    name: str = "",
    license_name: str = "",
) -> Written:
    """Write the adapters of a model as a llama.cpp LoRA, for `--lora` beside the base model's own GGUF.

    Raises:
        ValueError: as for `export_gguf`; or a quantised `dtype`, adapters that differ in their scale, or one on tied
            embeddings.
    """
    layers = lora_layers(model)
    if dtype not in ("f32", "f16", "bf16"):
        raise ValueError(f"dtype is {dtype}; an adapter's rows are too short for blocks of 32; choose f32, f16 or bf16")
    alphas = {layer.scaling * layer.rank for layer in layers.values()}
    if len(alphas) != 1:
        raise ValueError(f"the adapters have {len(alphas)} values of alpha; a GGUF adapter has one for all")
    if is_tied(model) and (tables := [name for name in TABLE_NAMES if name in layers]):
        raise ValueError(
            f"the adapter changes {' and '.join(tables)}, of a model with tied embeddings, and llama.cpp cannot put an "
            "adapter on a table that two layers share; fold it into its model with --merge"
        )
    architecture = architecture_of(model.config)
    writer = gguf.GGUFWriter(None, architecture)
    add_general(writer, "adapter", lineage, name or Path(path).stem, license_name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alphas.pop())
    writer.add_file_type(_FILE_TYPES[dtype])
    names, written, planned = _names(architecture, model.config), Written(), []
    for layer_name, layer in layers.items():
        ours = f"{layer_name}.weight"
        down, up = layer.adapter().values()
        if isinstance(layer, LoRAEmbedding):
            down = down.T  # llama.cpp looks up its rows
        turned = partial(_in_llama_order, ours, up, model.config)
        planned.append(_plan(f"{names(ours)}.lora_a", partial(Tensor.detach, down), dtype, written))
        planned.append(_plan(f"{names(ours)}.lora_b", turned, dtype, written))
    return _write(writer, Path(path), planned, written)


def _names(architecture: str, config: TinyLMConfig) -> Callable[[str], str]:
    """From our name of a tensor to llama.cpp's: `model.layers.0.self_attn.q_proj.weight` is `blk.0.attn_q.weight`."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)

    def name_of(ours: str) -> str:
        name = table.get_name(ours, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(f"{ours} has no name in llama.cpp's {architecture}, so the model cannot be a GGUF")
        return name

    return name_of


def _in_llama_order(name: str, tensor: Tensor, config: TinyLMConfig) -> Tensor:
    """[H*D, ...] of queries or keys with the rows of each head as llama.cpp's `llama` turns them; else the tensor.

    It turns neighbouring numbers of a head, where we turn halves: (0, 1, ..., D-1) becomes (0, D/2, 1, D/2+1, ...).
    Its `qwen3` turns halves too.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if config.qk_norm or heads is None:
        return tensor
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _plan(name: str, values: Callable[[], Tensor], dtype: str, written: Written) -> _Planned:
    """Choose the type of numbers of one tensor, and count it."""
    tensor = values().detach()
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    if not np.isfinite(largest):
        raise ValueError(f"{name} holds NaN or infinite numbers; the model is broken: export an earlier one")
    wanted = DTYPES[dtype] if tensor.ndim > 1 else Kind.F32
    if wanted is Kind.Q4_0 and name in _EMBEDDINGS:
        wanted = Kind.Q8_0
    fitting = [kind for kind in (wanted, Kind.F16, Kind.F32) if _fits(kind, tensor.shape[-1], largest)]
    written.kept += fitting[0] is not wanted
    label = fitting[0].name.lower()
    written.tensors[label] = written.tensors.get(label, 0) + 1
    return _Planned(name, fitting[0], tuple(tensor.shape), values)


def _fits(kind: Kind, row_length: int, largest: float) -> bool:
    return row_length % gguf.GGML_QUANT_SIZES[kind][0] == 0 and largest <= _LARGEST.get(kind, np.inf)


def _write(
    writer: gguf.GGUFWriter,
    path: Path,
    planned: Iterable[_Planned],
    written: Written,
    check: Callable[[Path], None] = lambda path: None,
) -> Written:
    """The file, tensor by tensor, so that memory holds one converted tensor at a time.

    Args:
        check: raises an error if the complete file, which does not have its name yet, is not to have it.
    """
    planned = list(planned)
    for tensor in planned:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, tensor.kind)
    require_room(path, sum(tensor.num_bytes for tensor in planned))
    with atomic_write(path) as file:
        # The writer opens a path by itself; this is the file that gets its name only when it is complete.
        writer.fout, writer.state = [cast(BufferedWriter, file)], WriterState.EMPTY
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.write_padding(file, file.tell())
        for tensor in planned:
            values = tensor.values().detach().to("cpu", torch.float32).contiguous().numpy()
            file.write(np.ascontiguousarray(gguf.quants.quantize(values, tensor.kind)).data)
            writer.write_padding(file, tensor.num_bytes)
        written.num_bytes = file.tell()
        file.flush()
        check(Path(file.name))
    return written
