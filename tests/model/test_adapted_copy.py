"""Models with adapters that share their base's weights give the numbers of models that do not."""

from __future__ import annotations

import pytest
import torch

from tests.model.small_models import random_ids, trained_model
from tests.model.test_inference_copy import SHAPES, steps
from tinylm.model.adapted_copy import adapted_copy
from tinylm.model.inference_copy import inference_copy
from tinylm.model.lora import LoRAConfig, apply_lora, lora_layers, unload_lora

TARGETS = [
    ("q_proj", "v_proj", "down_proj"),
    ("k_proj", "o_proj", "up_proj", "lm_head"),
    ("gate_proj", "embed_tokens", "lm_head"),
]


def with_adapter(model, targets, seed):
    apply_lora(model, LoRAConfig(rank=3, alpha=7, target_modules=targets))
    torch.manual_seed(seed)
    for layer in lora_layers(model).values():
        for weight in layer.adapter().values():
            torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


@pytest.mark.parametrize("num_texts", [1, 2])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_the_adapted_model(shape, targets, num_texts):
    """One token of one text has a way of its own."""
    model = trained_model(**shape)
    ids = random_ids(num_texts, 40)
    plain = model(ids)
    fast = inference_copy(model)
    adapted = adapted_copy(fast, with_adapter(model, targets, seed=3))
    expected = model(ids)
    assert (expected - plain).abs().max() > 0.1
    unload_lora(model)
    torch.testing.assert_close(steps(adapted, ids), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(steps(fast, ids), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_texts", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_other_precisions_are_as_close_as_the_base(dtype, num_texts):
    model = trained_model()
    ids = random_ids(num_texts, 40)
    base_error = (steps(fast := inference_copy(model, dtype), ids) - model(ids)).abs().max()
    adapted = adapted_copy(fast, with_adapter(model, TARGETS[0], seed=4))
    error = (steps(adapted, ids) - model(ids)).abs().max()
    assert adapted.dtype == torch.bfloat16 and error < 3 * base_error + 0.05


def test_weights_are_shared():
    model = trained_model()
    fast = inference_copy(model)
    one = adapted_copy(fast, with_adapter(model, TARGETS[0], seed=1))
    unload_lora(model)
    other = adapted_copy(fast, with_adapter(model, TARGETS[0], seed=2))
    layers = [copy.model.layers[1] for copy in (fast, one, other)]
    weights = {id(layer.mlp.gate_up_proj.weight) for layer in layers}
    assert len(weights) == 1 and one.model.embed_tokens.weight is fast.model.embed_tokens.weight
    assert one.model.layers[0].mlp.down_proj.product.weight is fast.model.layers[0].mlp.down_proj.weight
    ids = random_ids(1, 9)
    assert (steps(one, ids) - steps(other, ids)).abs().max() > 0.01
