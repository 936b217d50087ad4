"""`config.json` in Hugging Face's words: a `TinyLMConfig` as Llama's or Qwen3's, and back."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from tinylm.files.untrusted import shown
from tinylm.model.config import TinyLMConfig

_TINYLM_ONLY = ("position_embedding_type", "qk_norm")
_HF_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "intermediate_size": 11008,
}


def require_llama_shape(config: TinyLMConfig) -> None:
    """Raise ValueError, with the reason, if no Llama or Qwen3 loader could run this model."""
    if config.position_embedding_type != "rope":
        raise ValueError(
            f"position_embedding_type {config.position_embedding_type!r} has no equivalent in Llama or "
            "Qwen3; "
            "only models with rotary positions can be exported: train one with "
            "position_embedding_type=rope"
        )
    if config.qk_norm and config.mlp_bias:
        raise ValueError("qk_norm with mlp_bias exists in neither Llama nor Qwen3; export needs one of them off")


def config_to_hf(config: TinyLMConfig) -> dict[str, Any]:
    """The contents of `config.json`, readable by transformers 4 and 5 alike.

    Both spellings of the settings that were renamed are written (`rope_theta` and `rope_parameters`,
    `torch_dtype` and `dtype`). A model with no Llama equivalent writes model_type "tinylm", which no
    other loader recognises.
    """
    try:
        require_llama_shape(config)
        kind = ("qwen3", "Qwen3ForCausalLM") if config.qk_norm else ("llama", "LlamaForCausalLM")
    except ValueError:
        kind = ("tinylm", "TinyLMForCausalLM")
    rope = {"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta}
    out: dict[str, Any] = {"model_type": kind[0], "architectures": [kind[1]], "hidden_act": "silu"}
    out |= {key: value for key, value in asdict(config).items() if key not in _TINYLM_ONLY}
    out |= {"rope_parameters": rope, "torch_dtype": "float32", "dtype": "float32", "use_cache": True}
    out["hidden_dropout"] = config.hidden_dropout
    if kind[0] == "tinylm":
        out |= {name: getattr(config, name) for name in _TINYLM_ONLY}
    return out


def config_from_hf(data: dict[str, Any]) -> TinyLMConfig:
    """Read a `config.json` of either generation.

    Raises:
        ValueError: it asks for something this model does not do; the message says what.
    """
    kind = data.get("model_type")
    if kind not in ("llama", "qwen3", "tinylm"):
        raise ValueError(f"model_type {shown(kind)} is not supported; expected llama, qwen3 or tinylm")
    if data.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act {shown(data['hidden_act'])} is not supported; expected silu (SwiGLU)")
    if data.get("quantization_config"):
        raise ValueError("quantization_config is set; only unquantised weights can be loaded")
    if data.get("use_sliding_window"):
        raise ValueError("use_sliding_window is true; this model attends to its whole context")
    known = {field.name for field in fields(TinyLMConfig)}
    kept = {key: value for key, value in data.items() if key in known and value is not None}
    if kind != "tinylm":
        kept["qk_norm"] = kind == "qwen3"
        kept["position_embedding_type"] = "rope"
    kept.setdefault("num_key_value_heads", data.get("num_attention_heads", 8))
    # What transformers assumes when a key is absent, which is not always what we default to.
    kept = {**_HF_DEFAULTS, **kept}
    if kind == "qwen3" and "head_dim" not in kept:
        kept["head_dim"] = 128
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = data.get(name)
        value = value[0] if isinstance(value, list) and value else value
        # In older files, -1 or the vocabulary's size means that there is no such token; as an index it would fail.
        exists = type(value) is not int or not isinstance(size := data.get("vocab_size"), int) or 0 <= value < size
        kept[name] = value if exists else None
    missing = [n for n in ("vocab_size", "hidden_size", "num_hidden_layers") if n not in kept]
    if missing:
        raise ValueError(f"{missing[0]} is missing; a {kind} config.json must state it")
    try:
        kept["rope_theta"], kept["rope_scaling"] = _rope_of(data)
        return TinyLMConfig(**kept)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"a value has the wrong type ({shown(str(error), 200)}); correct it") from None


def _rope_of(data: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(theta, YaRN settings or None) from either generation of keys."""
    rope = data.get("rope_scaling") or data.get("rope_parameters") or {}
    theta = rope.get("rope_theta") or data.get("rope_theta") or 10_000.0
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                f"partial_rotary_factor {shown(rope['partial_rotary_factor'])} is not supported; expected 1"
            )
        return theta, None
    return theta, {key: value for key, value in rope.items() if key != "rope_theta"}
