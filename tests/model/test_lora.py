"""Adapters against PEFT, in both directions, and misuse that must be an error."""

from __future__ import annotations

import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tests.model.small_models import random_ids, reference_of, small_model
from tinylm.checkpoint.adapter_folder import load_adapter, save_adapter
from tinylm.model.lora import (
    PROJECTIONS,
    LoRAConfig,
    LoRALinear,
    adapters_disabled,
    apply_lora,
    indistinct_tokens,
    lora_parameters,
    merge_lora,
    unload_lora,
)

# PEFT asks transformers for an attribute under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def randomise(model) -> None:
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.normal_(0, 0.1)


def adapted(config: LoRAConfig | None = None):
    model = apply_lora(small_model(), config or LoRAConfig(rank=4, alpha=12))
    randomise(model)
    return model


def test_a_fresh_adapter_changes_no_bit_and_covers_all_seven_projections():
    """The original's LoRA skipped k_proj and v_proj."""
    model, ids = small_model(), random_ids(2, 20)
    before = model(ids)
    apply_lora(model, LoRAConfig())
    names = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    assert {name.rpartition(".")[2] for name in names} == set(PROJECTIONS) and len(names) == 14
    assert torch.equal(model(ids), before)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in lora_parameters(model)}
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.lora_A.weight.abs().max() <= 64**-0.5 and layer.lora_A.weight.std() > 0.05


def test_disable_unload_and_merge():
    base, ids = small_model(), random_ids(2, 20)
    expected = base(ids)
    model = apply_lora(base, LoRAConfig(rank=4, alpha=12))
    randomise(model)
    with_adapter = model(ids)
    assert (with_adapter - expected).abs().max() > 0.1
    with adapters_disabled(model):
        assert torch.equal(model(ids), expected)
    assert torch.equal(model(ids), with_adapter)
    merge_lora(model)
    assert not lora_parameters(model) and all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(ids), with_adapter, rtol=1e-4, atol=1e-5)

    torch.manual_seed(0)
    model = apply_lora(small_model(), LoRAConfig())
    before = {name.replace(".base.", "."): t.clone() for name, t in model.state_dict().items() if "lora" not in name}
    randomise(model)
    unload_lora(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()


def test_half_precision_weights_are_merged_in_float32():
    """The result is rounded once; products or sums in bfloat16 would round several times."""
    layer = LoRALinear(torch.nn.Linear(64, 48).bfloat16(), rank=16, alpha=24)
    torch.nn.init.normal_(layer.lora_B.weight, 0, 0.05)
    weight, a, b = (t.detach().double() for t in (layer.base.weight, layer.lora_A.weight, layer.lora_B.weight))
    expected = (weight + 1.5 * b @ a).bfloat16()
    merged = layer.merge().weight
    assert merged.dtype == torch.bfloat16 and not torch.equal(merged.double(), weight)
    assert (merged != expected).float().mean() < 1e-3  # a sum that lies on a tie but for float32's own rounding


def test_dropout_acts_on_the_adapter_only_in_training():
    model, ids = adapted(LoRAConfig(dropout=0.5)), random_ids(1, 20)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))
    with adapters_disabled(model):
        assert torch.equal(model(ids), model(ids))


@pytest.mark.parametrize("targets", [PROJECTIONS, ("q_proj", "down_proj")])
def test_peft_loads_our_adapter(tmp_path, targets):
    model = adapted(LoRAConfig(rank=4, alpha=12, target_modules=targets))
    save_adapter(model, tmp_path / "adapter", "base")
    ids = random_ids(2, 20)
    expected = model(ids)
    peft_model = PeftModel.from_pretrained(reference_of(unload_lora(model)), tmp_path / "adapter")
    torch.testing.assert_close(peft_model(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_we_load_pefts_adapter(tmp_path):
    model, ids = small_model(), random_ids(2, 20)
    base = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    settings = LoraConfig(r=3, lora_alpha=5, target_modules=["k_proj", "up_proj", "o_proj"], task_type="CAUSAL_LM")
    peft_model = get_peft_model(reference_of(model), settings).eval()
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, 0, 0.1)
    peft_model.save_pretrained(tmp_path)
    assert (peft_model(ids).logits - model(ids)).abs().max() > 0.1
    load_adapter(model, tmp_path)
    torch.testing.assert_close(model(ids), peft_model(ids).logits, rtol=1e-5, atol=1e-5)
    theirs, ours = peft_model.merge_and_unload().state_dict(), merge_lora(model).state_dict()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)
    assert ours.keys() == theirs.keys() and not torch.equal(ours["model.layers.0.mlp.up_proj.weight"], base)


