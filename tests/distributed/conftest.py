"""What the tests with several processes share: small files in the shapes of each stage, and a tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch import SHAPE, SHARED, Outcome, run

from tests.stage_files import write_stage_files
from tinylm import cli


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """texts.jsonl, chats.jsonl, pairs.jsonl and tokenizer/."""
    folder = tmp_path_factory.mktemp("data")
    write_stage_files(folder)
    words = ["--data_path", folder / "texts.jsonl", "--vocab_size", "400", "--output_dir", folder / "tokenizer"]
    assert cli.main(["tokenizer", *map(str, words)]) == 0
    return folder


@pytest.fixture(scope="session")
def pretrain_words(data) -> list[object]:
    """Flags of a minute pretraining run."""
    texts = ["--data_path", data / "texts.jsonl", "--tokenizer_path", data / "tokenizer"]
    return [*texts, *SHARED, *SHAPE, "--learning_rate", "1e-3"]


class Alone(dict[str, Outcome]):
    """The same run in one process, for each optimizer, made at its first use: what all others are held to."""

    def __init__(self, folder: Path, words: list[object]) -> None:
        super().__init__()
        self.folder, self.words = folder, words

    def __missing__(self, optimizer: str) -> Outcome:
        self[optimizer] = run("pretrain", self.folder / optimizer, [*self.words, "--optimizer", optimizer])
        return self[optimizer]


@pytest.fixture(scope="session")
def alone(tmp_path_factory, pretrain_words) -> Alone:
    return Alone(tmp_path_factory.mktemp("alone"), pretrain_words)
