"""Small models, and the same weights in transformers."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tinylm.model.hf_config import config_to_hf
from tinylm.model.model_tinylm import TinyLMConfig, TinyLMForCausalLM

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def small_config(**changes) -> TinyLMConfig:
    settings = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return TinyLMConfig(**{**settings, "num_key_value_heads": 2, "max_position_embeddings": 256, **changes})


def small_model(**changes) -> TinyLMForCausalLM:
    """Weights large enough that every part of the model shows in the logits."""
    return TinyLMForCausalLM(small_config(initializer_range=0.1, **changes)).eval()


def trained_model(**changes) -> TinyLMForCausalLM:
    """The same, but all norms and biases differ from their initial values, as after training."""
    model = small_model(**changes)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    return model


def reference_of(model: TinyLMForCausalLM):
    """transformers' model with these weights, built from our config.json's contents."""
    data = config_to_hf(model.config)
    config = AutoConfig.for_model(**data)
    reference = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    reference.load_state_dict(model.state_dict(), strict=True)
    return reference


def random_ids(batch: int, time: int, vocab_size: int = 300) -> torch.Tensor:
    """Ids from 1 on: transformers gives the padding token's embedding (id 0) no gradient."""
    return torch.randint(1, vocab_size, (batch, time))
