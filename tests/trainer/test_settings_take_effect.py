"""Flags that could be dropped on the way from the command line to the loop with nobody noticing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.command_line import SHAPE, tinylm
from tests.stage_files import write_stage_files
from tinylm.checkpoint.training_state import read_training_values
from tinylm.trainer.core import loop

SHARED = [
    "--device", "cpu", "--dtype", "float32", "--max_seq_len", "128", "--batch_size", "4", "--learning_rate", "1e-2",
    "--warmup_fraction", "0", "--weight_decay", "0", "--optimizer", "adamw", "--eval_batches", "0", "--seed", "5",
    "--validation_fraction", "0.2",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """texts.jsonl, chats.jsonl, tokenizer/ and pretrain/, a model."""
    folder = tmp_path_factory.mktemp("data")
    write_stage_files(folder)
    texts = ["--data_path", folder / "texts.jsonl"]
    for words in (
        ["tokenizer", *texts, "--vocab_size", "400"],
        ["pretrain", *pretrain_words(folder), "--max_steps", "3"],
    ):
        status, said = tinylm(*words, "--output_dir", folder / words[0])
        assert status == 0, said
    return folder


def pretrain_words(data: Path) -> list[object]:
    return ["--data_path", data / "texts.jsonl", "--tokenizer_path", data / "tokenizer", *SHARED, *SHAPE]


@pytest.mark.slow
def test_grad_clip_reaches_the_loop(data, tmp_path):
    """AdamW divides a gradient by its size plus 1e-8, so only a gradient cut far below that takes smaller steps."""
    moved = {}
    for grad_clip in ("0", "1e-11"):
        words = [*pretrain_words(data), "--max_steps", "2", "--grad_clip", grad_clip]
        status, said = tinylm("pretrain", *words, "--output_dir", tmp_path / grad_clip)
        assert status == 0, said
        moved[grad_clip] = float(re.search(r"weights moved +([\d.]+)%", said)[1])
    assert moved["0"] > 5 and moved["1e-11"] < 0.1, "in percent"


@pytest.mark.slow
def test_lora_dropout_reaches_the_adapter(data, tmp_path):
    adapters = []
    for name, dropout in (("without", 0.0), ("with", 0.4), ("again", 0.4)):
        words = ["--model_path", data / "pretrain", "--data_path", data / "chats.jsonl", *SHARED, "--max_steps", "3"]
        status, said = tinylm("lora", *words, "--lora_dropout", dropout, "--output_dir", tmp_path / name)
        assert status == 0, said
        (folder,) = (tmp_path / name).glob("lora_*_epoch0")
        assert json.loads((folder / "adapter_config.json").read_text())["lora_dropout"] == dropout
        adapters.append(load_file(folder / "adapter_model.safetensors"))
    without, dropped, again = adapters
    assert all(torch.equal(dropped[name], again[name]) for name in dropped), "the seed decides what is dropped"
    assert not any(torch.equal(dropped[name], without[name]) for name in dropped if "lora_B" in name)


@pytest.mark.slow
def test_states_are_saved_again_after_a_skipped_step(data, tmp_path, monkeypatch):
    """No state is saved right behind a step whose loss was no number. The count of such steps was never set back by
    the good one after it would mean: no state until the end of the run.
    """
    accumulate, calls = loop.accumulate_gradients, []

    def poisoned(*arguments, **options):
        totals = accumulate(*arguments, **options)
        calls.append(len(calls) + 1)
        if calls[-1] == 4:
            totals["loss"] = totals["loss"] * float("nan")
        if calls[-1] == 9:
            raise RuntimeError("the power is cut")
        return totals

    monkeypatch.setattr(loop, "accumulate_gradients", poisoned)
    words = [*pretrain_words(data), "--max_steps", "10", "--log_interval", "1", "--save_interval", "2"]
    words += ["--output_dir", tmp_path]
    status, said = tinylm("pretrain", *words)
    assert status == 1 and "the power is cut" in said, said
    (state,) = tmp_path.glob("pretrain_*_state")
    assert sorted(path.name for path in state.glob("step_*")) == ["step_00000006", "step_00000008"]
    assert read_training_values(state)["num_skipped"] == 1
    monkeypatch.setattr(loop, "accumulate_gradients", accumulate)
    status, said = tinylm("pretrain", *words, "--resume")
    assert status == 0 and "from step 8" in said, said
    (lineage,) = tmp_path.glob("pretrain_*_epoch*/lineage.json")
    assert json.loads(lineage.read_text())["skipped_steps"] == 1
    losses = {
        record["step"]: record["loss"]
        for record in map(json.loads, next(tmp_path.glob("*_metrics.jsonl")).read_text().splitlines())
        if "loss" in record
    }
    assert [step for step, loss in losses.items() if loss is None] == [4] and sorted(losses) == list(range(1, 11))
