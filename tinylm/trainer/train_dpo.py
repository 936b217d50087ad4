"""DPO: a model learns which of two answers is preferred, without a reward model.

    tinylm dpo --model_path out/full_sft --data_path preferences.jsonl

pairs -> token ids of both answers -> reference log-probabilities, once -> batches -> DPO loss -> fit -> model folder
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from tinylm.checkpoint.model_folder import save_model
from tinylm.commandline.exit_status import run_main
from tinylm.commandline.settings import parse_settings
from tinylm.dataset.dpo_dataset import DPODataset
from tinylm.model.lora import merge_lora
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.system.cpu_parallel import map_on_cores, num_cores
from tinylm.system.runtime import Runtime, seed_everything, setup_runtime
from tinylm.trainer.core.objectives import make_dpo_objective, sequence_log_probs
from tinylm.trainer.recipe_utils import load_parent, make_run, sampler_of
from tinylm.trainer.run.train_settings import TrainSettings, require_at_least
from tinylm.trainer.run.trainer_utils import make_console, status
from tinylm.trainer.stage_data import load_pairs
from tinylm.trainer.train_full_sft import SAMPLE_QUESTIONS


@dataclass(frozen=True, kw_only=True)
class DPOSettings(TrainSettings):
    """Settings of DPO."""

    model_path: str
    """the model to start from, which is the reference too: a folder, or a .pth of the original project"""
    output_dir: str = "out/dpo"
    """folder for the model folders, the training state and the metrics (JSON lines)"""
    learning_rate: float = 5e-5
    """peak learning rate; far below fine-tuning's, since the loss only asks for a difference"""
    weight_decay: float = 0.0
    """decay of matrices, times the learning rate, per step"""
    beta: float = 0.1
    """strength of the pull towards the reference model"""
    hidden_size: int = 0
    """if given, must be the model's width (the original project's flag)"""
    num_hidden_layers: int = 0
    """if given, must be the model's number of blocks (the original project's flag)"""
    tinyworld_pairs: int = 3_000
    """preference pairs of TinyWorld to train on when there is no data_path"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "tinyworld_pairs")


def attach_reference(
    model: TinyLMForCausalLM, data: DPODataset, settings: DPOSettings, runtime: Runtime, console: Console
) -> None:
    """Log-probabilities of every answer under the model as it is now, computed once: the reference never changes.

    Each process scores every `world_size`-th batch. Where it scored nothing it has zeros, so the sum over all
    processes holds every number exactly as one process alone would have it.
    """
    model.eval()
    log_probs = torch.zeros(len(data), 2, device=runtime.device)
    size = settings.batch_size
    starts = range(runtime.rank * size, len(data), runtime.world_size * size)

    @torch.no_grad()
    def score(start: int) -> Tensor:
        batch = data.collate([data.row(index) for index in range(start, min(start + size, len(data)))])
        batch = batch.to(runtime.device)
        with runtime.autocast():
            return sequence_log_probs(model, batch, 2 * batch.count).view(batch.count, 2)

    with status(console, "reference log-probabilities") as progress:
        for start, scores in zip(starts, map_on_cores(score, starts, num_cores(runtime.device)), strict=True):
            log_probs[start : start + size] = scores
            progress(f"{start + len(scores):,} of {len(data):,} pairs")
    data.attach_reference_log_probs(runtime.all_reduce_sum(log_probs).cpu().numpy())


def train(settings: DPOSettings) -> Path:
    """Train on preferences; returns the model folder."""
    # 1. Runtime
    runtime = setup_runtime(settings.device, settings.dtype, settings.timeout)
    console = make_console(runtime.is_main)
    seed_everything(settings.seed)
    # 2. Tokenizer and 4. model: the parent brings both; an adapter is folded in
    settings, model, tokenizer, parent = load_parent(settings.model_path, settings, runtime, console)
    merge_lora(model)
    # 3. Data, with the reference's view of it
    data = load_pairs(settings, settings.tinyworld_pairs, tokenizer, console)
    for part in filter(None, data):
        attach_reference(model, part, settings, runtime, console)
    # 5. Optimizer
    optimizers = settings.make_optimizers(model, runtime)
    # 6. Fit, saving the model folder after each epoch
    run = make_run(
        "dpo", settings, runtime, console, tokenizer, model, optimizers, data, make_dpo_objective(settings.beta),
        save=lambda folder, lineage: save_model(folder, model, tokenizer, lineage),
        sample=sampler_of(model, tokenizer, *SAMPLE_QUESTIONS, chat=True),
        parent=parent,
    )  # fmt: skip
    return run.fit()


def main(argv: list[str]) -> int:
    """The command line: flags -> settings -> train."""
    train(parse_settings(DPOSettings, argv, "tinylm dpo", "Teach a model which of two answers is preferred."))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
