"""All stages on a GPU as a user runs them: interrupted and resumed to the bit, then asked something."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.command_line import SHAPE, tinylm
from tests.stage_files import write_stage_files
from tinylm.checkpoint.loading import load_for_use
from tinylm.generation.engine import Engine, SamplingSettings

QUICK = ["--batch_size", "4", "--epochs", "2", "--log_interval", "1", "--save_interval", "2", "--num_workers", "2"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_stage_files(folder)
    return folder


def words(stage: str, files: Path, model: Path | None) -> list:
    data = {"pretrain": "texts", "sft": "chats", "lora": "chats", "dpo": "pairs"}[stage]
    shape = [*SHAPE, "--max_seq_len", "128"] if stage == "pretrain" else ["--model_path", model]
    optimizer = ["--optimizer", "muon"] if stage in ("pretrain", "sft") else []
    return [stage, "--data_path", files / f"{data}.jsonl", *shape, *optimizer, *QUICK]


def run(*command) -> str:
    status, heard = tinylm(*command)
    assert status == 0 and "torch.compile failed" not in heard, heard
    return heard


def weights(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob("*_epoch1/*.safetensors"))}


@pytest.mark.parametrize(
    "extra", [[], ["--use_compile", "1"], ["--dtype", "float16"]], ids=["bf16", "compiled", "fp16"]
)
def test_pretraining_resumes_to_the_bit(files, tmp_path, extra):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command = [*words("pretrain", files, None), *extra]
    heard = run(*command, "--output_dir", whole)
    assert "cuda" in heard
    # With --max_steps the schedule would be another: the run is stopped by a signal instead.
    stop_after(3)
    status, heard = tinylm(*command, "--output_dir", parts)
    assert status != 0, heard
    run(*command, "--output_dir", parts, "--resume")
    assert weights(whole) and weights(whole) == weights(parts)


def stop_after(step: int) -> None:
    """Send SIGTERM to this process when a run's `step`-th step is done."""
    import os
    import signal

    from tinylm.trainer.run.run import Run

    plain = Run._log

    def log(self, report) -> None:
        plain(self, report)
        if report.step == step:
            Run._log = plain
            os.kill(os.getpid(), signal.SIGTERM)

    Run._log = log


def test_all_stages_then_a_question_and_the_scores(files, tmp_path):
    run(*words("pretrain", files, None), "--output_dir", tmp_path / "pretrain")
    for stage, parent in (("sft", "pretrain"), ("lora", "sft"), ("dpo", "sft")):
        command = words(stage, files, tmp_path / parent)
        heard = run(*command, "--output_dir", tmp_path / stage)
        metrics = next((tmp_path / stage).glob("*metrics*.jsonl")).read_text().splitlines()
        losses = [record["loss"] for record in map(json.loads, metrics) if "loss" in record]
        assert losses and losses[-1] < losses[0], (stage, losses, heard)
        assert run("verify", tmp_path / stage)
    assert run("chat", "--model_path", tmp_path / "dpo", "--prompt", "What is the opposite of big?").strip()


def test_greedy_text_in_float32_is_that_of_the_cpu(files, tmp_path):
    run(*words("pretrain", files, None), "--output_dir", tmp_path)
    settings = SamplingSettings(max_new_tokens=40, temperature=0.0)
    texts = {}
    for device in ("cpu", "cuda"):
        loaded = load_for_use(str(tmp_path), device=torch.device(device))
        engine = Engine(loaded.model, loaded.tokenizer, dtype=torch.float32)
        texts[device] = "".join(engine.stream_text(loaded.tokenizer.encode("Once upon a time"), settings))
        many = engine.reply_batch([[{"role": "user", "content": text}] for text in ("Hi", "What is a cow? Tell me!")],
                                  settings)  # fmt: skip
        texts[device] += "|".join(many)
    assert texts["cpu"] == texts["cuda"] and len(texts["cpu"]) > 20
