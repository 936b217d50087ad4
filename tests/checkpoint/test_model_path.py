"""Which model a path means, by the folders' names and times alone."""

from __future__ import annotations

import os
import re

import pytest

from tests.checkpoint.saved_states import save_state
from tinylm.checkpoint.model_path import last_models, resolve_adapter_path, resolve_model_path


@pytest.fixture
def models(tmp_path):
    """Make folders that look like models, each changed a second after the one before."""

    def make(*names):
        for number, name in enumerate(names):
            (tmp_path / name).mkdir(parents=True)
            (tmp_path / name / "config.json").write_text("{}")
            os.utime(tmp_path / name, (1000 + number, 1000 + number))
        return tmp_path

    return make


def test_the_last_epoch_is_by_number(models):
    """Epoch 10 comes after 9, though not in the alphabet, and whatever was changed last."""
    folder = models("pretrain_16_epoch10", "pretrain_16_epoch9", "pretrain_16_epoch2")
    assert resolve_model_path(folder).name == "pretrain_16_epoch10"
    assert resolve_model_path(folder, newest=True).name == "pretrain_16_epoch10"
    files = folder / "files"
    files.mkdir()
    for epoch in (9, 10):
        (files / f"pretrain_16_epoch{epoch}.pth").write_bytes(b"")
    assert resolve_model_path(files).name == "pretrain_16_epoch10.pth"


def test_of_several_runs_the_newest_if_asked_for_else_an_error(models):
    folder = models("pretrain_16_epoch0", "full_sft_16_epoch10", "full_sft_16_epoch9", "dpo_16_epoch0", "dpo_8_epoch3")
    with pytest.raises(ValueError, match=re.escape("holds 5 models (dpo_16_epoch0, dpo_8_epoch3, full_sft_16_epoch10")):
        resolve_model_path(folder)
    os.utime(folder / "dpo_16_epoch0", (9000, 9000))
    assert resolve_model_path(folder, newest=True).name == "dpo_16_epoch0"
    assert resolve_model_path(folder, "full_sft").name == "full_sft_16_epoch10"
    assert resolve_model_path(folder, "dpo", newest=True).name == "dpo_16_epoch0"
    with pytest.raises(ValueError, match="holds 5 models"):
        resolve_model_path(folder, "dpo")
    with pytest.raises(ValueError, match="holds dpo_16_epoch0, .*; expected a model named lora_..."):
        resolve_model_path(folder, "lora", newest=True)


def test_folders_below_are_looked_into_as_deep_as_asked(models):
    folder = models("sft_16_epoch0", "sft_16_epoch0/in_epoch0", "a/lora_16_epoch0", "a/b/lora_16_epoch1", ".h_epoch0")
    names = [[model.name for model in last_models(folder, depth=depth)] for depth in (0, 1, 2)]
    assert names[0] == ["sft_16_epoch0"] and names[1] == ["sft_16_epoch0", "lora_16_epoch0"]
    assert names[2] == ["sft_16_epoch0", "lora_16_epoch0", "lora_16_epoch1"]
    assert [model.name for model in last_models(folder, "lora", depth=1)] == ["lora_16_epoch0"]
    assert last_models(folder / "nowhere", depth=2) == []


def test_models_below_are_named(models):
    """`--model_path out/quickstart` said that there was no model."""
    folder = models("a/pretrain_16_epoch0", "a/pretrain_16_epoch1", "b/größe/full_sft_16_epoch0")
    says = f"{folder} itself holds no model, but below it are a/pretrain_16_epoch1, b/größe/full_sft_16_epoch0; give"
    with pytest.raises(ValueError, match=re.escape(says)):
        resolve_model_path(folder)


def test_an_adapter_is_found_like_a_model(models):
    folder = models("lora_16_epoch0", "lora_16_epoch1", "sft/full_sft_16_epoch0")
    for epoch in (0, 1):
        (folder / f"lora_16_epoch{epoch}/config.json").rename(folder / f"lora_16_epoch{epoch}/adapter_config.json")
    assert resolve_adapter_path(folder).name == resolve_adapter_path(folder / "lora_16_epoch1").name == "lora_16_epoch1"
    with pytest.raises(ValueError, match="full_sft_16_epoch0 is a full model; expected an adapter folder"):
        resolve_adapter_path(folder / "sft")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        resolve_adapter_path(folder / "nowhere")


def test_what_is_no_model_is_said_to_be_what_it_is(tmp_path):
    save_state(tmp_path / "dpo_16_state", {"step": 3, "identity": {"stage": "dpo", "num_steps": 3}})
    with pytest.raises(ValueError, match="dpo_16_state holds the training states of a run, and no model; give a model"):
        resolve_model_path(tmp_path / "dpo_16_state")
    with pytest.raises(ValueError, match="https://there/größe is an address; models are read from this machine"):
        resolve_model_path("https://there/größe")
    for name, message in (
        ("a.onnx", "a.onnx is for other programs only; give the model folder that it was made from"),
        ("b", "b is a file without an ending; give its folder"),
        ("c.bin", "c.bin is a .bin file; give its folder"),
    ):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ValueError, match=message):
            resolve_model_path(tmp_path / name)
    (tmp_path / "adapter.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match="adapter.gguf is a file; expected an adapter folder"):
        resolve_adapter_path(tmp_path / "adapter.gguf")
