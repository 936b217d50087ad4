"""Training runs in miniature, for the tests of what is around the loop."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from trainer_parts import Rows, small_model, weights_of

from tinylm.commandline.terminal import make_console
from tinylm.dataset.batches import BatchSampler, StoredSteps
from tinylm.model.lora import LoRAConfig, apply_lora
from tinylm.system.runtime import Runtime
from tinylm.trainer.core.objectives import next_token_loss
from tinylm.trainer.core.optimizer import make_optimizers
from tinylm.trainer.run.run import Run
from tinylm.trainer.run.stage import Learner, Plan, Stage
from tinylm.trainer.run.train_settings import TrainSettings

DEFAULTS = {"batch_size": 2, "accumulation_steps": 2, "epochs": 4, "max_steps": 10, "learning_rate": 1e-2}
INTERVALS = {"save_interval": 3, "log_interval": 1, "eval_interval": 2, "warmup_fraction": 0.2}


def make_run(
    folder: Path, data=None, seed=0, dropout=0.2, dtype=torch.float32, lora=0, shape=None, ranks=(0, 1), parent=None,
    **changes,
):  # fmt: skip
    """13 rows, 2 to a batch, 2 batches to a step: 4 steps an epoch, the last of a single batch with a single row."""
    if "seed_setting" in changes:  # `seed` is the model's
        changes["seed"] = changes.pop("seed_setting")
    settings = TrainSettings(**{**DEFAULTS, **INTERVALS, "output_dir": str(folder), **changes})
    model = small_model(seed, hidden_dropout=dropout, attention_dropout=dropout, **(shape or {}))
    if lora:
        apply_lora(model, LoRAConfig(rank=lora))

    def save(place: Path, lineage: dict) -> None:
        place.mkdir(parents=True, exist_ok=True)
        save_file(weights_of(model), place / "model.safetensors")
        (place / "lineage.json").write_text(json.dumps(lineage))

    runtime = Runtime(torch.device("cpu"), dtype, *ranks, seed=settings.seed)
    optimizers = make_optimizers(model, settings.optimizer, settings.learning_rate, settings.weight_decay)
    sample = lambda: [f"drawn: {torch.rand(1).item() < 2}"]  # noqa: E731 (it also moves the random generator)
    learner = Learner(model, None, optimizers, next_token_loss, sample, save_folder=save)
    rows, rank, world_size = data or Rows(13), *ranks
    rows_per_step = settings.batch_size * settings.accumulation_steps * world_size
    sampler = BatchSampler(len(rows), settings.batch_size, rows_per_step, settings.seed, rank, world_size)
    plan = Plan(settings, runtime, StoredSteps(rows, sampler, settings.num_workers))
    stage = Stage("pretrain", settings, runtime, make_console(file=io.StringIO(), width=400))
    return Run(stage, learner, plan, Rows(3, seed=9), {"parent": parent or {"path": "out/sft", "weights": "abc"}})


def said(run: Run) -> str:
    return run.stage.console.file.getvalue()


def interrupt_at(run: Run, step: int) -> None:
    evaluate = run._evaluate

    def stop(now):
        evaluate(now)
        if now == step:
            raise KeyboardInterrupt

    run._evaluate = stop
    with pytest.raises(KeyboardInterrupt):
        run.fit()


def records(folder: Path) -> list[dict]:
    lines = (folder / "pretrain_16_metrics.jsonl").read_text().splitlines()
    timing = ("tokens_per_second", "matmul_share")
    return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in lines]
