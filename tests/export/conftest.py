"""Models of every shape that leaves as a GGUF, each written once and loaded by llama.cpp once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.export.llama_cpp import LlamaCpp
from tests.model.small_models import YARN, trained_model
from tests.tokenizer.conftest import torture, world_texts
from tinylm.export.gguf import export_gguf
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.tokenizer.tokenizer import Tokenizer

__all__ = ["torture", "world_texts"]

_ODD_YARN = {**YARN, "beta_fast": 3.0, "beta_slow": 0.2, "attention_factor": 1.7, "truncate": False}
SHAPES = {
    "grouped": {},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "qk_norm": {"qk_norm": True},
    "wide heads": {"qk_norm": True, "head_dim": 48, "tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "three biases": {"qkv_bias": True},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "yarn": {"rope_scaling": YARN},
    "qk_norm and yarn": {"qk_norm": True, "rope_scaling": {**YARN, "attention_factor": 0.8}},
    "slow yarn": {"rope_scaling": {**YARN, "beta_slow": 2.0}},
    "fast yarn": {"rope_theta": 100.0, "rope_scaling": {**YARN, "beta_fast": 3.0}},
    "another yarn": {"rope_scaling": _ODD_YARN},
    "mscale yarn": {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
    "odd vocabulary": {"vocab_size": 379, "hidden_size": 56, "rms_norm_eps": 1e-3, "rope_theta": 1e4},
}
"""The widths are small, the settings are those that the format has to carry."""


class Loaded(NamedTuple):
    model: TinyLMForCausalLM
    path: Path
    llama_cpp: LlamaCpp


@pytest.fixture(scope="session")
def small_tokenizer() -> Tokenizer:
    """373 entries: 272 and 101 merges, also of characters that are not ASCII."""
    words = "the little größe größer größte 你好 你好吗 мир миру ½ it's they're  two   blanks\n\n\tcode() "
    more = "an ant and another ant ran and sang; naïve café, how wonderful is that quiet morning by the sea?\r\n"
    return Tokenizer.train([words * 3, more * 4], 373)


@pytest.fixture(scope="session")
def shape(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer) -> Callable[[str], Loaded]:
    """A name of `SHAPES` -> the model with random weights, its GGUF in float32, and llama.cpp with that."""
    folder = tmp_path_factory.mktemp("gguf")

    @cache
    def load(name: str) -> Loaded:
        torch.manual_seed(len(name))
        model = trained_model(**{"vocab_size": 373, **SHAPES[name]})
        path = folder / f"{name.replace(' ', '_')}.gguf"
        export_gguf(model, small_tokenizer, {"stage": "full_sft", "document_start": True}, path, "f32")
        return Loaded(model, path, LlamaCpp(path))

    return load
