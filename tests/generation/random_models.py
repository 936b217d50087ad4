"""Small models with random weights, the same ones in our code and in transformers."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tinylm.model.config import TinyLMConfig
from tinylm.model.hf_config import config_to_hf
from tinylm.model.model_tinylm import TinyLMForCausalLM


def make_model(seed: int = 0, **overrides) -> TinyLMForCausalLM:
    """A tiny model whose answers vary: larger initial weights than usual make it opinionated."""
    torch.manual_seed(seed)
    shape = {"vocab_size": 300, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"max_position_embeddings": 128, "initializer_range": 0.5}
    return TinyLMForCausalLM(TinyLMConfig(**{**shape, **overrides})).eval()


def make_twin(model: TinyLMForCausalLM) -> LlamaForCausalLM:
    """transformers' Llama with the same weights."""
    twin = LlamaForCausalLM(LlamaConfig(**config_to_hf(model.config)))
    twin.load_state_dict(model.state_dict(), strict=True)
    return twin.eval()