def test_switching_adapters(tmp_path):
    ids, outputs = random_ids(1, 12), []
    for i, config in enumerate((LoRAConfig(rank=2), LoRAConfig(rank=4, target_modules=("v_proj",)))):
        torch.manual_seed(0)
        model = adapted(config)
        outputs.append(model(ids))
        save_adapter(model, tmp_path / str(i), "base")
    for i in (0, 1, 0):
        load_adapter(model, tmp_path / str(i))
        assert torch.equal(model(ids), outputs[i])


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch.compile's own
def test_names_come_from_the_uncompiled_module(tmp_path):
    """The original saved `_orig_mod.` names from a compiled model, then loaded them with strict=False."""
    model = adapted()
    save_adapter(torch.compile(model), tmp_path / "adapter", "base")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert not any("_orig_mod" in name for name in names)


def test_loading_is_strict(tmp_path):
    folder = tmp_path / "adapter"
    model = adapted()
    ids = random_ids(1, 9)
    before = model(ids)
    save_adapter(model, folder, "base")
    path = folder / "adapter_model.safetensors"
    good = {name: value.clone() for name, value in load_file(path).items()}  # the file behind them is overwritten
    first = next(iter(good))
    for broken, message in (
        ({k: v for k, v in good.items() if k != first}, f"lacks 1 tensors, the first {first}"),
        ({**good, "other.lora_A.weight": torch.ones(1)}, "1 tensors too many, the first other.lora_A.weight"),
        ({**good, first: torch.ones(9, 9)}, "1 tensors of another shape"),
    ):
        save_file(broken, path)
        with pytest.raises(ValueError, match=message):
            load_adapter(model, folder)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="its header promises"):
        load_adapter(model, folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors does not exist"):
        load_adapter(model, folder)
    assert torch.equal(model(ids), before)


def test_an_adapter_refuses_another_base(tmp_path):
    model = adapted()
    save_adapter(model, tmp_path / "adapter", "base")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.base.weight[0, 0] += 1e-3
    place = re.escape(str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match=rf"^{place} was trained on base \(weights \w+\); out/b has weights \w+: load"):
        load_adapter(model, tmp_path / "adapter", "out/b")
    save_adapter(adapted(), tmp_path / "adapter", "base", {"parent": {"path": "out/a"}})  # the path as it was given
    with pytest.raises(ValueError, match=r"was trained on out/a \(weights \w+\); this model has weights \w+: load"):
        load_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_dora": True}, "sets use_dora"),
        ({"rank_pattern": {"q_proj": 3}}, "sets rank_pattern"),
        ({"bias": "all"}, "bias 'all'"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"target_modules": "q.*"}, "target_modules 'q.*'"),
        ({"target_modules": ["norm"]}, "target module 'norm' is unknown"),
    ],
)
def test_adapter_configs_we_cannot_honour(tmp_path, change, message):
    model = adapted()
    save_adapter(model, tmp_path / "adapter", "base")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"alpha": 0}, "alpha is 0"),
        ({"dropout": 1}, "dropout is 1"),
        ({"target_modules": ()}, "target_modules is empty"),
        ({"target_modules": ("q_proj", "qkv")}, "'qkv' is unknown; choose from q_proj, k_proj, v_proj"),
    ],
)
def test_settings_are_validated(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**settings)


def test_misuse_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapter(small_model(), tmp_path, "base")
    with pytest.raises(ValueError, match="has adapters already"):
        apply_lora(adapted(), LoRAConfig())
    with pytest.raises(ValueError, match="has no layer named q_proj"):
        apply_lora(torch.nn.Linear(2, 2), LoRAConfig(target_modules=("q_proj",)))
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        save_adapter(adapted(), tmp_path, "base")


def test_tokens_that_nothing_tells_apart_are_found():
    """Rows 1, 4 and 5 point one way, row 5 much longer; row 3 points the opposite way, row 2 nearly: cosine 0.96."""
    torch.manual_seed(0)
    table = torch.randn(6, 32)
    other = torch.randn(32)
    other -= (other @ table[1]) / (table[1] @ table[1]) * table[1]
    table[2] = table[1] / table[1].norm() + 0.3 * other / other.norm()
    table[3], table[4], table[5] = -table[1], table[1] + 0.001, 40 * table[1]
    asked = torch.tensor([5, 0, 3, 1, 2])
    assert indistinct_tokens(table, asked).tolist() == [True, False, False, True, False]
    assert indistinct_tokens(table, asked, cosine=0.9).tolist() == [True, False, False, True, True]
    many = torch.arange(3000) % 6  # more than are compared at a time
    assert indistinct_tokens(table, many).view(-1, 6).all(0).tolist() == [False, True, False, False, True, True]
