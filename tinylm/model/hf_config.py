"""`config.json` in Hugging Face's words: a `TinyLMConfig` as Llama's, Mistral's, Qwen2's or Qwen3's, and back."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from tinylm.files.untrusted import shown
from tinylm.model.config import TinyLMConfig, is_number

_TINYLM_ONLY = ("position_embedding_type", "qk_norm", "qkv_bias")
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "tinylm": "TinyLMForCausalLM",
}
"""The class that each `model_type` has, of those that can be read."""

# What transformers assumes when a key is absent, which is not always what we default to.
_ALL_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "num_attention_heads": 32}
_QWEN_DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "intermediate_size": 22016}
_HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "intermediate_size": 11008, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "intermediate_size": 14336,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN_DEFAULTS,
    "qwen3": {**_QWEN_DEFAULTS, "head_dim": 128},
    "tinylm": {"max_position_embeddings": 2048, "intermediate_size": 11008},
}
_FIXED: dict[str, dict[str, bool]] = {
    "llama": {"qk_norm": False, "qkv_bias": False},
    "mistral": {"qk_norm": False, "qkv_bias": False, "attention_bias": False, "mlp_bias": False},
    "qwen2": {"qk_norm": False, "qkv_bias": True, "attention_bias": False, "mlp_bias": False},
    "qwen3": {"qk_norm": True, "qkv_bias": False, "mlp_bias": False},
    "tinylm": {},
}
"""What the architecture decides, whatever its config.json says."""

_NULL_IS_A_VALUE = ("num_key_value_heads", "sliding_window", "bos_token_id", "eos_token_id", "pad_token_id")
"""Null means something there; in other fields it means that the field is absent."""

_READ_OR_HARMLESS = {
    *(field.name for field in fields(TinyLMConfig)),
    *("model_type", "architectures", "hidden_act", "dtype", "torch_dtype", "transformers_version", "_name_or_path"),
    *("use_cache", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings", "layer_types"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "quantization_config", "pretraining_tp"),
    *("auto_map", "attn_implementation", "_attn_implementation", "is_llama_config", "rope_interleaved"),
}


def require_llama_shape(config: TinyLMConfig) -> None:
    """Raise ValueError, with the reason, if no Llama, Mistral, Qwen2 or Qwen3 loader could run this model."""
    if config.position_embedding_type != "rope":
        raise ValueError(
            f"position_embedding_type {config.position_embedding_type!r} has no equivalent in Llama or "
            "Qwen3; "
            "only models with rotary positions can be exported: train one with "
            "position_embedding_type=rope"
        )
    if config.qk_norm and config.mlp_bias:
        raise ValueError("qk_norm with mlp_bias exists in neither Llama nor Qwen3; export needs one of them off")
    if config.qkv_bias and (config.qk_norm or config.mlp_bias):
        other = "qk_norm" if config.qk_norm else "mlp_bias"
        raise ValueError(f"qkv_bias with {other} exists in neither Qwen2 nor Qwen3; export needs one of them off")
    if _needs_mistral(config) and (config.attention_bias or config.mlp_bias):
        raise ValueError(
            f"hidden_size {config.hidden_size} is not divisible by num_attention_heads {config.num_attention_heads}, "
            "which Llama demands of a model with biases: export needs attention_bias and mlp_bias off"
        )


def _needs_mistral(config: TinyLMConfig) -> bool:
    """Whether only Mistral's loader takes this Llama: Llama's wants a width that the heads divide."""
    return not (config.qk_norm or config.qkv_bias) and config.hidden_size % config.num_attention_heads != 0


def _model_type(config: TinyLMConfig) -> str:
    try:
        require_llama_shape(config)
    except ValueError:
        return "tinylm"
    if config.qk_norm:
        return "qwen3"
    return "qwen2" if config.qkv_bias else "mistral" if _needs_mistral(config) else "llama"


def config_to_hf(config: TinyLMConfig) -> dict[str, Any]:
    """The contents of `config.json`, readable by transformers 4 and 5 alike.

    Both spellings of the settings that were renamed are written (`rope_theta` and `rope_parameters`,
    `torch_dtype` and `dtype`). A model with no Llama equivalent writes model_type "tinylm", which no
    other loader recognises.
    """
    kind = _model_type(config)
    rope = {"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta}
    out: dict[str, Any] = {"model_type": kind, "architectures": [_ARCHITECTURES[kind]], "hidden_act": "silu"}
    out |= {key: value for key, value in asdict(config).items() if key not in _TINYLM_ONLY}
    out |= {"rope_parameters": rope, "torch_dtype": "float32", "dtype": "float32", "use_cache": True}
    if kind == "mistral":
        out["sliding_window"] = None  # else transformers assumes 4096
    if kind == "tinylm":
        out |= {name: getattr(config, name) for name in _TINYLM_ONLY}
    return out


def config_from_hf(data: dict[str, Any]) -> TinyLMConfig:
    """Read a `config.json` of either generation.

    Raises:
        ValueError: it asks for something this model does not do; the message says what.
    """
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in _ARCHITECTURES:
        expected = " or ".join((", ".join(list(_ARCHITECTURES)[:-1]), "tinylm"))
        raise ValueError(f"model_type {shown(kind)} is not supported; expected {expected}")
    given = {key: value for key, value in data.items() if value is not None or key in _NULL_IS_A_VALUE}
    data = {**_ALL_DEFAULTS, **_HF_DEFAULTS[kind], **given}
    _check_supported(kind, data)
    known = {field.name for field in fields(TinyLMConfig)}
    kept = {key: value for key, value in data.items() if key in known and value is not None} | _FIXED[kind]
    if kind != "tinylm":
        kept["position_embedding_type"] = "rope"
    if "num_key_value_heads" not in kept:
        kept["num_key_value_heads"] = data["num_attention_heads"]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = data.get(name)
        if isinstance(value, list) and value and name != "eos_token_id":
            value = value[0]
        kept[name] = _existing(value, data.get("vocab_size"))
    missing = [n for n in ("vocab_size", "hidden_size", "num_hidden_layers") if n not in kept]
    if missing:
        raise ValueError(f"{missing[0]} is missing; a {kind} config.json must state it")
    try:
        kept["rope_theta"], kept["rope_scaling"] = _rope_of(data)
        return TinyLMConfig(**kept)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"a value has the wrong type ({shown(str(error), 200)}); correct it") from None


def _existing(token_ids: Any, vocab_size: Any) -> Any:
    """The token id or ids without those that do not exist.

    Older files write -1 or the vocabulary's size for a token that does not exist; such an index would fail.
    """
    if not isinstance(vocab_size, int):
        return token_ids
    several = token_ids if isinstance(token_ids, list) else [token_ids]
    exist = (number for number in several if type(number) is not int or 0 <= number < vocab_size)
    kept = [number for number in exist if number is not None]
    return kept[0] if len(kept) == 1 and not isinstance(kept[0], list) else kept or None


def _check_supported(kind: str, data: dict[str, Any]) -> None:
    """Raise ValueError, with the field and its value, for what changes the computation and is not ours."""
    classes = data.get("architectures")
    if isinstance(classes, list) and classes:
        if not all(isinstance(name, str) and name.lower() == _ARCHITECTURES[kind].lower() for name in classes):
            raise ValueError(f"architectures {shown(classes)} is not supported; expected {_ARCHITECTURES[kind]}")
    if data.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act {shown(data['hidden_act'])} is not supported; expected silu (SwiGLU)")
    for name in ("quantization_config", "compression_config"):
        if data.get(name):
            raise ValueError(f"{name} is set; only unquantised weights can be loaded")
    if data.get("use_sliding_window"):
        raise ValueError("use_sliding_window is true; this model attends to its whole context: expected false")
    window, context = data.get("sliding_window"), data.get("max_position_embeddings")
    if (
        kind == "mistral"
        and window is not None
        and not (is_number(window) and is_number(context) and window >= context)
    ):
        raise ValueError(
            f"sliding_window {shown(window)} is not supported; expected null, or at least max_position_embeddings "
            f"{shown(context)}: this model attends to its whole context"
        )
    layers = data.get("layer_types")
    other = [layer for layer in layers if layer != "full_attention"] if isinstance(layers, list) else []
    if other or not isinstance(layers, list | None):
        raise ValueError(
            f"layer_types has {shown(other[0] if other else layers)}; expected full_attention in every layer"
        )
    if data.get("partial_rotary_factor") not in (None, 1):
        raise ValueError(f"partial_rotary_factor {shown(data['partial_rotary_factor'])} is not supported; expected 1")
    if sinks := [name for name, value in data.items() if "sink" in name and value]:
        raise ValueError(f"{shown(sinks[0])} is {shown(data[sinks[0]])}; attention sinks are not supported: expected 0")


def _rope_of(data: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(theta, settings of a longer context or None) from either generation of keys."""
    rope = dict(data.get("rope_scaling") or data.get("rope_parameters") or {})
    if nested := [name for name, value in rope.items() if isinstance(value, dict)]:
        raise ValueError(f"rope_parameters has settings for {shown(nested[0])} alone; expected one set for all layers")
    if (share := rope.pop("partial_rotary_factor", None)) not in (None, 1):
        raise ValueError(f"partial_rotary_factor {shown(share)} is not supported; expected 1")
    theta = rope.pop("rope_theta", None) or data.get("rope_theta") or 10_000.0
    kind = rope.get("rope_type", rope.get("type", "default"))
    stated = data.get("original_max_position_embeddings")  # transformers prefers it to the one in `rope_scaling`
    if stated is not None and kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = stated
    return theta, {"rope_type": kind, **rope}


def unused_fields(data: dict[str, Any]) -> list[str]:
    """The fields of a `config.json` that have no meaning for its model here, as a rule nor in transformers."""
    return sorted(name for name in data if name not in _READ_OR_HARMLESS)
