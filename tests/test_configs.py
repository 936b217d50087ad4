"""Every file in configs/ is read by the command it is for."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tinylm.commandline.settings import parse_settings, settings_to_yaml
from tinylm.trainer.train_dpo import DPOSettings
from tinylm.trainer.train_full_sft import FullSFTSettings
from tinylm.trainer.train_lora import LoRASettings
from tinylm.trainer.train_pretrain import PretrainSettings

SETTINGS = {"pretrain": PretrainSettings, "sft": FullSFTSettings, "lora": LoRASettings, "dpo": DPOSettings}
FILES = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def test_there_are_configs():
    assert len(FILES) >= len(SETTINGS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_config_is_valid_and_means_what_it_says(path):
    wanted = yaml.safe_load(path.read_text())
    command = wanted.pop("command")
    settings = parse_settings(SETTINGS[command], ["--config", str(path)], f"tinylm {command}", "")
    assert {name: getattr(settings, name) for name in wanted} == wanted
    assert not any(str(value).startswith("/") for value in wanted.values()), "a path of somebody's machine"
    assert yaml.safe_load(settings_to_yaml(settings)).items() >= wanted.items()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_mistyped_key_is_refused_with_the_nearest(path, tmp_path, capsys):
    command = yaml.safe_load(path.read_text())["command"]
    broken = tmp_path / path.name
    broken.write_text(path.read_text().replace("batch_size:", "batch_sise:"))
    with pytest.raises(SystemExit) as stop:
        parse_settings(SETTINGS[command], ["--config", str(broken)], f"tinylm {command}", "")
    assert stop.value.code == 2
    assert "batch_size" in capsys.readouterr().err
