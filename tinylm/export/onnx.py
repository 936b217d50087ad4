"""Export to ONNX: one graph that reads a prompt and, with the keys and values it gives back, one token after another.

The inputs and outputs have the names that transformers.js and Optimum expect. All operations are of opset 18, which
every ONNX runtime since 2023 knows.

Shapes: B batch, T new tokens, P past tokens, S = P + T, C width, H query heads, K key/value heads, G = H / K, D head
dim, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from tinylm.files.atomic import atomic_write, require_room
from tinylm.model.config import TinyLMConfig
from tinylm.model.hf_config import require_llama_shape
from tinylm.model.lora import has_lora
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.model.positions import rope_frequencies
from tinylm.model.weights import base_state

OPSET, IR_VERSION = 18, 8
LARGEST = 2**31 - 2**20
"""Bytes of weights: a protobuf file ends at 2 GiB, of which names and operations need less than 1 MiB."""


def export_onnx(model: TinyLMForCausalLM, path: str | Path) -> int:
    """Write a model in float32, completely or not at all; returns the bytes written.

    Raises:
        ValueError: adapters are not merged, the positions are not rotary, it is too large for one file, or the disk
            has too little room.
    """
    if has_lora(model):
        raise ValueError("the model has adapters attached; merge_lora before exporting to ONNX")
    require_llama_shape(model.config)
    num_bytes = 4 * model.config.num_parameters()
    if num_bytes > LARGEST:
        raise ValueError(
            f"the model has {num_bytes / 1e9:.1f} GB of weights and one ONNX file holds 2.1 GB at most; use --format "
            "gguf or hf"
        )
    require_room(Path(path), num_bytes)
    content = _Graph(model.config, base_state(model)).finished().SerializeToString()
    with atomic_write(path) as file:
        file.write(content)
    return len(content)


class _Graph:
    """The operations of a model, in their order, and its weights."""

    def __init__(self, config: TinyLMConfig, weights: dict[str, Tensor]) -> None:
        self.config, self.weights = config, weights
        self.nodes: list[onnx.NodeProto] = []
        self.stored: dict[str, onnx.TensorProto] = {}

    def add(self, operation: str, *inputs: str, outputs: tuple[str, ...] = (), **attributes: Any) -> Any:
        """One operation; returns the name of its output, or of its outputs if these have names."""
        names = outputs or (f"{operation}_{len(self.nodes)}",)
        self.nodes.append(helper.make_node(operation, inputs, names, **attributes))
        return names[0] if len(names) == 1 else names

    def store(self, name: str, values: Any, kind: Any = np.int64) -> str:
        """A constant: numbers, or a weight of the model."""
        if name not in self.stored:
            self.stored[name] = numpy_helper.from_array(np.ascontiguousarray(values, dtype=kind), name)
        return name

    def ints(self, *values: int) -> str:
        return self.store("ints_" + "_".join(map(str, values)), values)

    def weight(self, name: str, transposed: bool = False) -> str:
        values = self.weights[name].detach().float().cpu().numpy()
        return self.store(name, values.T if transposed else values, np.float32)

    def linear(self, x: str, name: str) -> str:
        y = self.add("MatMul", x, self.weight(f"{name}.weight", transposed=True))
        return self.add("Add", y, self.weight(f"{name}.bias")) if f"{name}.bias" in self.weights else y

    def norm(self, x: str, name: str) -> str:
        """x / sqrt(mean(x^2) + eps) * weight."""
        square = self.add("Pow", x, self.store("two", 2.0, np.float32))
        mean = self.add("ReduceMean", square, self.ints(-1), keepdims=1)
        root = self.add("Sqrt", self.add("Add", mean, self.store("eps", self.config.rms_norm_eps, np.float32)))
        return self.add("Mul", self.add("Div", x, root), self.weight(f"{name}.weight"))

    def rotation(self) -> tuple[str, str]:
        """cos and sin of every position's angles, [B, T, 1, D/2]."""
        speeds, temperature = rope_frequencies(self.config)
        positions = self.add("Unsqueeze", self.add("Cast", "position_ids", to=TensorProto.FLOAT), self.ints(2, 3))
        angles = self.add("Mul", positions, self.store("speeds", speeds.numpy(), np.float32))
        scale = self.store("temperature", temperature, np.float32)
        return self.add("Mul", self.add("Cos", angles), scale), self.add("Mul", self.add("Sin", angles), scale)

    def mask(self) -> str:
        """[B, 1, 1, T, S]: 0 where a query may look, else the lowest number: ahead of itself, and where padding is."""
        size = self.add("Gather", self.add("Shape", "attention_mask"), self.store("one", 1), axis=0)
        time = self.add("Gather", self.add("Shape", "input_ids"), self.store("one", 1), axis=0)
        zero, one = self.store("zero", 0), self.store("one", 1)
        queries = self.add("Unsqueeze", self.add("Range", self.add("Sub", size, time), size, one), self.ints(1))
        is_past = self.add("LessOrEqual", self.add("Range", zero, size, one), queries)  # [T, S]
        is_text = self.add("Cast", "attention_mask", to=TensorProto.BOOL)
        visible = self.add("And", is_past, self.add("Unsqueeze", is_text, self.ints(1, 2, 3)))
        numbers = self.store("seen", 0.0, np.float32), self.store("unseen", np.finfo(np.float32).min, np.float32)
        return self.add("Where", visible, *numbers)

    def heads(self, x: str, name: str, num_heads: int, rotation: tuple[str, str] | None) -> str:
        """A projection as [B, T, heads, D]; queries and keys are normalised if the model does so, and turned."""
        x = self.add("Reshape", self.linear(x, f"{name}_proj"), self.ints(0, 0, num_heads, self.config.head_width))
        if rotation is None:
            return x
        if self.config.qk_norm:
            x = self.norm(x, f"{name}_norm")
        (cos, sin), half = rotation, f"{name}_half"
        a, b = self.add("Split", x, outputs=(f"{half}_1", f"{half}_2"), axis=-1, num_outputs=2)
        first = self.add("Sub", self.add("Mul", a, cos), self.add("Mul", b, sin))
        second = self.add("Add", self.add("Mul", b, cos), self.add("Mul", a, sin))
        return self.add("Concat", first, second, axis=-1)

    def attention(self, x: str, layer: int, rotation: tuple[str, str], mask: str) -> str:
        """The G queries that share a key/value head are a dimension of their own: no key or value is copied."""
        config, name = self.config, f"model.layers.{layer}.self_attn"
        groups, keys = config.num_attention_heads // config.num_key_value_heads, config.num_key_value_heads
        q = self.heads(x, f"{name}.q", config.num_attention_heads, rotation)
        q = self.add("Reshape", q, self.ints(0, 0, keys, groups, config.head_width))
        q = self.add("Transpose", q, perm=[0, 2, 3, 1, 4])  # [B, K, G, T, D]
        present = []
        for part in ("key", "value"):
            new = self.heads(x, f"{name}.{part[0]}", keys, rotation if part == "key" else None)
            new = self.add("Transpose", new, perm=[0, 2, 1, 3])  # [B, K, T, D]
            past, output = f"past_key_values.{layer}.{part}", (f"present.{layer}.{part}",)
            both = self.add("Concat", past, new, outputs=output, axis=2)
            present.append(self.add("Unsqueeze", both, self.ints(2)))  # [B, K, 1, S, D]
        q = self.add("Mul", q, self.store("scale", config.head_width**-0.5, np.float32))
        scores = self.add("MatMul", q, self.add("Transpose", present[0], perm=[0, 1, 2, 4, 3]))
        weights = self.add("Softmax", self.add("Add", scores, mask), axis=-1)
        out = self.add("Transpose", self.add("MatMul", weights, present[1]), perm=[0, 3, 1, 2, 4])
        return self.linear(self.add("Reshape", out, self.ints(0, 0, -1)), f"{name}.o_proj")

    def mlp(self, x: str, layer: int) -> str:
        """down(silu(gate(x)) * up(x))."""
        name = f"model.layers.{layer}.mlp"
        gate = self.linear(x, f"{name}.gate_proj")
        gate = self.add("Mul", gate, self.add("Sigmoid", gate))
        return self.linear(self.add("Mul", gate, self.linear(x, f"{name}.up_proj")), f"{name}.down_proj")

    def finished(self) -> onnx.ModelProto:
        """The whole model."""
        config, table = self.config, "model.embed_tokens.weight"
        x = self.add("Gather", self.weight(table), "input_ids", axis=0)
        rotation, mask = self.rotation(), self.mask()
        for layer in range(config.num_hidden_layers):
            name = f"model.layers.{layer}"
            x = self.add("Add", x, self.attention(self.norm(x, f"{name}.input_layernorm"), layer, rotation, mask))
            x = self.add("Add", x, self.mlp(self.norm(x, f"{name}.post_attention_layernorm"), layer))
        head = self.weight(table if config.tie_word_embeddings else "lm_head.weight")
        head = self.add("Transpose", head, perm=[1, 0])  # stored once if it is tied
        self.add("MatMul", self.norm(x, "model.norm"), head, outputs=("logits",))
        past, present = self.caches("past_key_values", "past_sequence_length"), self.caches("present", "total_length")
        rows = ["batch_size", "sequence_length"]
        inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, rows),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch_size", "total_length"]),
            helper.make_tensor_value_info("position_ids", TensorProto.INT64, rows),
        ]
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [*rows, config.vocab_size])
        graph = helper.make_graph(self.nodes, "tinylm", inputs + past, [logits, *present], list(self.stored.values()))
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, producer_name="tinylm", opset_imports=opsets, ir_version=IR_VERSION)

    def caches(self, name: str, length: str) -> list[onnx.ValueInfoProto]:
        """Keys and values of every layer, [B, K, length, D]."""
        shape: list[str | int | None] = ["batch_size", self.config.num_key_value_heads, length, self.config.head_width]
        names = [f"{name}.{n}.{part}" for n in range(self.config.num_hidden_layers) for part in ("key", "value")]
        return [helper.make_tensor_value_info(each, TensorProto.FLOAT, shape) for each in names]
