"""The copy made for generation gives the same numbers as the model."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.model.small_models import random_ids, trained_model
from tinylm.model import inference_copy as module
from tinylm.model.inference_copy import inference_copy
from tinylm.model.lora import LoRAConfig, apply_lora, lora_parameters

SHAPES = [
    {},
    {"qk_norm": True, "num_key_value_heads": 1},
    {"attention_bias": True, "mlp_bias": True},
    {"qkv_bias": True},
]


def steps(model, ids):
    """Logits of a prefill of all but five tokens, then one token at a time."""
    cache = model.new_cache(*ids.shape)
    cuts = [0, *range(ids.shape[1] - 5, ids.shape[1] + 1)]
    with torch.no_grad():
        parts = [
            model.lm_head(model.hidden_states(ids[:, a:b], cache=cache)) for a, b in zip(cuts, cuts[1:], strict=False)
        ]
    return torch.cat(parts, dim=1)


def force_packing(monkeypatch, is_packed: bool) -> None:
    """Without this, a machine without bfloat16 would test the plain layers twice."""
    if is_packed and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this build of torch has no packed bfloat16 products here")
    monkeypatch.setattr(module, "_has_packed_kernel", lambda weight: is_packed)


def packed_layers(model) -> list[bool]:
    return [layer.is_packed for layer in model.modules() if isinstance(layer, module._Packed)]


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_copy_equals_the_model(shape):
    model = trained_model(**shape)
    ids = random_ids(2, 40)
    fast = inference_copy(model)
    assert packed_layers(fast) == [False] * 9
    torch.testing.assert_close(steps(fast, ids), model(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_packed", [True, False])
def test_bf16_copy_rounds_as_the_bf16_model(shape, is_packed, monkeypatch):
    force_packing(monkeypatch, is_packed)
    model = trained_model(**shape)
    ids = random_ids(2, 40)
    fast = inference_copy(model, torch.bfloat16)
    assert packed_layers(fast) == [is_packed] * 9
    exact, half = model(ids), steps(fast, ids)
    assert half.dtype == torch.bfloat16
    error, usual = ((x.float() - exact).norm() / exact.norm() for x in (half, copy.deepcopy(model).bfloat16()(ids)))
    assert 0 < error < max(0.02, 1.5 * usual)


@pytest.mark.parametrize(
    ("dtype", "is_packed"), [(torch.float32, False), (torch.bfloat16, True), (torch.bfloat16, False)]
)
def test_adapters_are_merged_and_the_model_is_untouched(dtype, is_packed, monkeypatch):
    force_packing(monkeypatch, is_packed)
    model = apply_lora(trained_model(qk_norm=True), LoRAConfig(rank=2, alpha=5))
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, 0, 0.1)
    ids = random_ids(1, 20)
    before = model(ids)
    fast = inference_copy(model, dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    assert packed_layers(fast) == [is_packed] * 9
    assert (fast(ids).float() - before).norm() < tolerance * before.norm()
    assert torch.equal(model(ids), before) and len(lora_parameters(model)) == 28


@pytest.mark.parametrize("shape", [{}, {"position_embedding_type": "learned", "tie_word_embeddings": False}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_shared_and_the_model_is_not_copied_on_the_way(shape, dtype, monkeypatch):
    """The whole model was once copied in float32 before it was rounded."""
    model = trained_model(**shape)
    before = {name: (id(weight), weight.clone(), weight.requires_grad) for name, weight in model.named_parameters()}
    monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__", lambda weight, memo: pytest.fail("a weight was copied"))
    fast = inference_copy(model, dtype)
    for name, weight in model.named_parameters():
        same, values, had_gradient = before[name]
        assert id(weight) == same and torch.equal(weight, values) and weight.requires_grad == had_gradient
    ours = {weight.data_ptr() for weight in model.parameters()}
    tensors = [value for part in fast.modules() for value in vars(part).values() if isinstance(value, torch.Tensor)]
    tensors += [*fast.parameters(), *fast.buffers()]
    assert len(tensors) > 15 and ours.isdisjoint(tensor.data_ptr() for tensor in tensors if not tensor.is_mkldnn)
    assert not any(tensor.requires_grad for tensor in tensors) and {p.dtype for p in fast.parameters()} == {dtype}
