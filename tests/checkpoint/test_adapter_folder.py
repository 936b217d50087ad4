"""Adapter folders: whatever PEFT can write and plain LoRA is not is refused, and not loaded with a wrong effect."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tests.model.small_models import reference_of, small_model
from tinylm.checkpoint.adapter_folder import _UNSUPPORTED, load_adapter, save_adapter
from tinylm.model.lora import LoRAConfig, apply_lora, lora_layers

SETTINGS: dict[str, Any] = {
    "use_dora": True,
    "use_rslora": True,
    "use_qalora": True,
    "use_bdlora": {"match_strict": True},
    "rank_pattern": {"q_proj": 3},
    "alpha_pattern": {"q_proj": 32},
    "modules_to_save": ["lm_head"],
    "layers_to_transform": [0],
    "layers_pattern": "layers",
    "exclude_modules": ["v_proj"],
    "fan_in_fan_out": True,
    "lora_bias": True,
    "target_parameters": ["q_proj.weight"],
    "trainable_token_indices": [5, 7],
    "alora_invocation_tokens": [3],
    "arrow_config": {"top_k": 2},
    "velora_config": {"scale": 2.0},
    "corda_config": {"corda_method": "kpm"},
    "megatron_config": {"hidden_size": 64},
    "layer_replication": [[0, 2]],
    "kasa_config": {"beta": 1e-4},
    "monteclora_config": {"num_samples": 4},
}
"""PEFT's settings that change what an adapter does, each with a value that is not its default."""
HARMLESS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "lora_alpha", "lora_dropout", "bias", "init_lora_weights", "megatron_core",
    "qalora_group_size", "loftq_config", "eva_config", "lora_ga_config", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
"""Read, or of no effect on a trained adapter."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_adapter(apply_lora(small_model(), LoRAConfig(rank=2, alpha=6)), tmp_path / "naïve", "../模型", {})
    return tmp_path / "naïve"


def change(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **settings}), encoding="utf-8")


def test_each_of_pefts_settings_is_read_refused_or_harmless() -> None:
    names = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert names == set(SETTINGS) | HARMLESS
    assert set(_UNSUPPORTED) == set(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_plain_lora_has_not_is_refused(folder: Path, name: str) -> None:
    """With use_rslora the scale is alpha / sqrt(rank): the adapter loaded, and acted with another strength."""
    torch.manual_seed(0)
    model = small_model()
    change(folder, **{name: SETTINGS[name]})
    with pytest.raises(ValueError, match=f"adapter_config.json sets {name}; only plain LoRA of the same rank"):
        load_adapter(model, folder)
    assert not lora_layers(model)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", ["pissa"], 2])
def test_a_start_that_changes_the_base_is_refused(folder: Path, start: Any) -> None:
    change(folder, init_lora_weights=start)
    with pytest.raises(ValueError, match="init_lora_weights .*, which changes the base model's weights"):
        load_adapter(small_model(), folder)


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_a_start_that_leaves_the_base_alone_is_fine(folder: Path, start: Any) -> None:
    torch.manual_seed(0)
    change(folder, init_lora_weights=start)
    assert lora_layers(load_adapter(small_model(), folder))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own
@pytest.mark.parametrize(("start", "is_changed"), [("olora", True), ("pissa", True), ("gaussian", False)])
def test_peft_itself_changes_the_base(start: str, is_changed: bool) -> None:
    """The reason, from the reference."""
    model = small_model()
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=start)
    adapted = peft.get_peft_model(reference_of(model), config)
    after = adapted.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert torch.equal(after, before) != is_changed
