"""One small random model, and one server of it, for all tests of this folder that need no other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.known_models import reference_logprobs, tokenizer
from tests.server.serving import Server, running, settings_for
from tinylm.checkpoint.adapter_folder import save_adapter
from tinylm.checkpoint.model_folder import load_model, save_model
from tinylm.model.config import TinyLMConfig
from tinylm.model.lora import LoRAConfig, apply_lora, lora_layers
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.tokenizer.tokenizer import Tokenizer

__all__ = ["reference_logprobs", "tokenizer"]

CONTEXT = 256
LINEAGE = {"stage": "full_sft", "document_start": True}


def make_model(
    folder: Path, tokenizer: Tokenizer, seed: int = 0, lineage: Mapping[str, Any] = LINEAGE, **shape: int
) -> Path:
    """A random model whose answers depend on all of its prompt, in a folder."""
    torch.manual_seed(seed)
    default = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    default |= {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": CONTEXT}
    config = TinyLMConfig(**{**default, **shape}, initializer_range=0.3)
    save_model(folder, TinyLMForCausalLM(config).eval(), tokenizer, dict(lineage))
    return folder


def make_adapter(folder: Path, model_folder: Path, seed: int) -> Path:
    """A random adapter, strong enough to change answers."""
    model = load_model(model_folder)[0]
    apply_lora(model, LoRAConfig(rank=4, alpha=8, target_modules=("q_proj", "v_proj", "down_proj")))
    torch.manual_seed(seed)
    for layer in lora_layers(model).values():
        for weight in layer.adapter().values():
            torch.nn.init.normal_(weight, std=0.3)
    save_adapter(model, folder, model_folder, {"stage": "lora"})
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return make_model(tmp_path_factory.mktemp("served") / "tiny", tokenizer)


@pytest.fixture(scope="module")
def server(model_folder: Path) -> Iterator[Server]:
    with running(settings_for(model_folder)) as found:
        yield found


RECITED = "Schön語🐉, «ok more"
"""Its characters are of one to four bytes, and several have tokens for their single bytes only."""


def make_reciter(folder: Path, tokenizer: Tokenizer, text: str = RECITED) -> Path:
    """A model that answers every chat with `text`: the next token depends on the last one alone."""
    newline = tokenizer.encode("\n")[-1]
    path = [newline, *tokenizer.encode(text), tokenizer.im_end_id]
    assert len(set(path)) == len(path), "a token would have two successors"
    shape = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = TinyLMConfig(
        **shape, vocab_size=tokenizer.vocab_size, max_position_embeddings=128, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    model = TinyLMForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for token_id, following in zip(path, path[1:], strict=False):
            model.lm_head.weight[following] = 40 * torch.nn.functional.normalize(
                model.model.embed_tokens.weight[token_id], dim=0
            )
    save_model(folder, model, tokenizer, {"stage": "full_sft"})
    return folder


@pytest.fixture(scope="session")
def reciter_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return make_reciter(tmp_path_factory.mktemp("reciter") / "reciter", tokenizer)


@pytest.fixture(scope="module")
def reciter(reciter_folder: Path) -> Iterator[Server]:
    with running(settings_for(reciter_folder)) as found:
        yield found
