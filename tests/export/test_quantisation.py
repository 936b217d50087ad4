"""What 8 bits cost: under 0.5% of the bits per byte, by a model that has learnt something, in llama.cpp itself.

docs/results.md has the same for the quickstart's model, measured by `python -m tests.export.formats`.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests.export.llama_cpp import LlamaCpp, bits_per_byte
from tinylm.dataset.tinyworld.pages import make_page
from tinylm.export.gguf import export_gguf
from tinylm.model.config import TinyLMConfig
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.tokenizer.tokenizer import Tokenizer

_STEPS, _BATCH, _TIME = 300, 8, 64


def trained(tokenizer: Tokenizer, texts: list[str]) -> TinyLMForCausalLM:
    """A few seconds of AdamW, from 6.2 nats a token to about 2."""
    torch.manual_seed(0)
    shape = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = TinyLMConfig(tokenizer.vocab_size, **shape, max_position_embeddings=256, rope_theta=1e4, qk_norm=True)
    model = TinyLMForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    ids = torch.tensor([i for text in texts for i in (0, *tokenizer.encode(text))])
    for step in range(_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (1 - step / _STEPS)
        starts = torch.randint(len(ids) - _TIME - 1, (_BATCH, 1))
        rows = ids[starts + torch.arange(_TIME + 1)]
        loss = torch.nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 3
    return model.eval()


@pytest.mark.slow
def test_8_bits_cost_less_than_half_a_percent(tmp_path: Path) -> None:
    rng = random.Random(0)
    pages = [make_page(rng, "train") for _ in range(120)]
    tokenizer = Tokenizer.train(pages, 512)
    model, text = trained(tokenizer, pages), make_page(rng, "test")[:500]
    found = {}
    for dtype in ("f32", "q8_0", "q4_0"):
        export_gguf(model, tokenizer, {}, tmp_path / "a.gguf", dtype)
        found[dtype] = bits_per_byte(LlamaCpp(tmp_path / "a.gguf"), tokenizer, [text], [0])
    assert 0.3 < found["f32"] < 1.5
    assert 0 < abs(found["q8_0"] / found["f32"] - 1) < 0.005
    assert 0 < abs(found["q4_0"] / found["f32"] - 1) < 0.05
