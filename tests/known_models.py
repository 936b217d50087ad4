"""Models whose answers can be worked out by hand, and a plain reference for all else: shared fixtures."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tinylm.model.model_tinylm import TinyLMConfig, TinyLMForCausalLM
from tinylm.tokenizer.tokenizer import Tokenizer


class TableModel(torch.nn.Module):
    """A bigram model: the logits after token i are row i of a table [V, V]."""

    def __init__(self, table: torch.Tensor, max_position_embeddings: int = 64) -> None:
        super().__init__()
        vocab_size = table.shape[0]
        self.config = SimpleNamespace(max_position_embeddings=max_position_embeddings, vocab_size=vocab_size)
        self.lm_head = torch.nn.Linear(vocab_size, vocab_size, bias=False)
        with torch.no_grad():
            self.lm_head.weight.copy_(table.T)

    def hidden_states(self, input_ids, position_ids=None, document_ids=None, cache=None):
        assert input_ids.shape[1] <= self.config.max_position_embeddings
        return torch.nn.functional.one_hot(input_ids, self.config.vocab_size).to(self.lm_head.weight.dtype)


def plain_logprobs(model: TinyLMForCausalLM, ids: list[int]) -> list[float]:
    """log P(ids[t] | ids[:t]) for t >= 1 of one sequence: no batch, no padding, float64."""
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]]))[0].double()
    logprobs = torch.log_softmax(logits, dim=-1)
    return [float(logprobs[t, ids[t + 1]]) for t in range(len(ids) - 1)]


@pytest.fixture(scope="session")
def table_model() -> type[TableModel]:
    return TableModel


@pytest.fixture(scope="session")
def reference_logprobs():
    return plain_logprobs


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.default()


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> TinyLMForCausalLM:
    """A small random model in float64, its weights wide enough that context matters."""
    torch.manual_seed(0)
    config = TinyLMConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    return TinyLMForCausalLM(config).double().eval()
