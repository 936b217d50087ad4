"""A model from a GGUF of others: llama.cpp's settings and tensors under our names.

Every setting that changes what the model computes is used, or refused by its key.

Shapes: H heads, D head dim, C width.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinylm.checkpoint.gguf_file import GGUFContents, StoredTensor, read_gguf, read_gguf_tensor
from tinylm.files.untrusted import shown
from tinylm.model.config import TinyLMConfig, is_number
from tinylm.model.positions import rope_frequencies
from tinylm.tokenizer.llama_cpp_tokenizer import tokenizer_from_gguf
from tinylm.tokenizer.tokenizer import Tokenizer

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_ROPE_FACTORS = "rope_freqs.weight"
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output": "lm_head",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NOT_LINEAGE = ("general.alignment", "general.quantization_version")
_TENSOR = re.compile(r"(?:blk\.([0-9]{1,6})\.)?([a-z_]+)\.(weight|bias)")
_BIASES = {
    "attention_bias": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    "qkv_bias": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp_bias": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}
_CHANGES_NOTHING: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attention.sliding_window": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_shared_count": (0,),
    "expert_used_count": (0,),
    "logit_scale": (0, 1),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    "rope.scaling.finetuned": (True, False),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_beta_fast": (32,),
    "rope.scaling.yarn_beta_slow": (1,),
    "rope.scaling.yarn_ext_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "tensor_data_layout": ("Meta AI original pth",),
    "use_parallel_residual": (False,),
}
"""Keys after the architecture's name -> their values that mean this model's computation."""


@dataclass(frozen=True)
class GGUFModel:
    """What a GGUF says about its model, before its numbers are read."""

    path: Path
    contents: GGUFContents
    config: TinyLMConfig
    tensors: dict[str, tuple[str, StoredTensor]]
    """Our name of each tensor -> its name in the file, and its place."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: stored.shape for name, (_, stored) in self.tensors.items()}

    def read(self) -> dict[str, Tensor]:
        """All weights in float32, under our names and in our order.

        Raises:
            ValueError: some are NaN or infinite.
        """
        is_permuted = self.contents.values["general.architecture"] == "llama"
        weights = {}
        for name, (theirs, stored) in self.tensors.items():
            try:
                tensor = read_gguf_tensor(self.path, theirs, stored)
            except ValueError as error:
                raise ValueError(f"{self.path}: {error}") from None
            weights[name] = _in_our_order(name, tensor, self.config) if is_permuted else tensor
        return weights

    def tokenizer(self) -> Tokenizer:
        """The tokenizer in the file.

        Raises:
            ValueError: it is of a kind that is not known here, or does not have a token for each row of the embedding.
        """
        try:
            tokenizer = tokenizer_from_gguf(self.contents.values)
            if (found := len(self.contents.values["tokenizer.ggml.tokens"])) != self.config.vocab_size:
                raise ValueError(
                    f"tokenizer.ggml.tokens has {found} items; token_embd.weight has {self.config.vocab_size} rows: "
                    "check that both come from the same model"
                )
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        return tokenizer

    @property
    def unused(self) -> list[str]:
        """Keys that say nothing about the model and its tokenizer, or that have no meaning here."""
        known = ("general.", f"{self.contents.values['general.architecture']}.", "tokenizer.ggml.", "split.", "tinylm.")
        return [key for key in self.contents.values if not key.startswith(known) and key != "tokenizer.chat_template"]

    def lineage(self) -> dict[str, Any]:
        """Where the model comes from: the file's name, and what it says about its maker or our own run."""
        values = self.contents.values
        own = {key.removeprefix("tinylm."): value for key, value in values.items() if key.startswith("tinylm.")}
        general = {
            key: value
            for key, value in values.items()
            if key.startswith("general.") and isinstance(value, str | int) and key not in _NOT_LINEAGE
        }
        return {"stage": "imported", **own, "licence": values.get("general.license"), "gguf": general}


def open_gguf(path: Path) -> GGUFModel:
    """Read the header of a model's GGUF, and check that its settings are those of a Llama, Qwen2 or Qwen3.

    Raises:
        FileNotFoundError, ValueError: the message says what is not supported or damaged, and names the file.
    """
    try:
        contents = read_gguf(path)
        _check_kind(contents.values)
        tensors = {}
        for theirs, stored in contents.tensors.items():
            if theirs != _ROPE_FACTORS:
                tensors[_our_name(theirs)] = theirs, stored
        config = _config(path, contents, {name: stored.shape for name, (_, stored) in tensors.items()})
        return GGUFModel(path, contents, config, tensors)
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def _check_kind(values: dict[str, Any]) -> None:
    architecture = values.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise ValueError(
            f"general.architecture is {shown(architecture)}; expected {', '.join(_ARCHITECTURES)}: the others compute "
            "something else"
        )
    if values.get("general.type", "model") != "model":
        raise ValueError(f"general.type is {shown(values['general.type'])}; expected a model: give its base model")
    if values.get("split.count", 1) not in (0, 1):
        raise ValueError(
            f"split.count is {shown(values['split.count'])}; expected a GGUF of one file: join the parts with "
            "llama-gguf-split --merge"
        )
    if values.get("general.quantization_version", 2) != 2:
        raise ValueError(
            f"general.quantization_version is {shown(values['general.quantization_version'])}; expected 2: take a "
            "newer file of this model"
        )


