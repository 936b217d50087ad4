"""What the tests of this folder share: one random model, its twin in transformers, prompts."""

from __future__ import annotations

import pytest
import torch
from random_models import make_model, make_twin
from transformers import LlamaForCausalLM

from tinylm.model.model_tinylm import TinyLMForCausalLM


@pytest.fixture(scope="session")
def model() -> TinyLMForCausalLM:
    return make_model()


@pytest.fixture(scope="session")
def twin(model: TinyLMForCausalLM) -> LlamaForCausalLM:
    return make_twin(model)


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Prompts of 1 to 39 tokens."""
    generator = torch.Generator().manual_seed(11)
    lengths = [3, 17, 1, 39, 8, 8, 25, 2, 30, 5, 12]
    return [torch.randint(3, 300, (n,), generator=generator).tolist() for n in lengths]
