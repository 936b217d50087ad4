"""The copy made for generation gives the model's own numbers."""

from __future__ import annotations

import pytest
import torch

from tests.model.small_models import random_ids, small_model
from tinylm.model import inference_copy as module
from tinylm.model.inference_copy import inference_copy
from tinylm.model.lora import LoRAConfig, apply_lora, lora_parameters

SHAPES = [{}, {"qk_norm": True, "num_key_value_heads": 1}, {"attention_bias": True, "mlp_bias": True}]


def steps(model, ids):
    """Logits of a prefill of all but five tokens, then one token at a time."""
    cache = model.new_cache(*ids.shape)
    cuts = [0, *range(ids.shape[1] - 5, ids.shape[1] + 1)]
    with torch.no_grad():
        parts = [
            model.lm_head(model.hidden_states(ids[:, a:b], cache=cache)) for a, b in zip(cuts, cuts[1:], strict=False)
        ]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_copy_equals_the_model(shape):
    model = small_model(**shape)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    ids = random_ids(2, 40)
    torch.testing.assert_close(steps(inference_copy(model), ids), model(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_bf16_copy_rounds_as_the_bf16_model(packed, monkeypatch):
    if not packed:
        monkeypatch.setattr(module, "_has_packed_kernel", lambda weight: False)
    model = small_model()
    ids = random_ids(2, 40)
    exact, half = model(ids), steps(inference_copy(model, torch.bfloat16), ids)
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).norm() / exact.norm() < 0.02


def test_adapters_are_merged_and_the_model_is_untouched():
    model = apply_lora(small_model(), LoRAConfig(rank=2))
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, 0, 0.1)
    ids = random_ids(1, 20)
    before = model(ids)
    torch.testing.assert_close(inference_copy(model)(ids), before, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(ids), before) and len(lora_parameters(model)) == 28
