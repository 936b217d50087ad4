"""The copy made for generation gives the same numbers as the model."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.model.small_models import random_ids, small_model, trained_model
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
    ("dtype", "is_packed"),
    [(torch.float32, False), (torch.bfloat16, True), (torch.bfloat16, False), (torch.int8, False)],
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
    assert packed_layers(fast) == [is_packed] * (0 if dtype == torch.int8 else 9)
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


def int8_layers(model) -> dict[str, module._Int8]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, module._Int8)}


@pytest.mark.parametrize("shape", [*SHAPES, {"hidden_size": 72, "intermediate_size": 100, "vocab_size": 301}])
def test_int8_copy_computes_with_its_weights(shape):
    """Against a float32 model that has the rounded weights. What remains is bfloat16's rounding of everything else: as
    large as that of a bfloat16 model.
    """
    model = trained_model(**shape)
    ids = random_ids(2, 40)
    fast, exact = inference_copy(model, torch.int8), inference_copy(model)
    layers = int8_layers(fast)
    assert len(layers) == 9
    for name, layer in layers.items():
        exact.get_submodule(name).weight = layer.weight
    wanted, half = exact(ids), copy.deepcopy(model).bfloat16()(ids)
    usual = (half.float() - model(ids)).norm() / model(ids).norm()
    for found in (steps(fast, ids), steps(fast, ids[:1]), fast(ids)):
        error = (found.float() - wanted[: len(found)]).norm() / wanted[: len(found)].norm()
        assert found.dtype == torch.bfloat16 and 0 < error < max(0.02, 1.5 * usual)


@pytest.mark.parametrize("rows", [2, 3, 64, 301])
@pytest.mark.parametrize("columns", [1, 17, 31, 32, 100])
def test_int8_products_of_every_size(rows, columns):
    """The weights differ by half a step at most, and x W^T by the rounding of the answer to bfloat16 (2^-9)."""
    weight, bias = torch.randn(rows, columns), torch.randn(rows)
    weight[0] = 0
    layer = module._Int8(weight, bias)
    step = layer.scale.float()[:, None]
    assert ((layer.weight - weight).abs() <= 0.51 * step).all()
    assert (step.squeeze(1)[1:] < 1.01 * weight.abs().amax(1)[1:] / 127).all()
    for tokens in (1, 2, module.INT8_TOKENS, module.INT8_TOKENS + 1):
        x = torch.randn(1, tokens, columns).bfloat16()
        wanted = x.double() @ layer.weight.double().T
        torch.testing.assert_close(layer(x).double(), wanted + layer.bias.double(), rtol=0.02, atol=0.02 * columns**0.5)


def test_int8_loses_little_of_what_was_learnt():
    """Bits per token (and so per byte) of held-out tokens, 0.5% more at most."""
    model = small_model(vocab_size=32)
    ids = torch.randint(32, (1040, 64))
    for place in range(1, 64):  # a rule that four of five tokens follow
        follows = torch.rand(len(ids)) < 0.8
        ids[:, place] = torch.where(follows, (5 * ids[:, place - 1] + 1) % 32, ids[:, place])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def loss(of, rows):
        logits = of(rows[:, :-1]).float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    held_out, *batches = ids.split(40)
    untrained = loss(model, held_out).item()
    for rows in batches:
        loss(model, rows).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        exact, rounded = (loss(of, held_out).item() for of in (model, inference_copy(model, torch.int8)))
    assert exact < 0.7 * untrained and abs(rounded - exact) < 0.005 * exact


def test_damaged_weights_show_in_the_int8_logits():
    model = trained_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    assert inference_copy(model, torch.int8)(random_ids(1, 3)).isnan().any()


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_storage_on_a_cpu_without_bf16_products(shape, monkeypatch):
    """It multiplies in float32: no product in bfloat16, which such a CPU only imitates, gets several tokens."""
    model = trained_model(**shape)
    ids = random_ids(1, 40)
    monkeypatch.setattr(module, "device_has_bf16", lambda device: False)
    linear = torch.nn.functional.linear
    products = []
    monkeypatch.setattr(module.F, "linear", lambda x, w, b=None: products.append(w.dtype) or linear(x, w, b))
    error, usual = (
        (x.float() - model(ids)).norm() / model(ids).norm()
        for x in (steps(inference_copy(model, torch.bfloat16), ids), copy.deepcopy(model).bfloat16()(ids))
    )
    assert set(products[:8]) == {torch.float32} and error < max(0.02, 1.5 * usual)
    assert torch._C._get_mkldnn_enabled() is module.ONEDNN_IS_ON


def test_one_token_is_multiplied_without_onednn(monkeypatch):
    """Its products took 1.6 times as long. Afterwards oneDNN is on again, whatever happened."""
    seen = []
    monkeypatch.setattr(torch, "mv", lambda w, x: seen.append(torch._C._get_mkldnn_enabled()) or 1 / 0)
    fast = inference_copy(trained_model(), torch.bfloat16)
    with pytest.raises(ZeroDivisionError):
        fast(random_ids(1, 1))
    assert seen == [False] and torch._C._get_mkldnn_enabled() is module.ONEDNN_IS_ON


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [*SHAPES, {"position_embedding_type": "learned"}, {"hidden_size": 72}])
def test_one_token_of_one_text_has_a_way_of_its_own(shape, dtype, monkeypatch):
    """It gives what the common way gives, and is taken for one token behind a cache, never for several texts."""
    taken = []
    real = module._JoinedBlock._of_one
    monkeypatch.setattr(module._JoinedBlock, "_of_one", lambda *args: taken.append(args) or real(*args))
    model = trained_model(**shape)
    ids = random_ids(2, 40)
    fast = inference_copy(model, dtype)
    together = steps(fast, ids)
    assert not taken
    alone = torch.cat([steps(fast, row) for row in ids.split(1)])
    assert len(taken) == 2 * 5 * model.config.num_hidden_layers
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert (alone.float() - together.float()).norm() < tolerance * together.float().norm()
    fast(ids[:1, :1])
    assert len(taken) == 2 * 5 * model.config.num_hidden_layers
