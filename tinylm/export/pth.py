"""Export to the `.pth` of the original project, lyuzlion/Tiny-Language-Model: the weights, under its names."""

from __future__ import annotations

from pathlib import Path

import torch

from tinylm.checkpoint.original_pth import NUM_KEY_VALUE_HEADS, name_to_original
from tinylm.files.atomic import atomic_write
from tinylm.model.hf_config import require_llama_shape
from tinylm.model.lora import has_lora
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.model.weights import base_state


def export_pth(model: TinyLMForCausalLM, path: str | Path) -> None:
    """Write the weights under the original's names, and `lm_head.weight` also if it is tied to the embedding.

    Raises:
        ValueError: the original's code cannot express the model's shape (it has rotary positions, two key/value
            heads, no biases and no query/key norms), or adapters are not merged.
    """
    config = model.config
    if has_lora(model):
        raise ValueError("the model has adapters attached; merge_lora before exporting a .pth")
    require_llama_shape(config)
    if config.num_key_value_heads != NUM_KEY_VALUE_HEADS:
        raise ValueError(
            f"num_key_value_heads is {config.num_key_value_heads}; the original project's code has "
            f"{NUM_KEY_VALUE_HEADS}: use the model folder instead"
        )
    for name in ("qk_norm", "attention_bias", "mlp_bias", "rope_scaling"):
        if getattr(config, name):
            raise ValueError(f"{name} is set; the original project's code lacks it: use the model folder instead")
    for name, fixed in (("rope_theta", 1e6), ("rms_norm_eps", 1e-5)):
        if (found := getattr(config, name)) != fixed:
            raise ValueError(
                f"{name} is {found}; the original project's code has {fixed}: use the model folder instead"
            )
    state = {name_to_original(name): tensor.detach().cpu() for name, tensor in base_state(model).items()}
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    try:
        with atomic_write(path) as file:
            torch.save(state, file)
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        error.filename = str(path)  # a full disk: the system's error does not name the file
        raise
