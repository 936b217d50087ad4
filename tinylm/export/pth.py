"""Export to the `.pth` of the original project, lyuzlion/Tiny-Language-Model: the weights, under its names."""

from __future__ import annotations

from pathlib import Path

import torch

from tinylm.checkpoint.original_pth import NUM_KEY_VALUE_HEADS, name_to_original
from tinylm.files.atomic import atomic_write
from tinylm.model.config import TinyLMConfig
from tinylm.model.hf_config import require_llama_shape
from tinylm.model.lora import has_lora
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.model.weights import base_state


def unlike_the_original(config: TinyLMConfig) -> list[str]:
    """What the original project's code cannot express, as "setting value (there value)"; empty if it loads the model.

    It has rotary positions, two key/value heads, tied embeddings, no biases and no query/key norms, and derives the
    widths of a head and of the feed-forward layers.
    """
    width = config.hidden_size
    expected = {
        "num_key_value_heads": NUM_KEY_VALUE_HEADS,
        "head_dim": width // config.num_attention_heads,
        "intermediate_size": 64 * -(-int(width * 8 / 3) // 64),
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "qk_norm": False,
        "attention_bias": False,
        "qkv_bias": False,
        "mlp_bias": False,
        "rope_scaling": None,
    }
    found = {name: getattr(config, name) for name in expected}
    unlike = [name for name in expected if found[name] != expected[name]]
    return [f"{name} {_shown(found[name])} (there {_shown(expected[name])})" for name in unlike]


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def export_pth(model: TinyLMForCausalLM, path: str | Path) -> None:
    """Write the weights under the original's names, and `lm_head.weight` also if it is tied to the embedding.

    Raises:
        ValueError: the original's code cannot express the model's shape, or adapters are not merged.
    """
    if has_lora(model):
        raise ValueError("the model has adapters attached; merge_lora before exporting a .pth")
    require_llama_shape(model.config)
    if unlike := unlike_the_original(model.config):
        raise ValueError(f"the original project's code cannot load this model: {', '.join(unlike)}")
    state = {name_to_original(name): tensor.detach().cpu() for name, tensor in base_state(model).items()}
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    with atomic_write(path) as file:
        torch.save(state, file)