def _our_name(theirs: str) -> str:
    found = _TENSOR.fullmatch(theirs)
    name = _NAMES.get(found[2]) if found else None
    is_outside = name is not None and (name == "lm_head" or name.startswith("model."))
    if found is None or name is None or is_outside != (found[1] is None):
        raise ValueError(f"the tensor {shown(theirs)} has no place in a Llama, Qwen2 or Qwen3; give one of their files")
    return f"{name}.{found[3]}" if is_outside else f"model.layers.{int(found[1])}.{name}.{found[3]}"


class _Settings:
    """The values under the architecture's name; `unused` are those that nobody asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        prefix = f"{values['general.architecture']}."
        self.prefix = prefix
        self.unused = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number from 1; a list of equal ones, one for each layer, is that number."""
        value = self.unused.pop(name, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if type(value) is not int or value < 1:
            raise ValueError(f"{self.prefix}{name} is {shown(value)}; expected a whole number of at least 1")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.unused.pop(name, default)
        if not is_number(value):
            raise ValueError(f"{self.prefix}{name} is {shown(value)}; expected a number")
        return value

    def check_unused(self, context: int) -> None:
        """Raise ValueError for a key that may change the computation."""
        for name, value in self.unused.items():
            allowed = _CHANGES_NOTHING.get(name, ())
            if name == "attention.sliding_window" and type(value) is int and value >= context:
                continue
            if not any(type(value) in (type(item), float) and value == item for item in allowed):
                expected = f"expected {' or '.join(map(str, allowed))}" if allowed else "expected a file without it"
                raise ValueError(
                    f"{self.prefix}{name} is {shown(value)}, which may change what the model computes; {expected}"
                )


def _config(path: Path, contents: GGUFContents, shapes: dict[str, tuple[int, ...]]) -> TinyLMConfig:
    settings = _Settings(contents.values)
    width, heads = settings.whole("embedding_length"), settings.whole("attention.head_count")
    head_dim = settings.whole("attention.key_length", width // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if (other := settings.whole(name, head_dim)) != head_dim:
            raise ValueError(f"{settings.prefix}{name} is {other}; expected {head_dim}, the width of a head")
    if (embedding := shapes.get("model.embed_tokens.weight")) is None:
        raise ValueError("the tensor token_embd.weight is missing; the file holds no whole model: give another one")
    if (stated := settings.whole("vocab_size", embedding[0])) != embedding[0]:
        raise ValueError(f"{settings.prefix}vocab_size is {stated}; token_embd.weight has {embedding[0]} rows: "
                         "check that both come from the same model")  # fmt: skip
    context = settings.whole("context_length")
    fields: dict[str, Any] = {
        "vocab_size": embedding[0],
        "hidden_size": width,
        "intermediate_size": settings.whole("feed_forward_length"),
        "num_hidden_layers": settings.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": settings.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": settings.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": settings.number("rope.freq_base", 10_000.0),
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "qk_norm": settings.prefix == "qwen3.",
    }
    fields |= _token_ids(contents.values, embedding[0])
    fields |= {name: all(f"model.layers.0.{part}.bias" in shapes for part in parts) for name, parts in _BIASES.items()}
    fields["qkv_bias"] = fields["qkv_bias"] and not fields["attention_bias"]
    scaling = _rope_scaling(settings, context)
    settings.check_unused(context)
    config = TinyLMConfig(**fields, rope_scaling=scaling)
    if (stored := contents.tensors.get(_ROPE_FACTORS)) is None:
        return config
    if scaling is not None or stored.shape != (head_dim // 2,):
        what = f"rope_scaling {shown(scaling)}" if scaling else f"{list(stored.shape)} numbers"
        raise ValueError(f"{_ROPE_FACTORS} with {what} is not supported; expected [{head_dim // 2}] without scaling")
    factors = read_gguf_tensor(path, _ROPE_FACTORS, stored)
    return TinyLMConfig(**fields, rope_scaling=_scaling_from_factors(config, factors.double()))


def _token_ids(values: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """Begin, end and padding. Where an answer ends by another token than a text, both are ends."""
    ids = {}
    for name in ("bos", "eos", "eot", "eom", "padding"):
        value = values.get(f"tokenizer.ggml.{name}_token_id")
        ids[name] = value if type(value) is int and 0 <= value < vocab_size else None
    ends = [i for i in dict.fromkeys((ids["eos"], ids["eot"], ids["eom"])) if i is not None]
    eos = ends if len(ends) > 1 else ends[0] if ends else None
    return {"bos_token_id": ids["bos"], "eos_token_id": eos, "pad_token_id": ids["padding"]}


def _rope_scaling(settings: _Settings, context: int) -> dict[str, Any] | None:
    """llama.cpp's scaling of positions in Hugging Face's words.

    Its YaRN multiplies the usual temperature, 0.1 ln(factor) + 1, by `attn_factor`. A factor without a type is linear.
    """
    kind = settings.unused.pop("rope.scaling.type", "linear")
    factor = settings.number("rope.scaling.factor", settings.number("rope.scale_linear", 1.0))
    attention_factor = settings.number("rope.scaling.attn_factor", 1.0)
    original = settings.whole("rope.scaling.original_context_length", context)
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"{settings.prefix}rope.scaling.type is {shown(kind)}; expected none, linear or yarn")
    if kind == "yarn":
        scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        if abs(attention_factor - 1) > 1e-6:
            scaling["attention_factor"] = attention_factor * (0.1 * math.log(max(factor, 1e-9)) + 1)
        return scaling
    if attention_factor != 1:
        raise ValueError(
            f"{settings.prefix}rope.scaling.attn_factor is {attention_factor:g} with the scaling {kind}; expected 1: "
            "only YaRN has another one here"
        )
    return None if kind == "none" or factor in (0, 1) else {"rope_type": "linear", "factor": factor}


def _scaling_from_factors(config: TinyLMConfig, factors: Tensor) -> dict[str, Any] | None:
    """The settings of Llama 3's rule, or of linear scaling, that divide the rotation speeds by `factors`, [D/2].

    Llama 3 keeps the speed of the first pairs, divides that of the last ones by the factor s, and joins them by a line:

        1 / factors = (1 - r) / s + r,    r = (turns - low) / (high - low),    turns = original_context * theta / 2 pi

    Two numbers fix that line, so one of the three settings is free: low is 1, as in every Llama 3.

    Raises:
        ValueError: the factors are of another rule.
    """
    factor = float(factors.max())
    if float(factors.min()) <= 0 or not 1 <= factor <= 1e4:
        raise ValueError(f"{_ROPE_FACTORS} holds numbers from {float(factors.min()):g} to {factor:g}; expected from 1")
    if float(factors.min()) == factor:
        return None if factor == 1 else {"rope_type": "linear", "factor": factor}
    turns_per_position = rope_frequencies(config)[0].double() / (2 * math.pi)
    kept = (1 / factors - 1 / factor) / (1 - 1 / factor)
    ramp = (kept > 1e-4) & (kept < 1 - 1e-4)
    for scaling in _candidates(turns_per_position[ramp], kept[ramp], factor):
        stretched = TinyLMConfig(**{**vars(config), "rope_scaling": scaling})
        wanted = turns_per_position * 2 * math.pi / factors
        if torch.allclose(rope_frequencies(stretched)[0].double(), wanted, rtol=2e-6, atol=0):
            return scaling
    raise ValueError(
        f"{_ROPE_FACTORS} holds {shown([round(item, 4) for item in factors.tolist()], 100)}, which neither Llama 3's "
        "rule nor linear scaling gives; these positions are not supported"
    )


def _candidates(turns: Tensor, kept: Tensor, factor: float) -> list[dict[str, Any]]:
    """Settings of Llama 3's rule for the points of its line; one point alone leaves high free too: 4, as in Llama 3.

    The settings are round numbers, which the rounding of the factors blurs, so the rounded ones come first.
    """
    if len(turns) > 1:
        slope = float((kept[0] - kept[-1]) / (turns[0] - turns[-1]))
        start = float(kept[0]) - slope * float(turns[0])
        if not slope > 0 > start:
            return []
        high = 1 - 1 / start
        original = slope * (high - 1)
    elif len(turns) == 1:
        high = 4.0
        original = float((kept[0] * 3 + 1) / turns[0])
    else:
        return []
    rule: Any = partial(dict, rope_type="llama3", factor=factor, low_freq_factor=1.0)
    return [
        rule(high_freq_factor=round(high, digits), original_max_position_embeddings=context)
        for digits, context in ((1, round(original)), (3, round(original)), (6, original))
    ]


def _in_our_order(name: str, tensor: Tensor, config: TinyLMConfig) -> Tensor:
    """[H*D, ...] of queries or keys, from the order of rows in which llama.cpp's `llama` turns them; else the tensor.

    It turns neighbouring numbers of a head, where we turn halves: (0, D/2, 1, D/2+1, ...) becomes (0, 1, ..., D-1).
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    return tensor if heads is None else tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
