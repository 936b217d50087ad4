"""Numbers in settings are written as numbers: YAML reads 010 as 8 and 1:30 as 90."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commandline.test_settings import failure, parse
from tinylm.commandline.settings import PATH_SETTING
from tinylm.commandline.strict_yaml import is_odd_number

ODD = ["010", "-010", "08", "00", "1:30", "190:20:30", "1:30.5", "0x10", "0o17", "0b11", "+0x1F"]
PLAIN = ["0", "-0", "10", "-3", "+5", "0.5", ".5", "1.", "1e-3", "1_000", "a:b", "0.010", "x010", ""]


def test_which_numbers_are_odd() -> None:
    assert [text for text in ODD + PLAIN if is_odd_number(text)] == ODD


@pytest.mark.parametrize("number", ODD)
def test_an_odd_number_is_refused(tmp_path: Path, number: str, capsys) -> None:
    assert f"--epochs {number} could be another number; expected decimal" in failure(
        capsys, "--data_path", "x", "--epochs", number
    )
    path = tmp_path / "run.yaml"
    path.write_text(f"data_path: x\nepochs: {number}\n")
    assert f"run.yaml, line 2: not YAML ({number} could be another number; write it in decimal digits" in failure(
        capsys, "--config", str(path)
    )


def test_a_text_may_look_like_a_number(tmp_path: Path) -> None:
    assert parse("--data_path", "010").data_path == "010"
    path = tmp_path / "run.yaml"
    path.write_text("data_path: '1:30'\nepochs: 1_000\nlearning_rate: 1e-3\n")
    settings = parse("--config", str(path))
    assert (settings.data_path, settings.epochs, settings.learning_rate) == ("1:30", 1000, 1e-3)


def test_a_tilde_in_a_path_is_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("data_path: ~/books\n")
    assert parse("--config=~/run.yaml").data_path == f"{tmp_path}/books"
    assert parse("--data_path=~/texts").data_path == f"{tmp_path}/texts"
    assert parse("--data_path=a~/b").data_path == "a~/b"


def test_paths_are_known_by_their_names() -> None:
    for name in ("data_path", "output_dir", "tokenizer_path", "reference_path", "adapter", "output"):
        assert PATH_SETTING.fullmatch(name)
    for name in ("name", "prompt", "system", "device", "path_style", "adapter_name"):
        assert not PATH_SETTING.fullmatch(name)


def test_a_text_in_another_encoding_is_refused(capsys) -> None:
    line = failure(capsys, "--data_path", "caf\udce9.txt")
    assert "--data_path is 'caf\\udce9.txt', which is not UTF-8; expected valid Unicode; rename the file" in line
