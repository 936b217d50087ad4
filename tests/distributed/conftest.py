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


@pytest.fixture(scope="session")
def alone(tmp_path_factory, pretrain_words) -> dict[str, Outcome]:
    """The same run in one process, for each optimizer: what all others are held to."""
    return {
        optimizer: run("pretrain", tmp_path_factory.mktemp(optimizer), [*pretrain_words, "--optimizer", optimizer])
        for optimizer in ("adamw", "muon")
    }
