"""DPO: a model learns which of two answers is preferred, without a reward model.

    tinylm dpo --model_path out/full_sft --data_path preferences.jsonl

pairs -> token ids of both answers -> reference log-probabilities, once -> batches -> DPO loss -> fit -> model folder
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import ClassVar

import torch
from torch import Tensor

from tinylm.commandline.exit_status import run_main
from tinylm.commandline.settings import parse_settings
from tinylm.commandline.terminal import progress
from tinylm.dataset.batches import Batch
from tinylm.dataset.dpo_dataset import DPODataset
from tinylm.model.lora import merge_lora
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.system.cpu_parallel import map_on_cores, num_cores
from tinylm.trainer.core.distributed import is_sharded, reshard, shard
from tinylm.trainer.core.objectives import make_dpo_objective, sequence_log_probs
from tinylm.trainer.recipe_utils import load_parent, make_run, sample_texts, suggest, with_defaults
from tinylm.trainer.run.stage import Learner, Stage, start_stage
from tinylm.trainer.run.train_settings import TrainSettings, require_at_least
from tinylm.trainer.run.validation import batches_of_rank
from tinylm.trainer.stage_data import load_pairs
from tinylm.trainer.train_full_sft import SAMPLE_QUESTIONS


# 1. Settings
@dataclass(frozen=True, kw_only=True)
class DPOSettings(TrainSettings):
    """Settings of DPO."""

    LEARNING_RATES: ClassVar[dict[str, tuple[float, int]]] = {"muon": (1e-4, 512), "adamw": (1e-4, 512)}
    """As in `TrainSettings`; far below fine-tuning's, because the loss only asks for a difference."""

    model_path: str
    """the model to start from, also the reference: a folder, or a .pth of lyuzlion/Tiny-Language-Model"""
    output_dir: str = "out/dpo"
    """folder for the model folders, the training state and the metrics (JSON lines)"""
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


def attach_reference(model: TinyLMForCausalLM, data: DPODataset, stage: Stage) -> None:
    """Compute each answer's log-probability under the current model, once: the reference never changes.

    Each process scores every `world_size`-th batch and leaves the rest at zero. So the sum over all processes holds
    exactly the numbers that a single process would compute.
    """
    model.eval()
    runtime = stage.runtime
    log_probs = torch.zeros(len(data), 2, device=runtime.device)

    @torch.no_grad()
    def score(numbered: tuple[int, Batch]) -> tuple[int, Tensor]:
        start, batch = numbered
        with runtime.autocast():
            return start, sequence_log_probs(model, batch, 2 * batch.count).view(batch.count, 2)

    batches = batches_of_rank(data, stage.settings.batch_size, runtime)
    at_once = 1 if is_sharded(model) else num_cores(runtime.device)  # the processes of a sharded model keep in step
    with progress(stage.console, "reference log-probabilities") as show:
        for start, scores in map_on_cores(score, batches, at_once):
            log_probs[start : start + len(scores)] = scores
            show(f"{start + len(scores):,} of {len(data):,} pairs", start + len(scores), len(data))
    reshard(model)  # a forward pass alone leaves weights together, and the optimizers would be made over those
    data.attach_reference_log_probs(runtime.all_reduce_sum(log_probs).cpu().numpy())


def train(settings: DPOSettings) -> Path:
    """Train on preferences; returns the model folder."""
    # 2. Runtime
    stage = start_stage("dpo", settings)
    # 3. Tokenizer and 4. model: both come from the parent; an adapter is folded in
    model, tokenizer, parent = load_parent(stage, settings.model_path)
    merge_lora(model)
    shard(model, settings.sharding, stage.runtime)
    # 5. Data, with the reference's log-probabilities
    stage = with_defaults(stage, model)
    data = load_pairs(stage, tokenizer, settings.tinyworld_pairs)
    for part in filter(None, data):
        attach_reference(model, part, stage)
    # 6. Optimizer
    optimizers = stage.settings.make_optimizers(model)
    # 7. Fit, saving the model folder after each epoch
    objective, sample = make_dpo_objective(settings.beta), sample_texts(model, tokenizer, *SAMPLE_QUESTIONS, chat=True)
    return make_run(stage, Learner(model, tokenizer, optimizers, objective, sample, parent), data).fit()


def main(argv: list[str]) -> int:
    """The command line: flags -> settings -> train -> what comes next."""
    settings = parse_settings(DPOSettings, argv, "tinylm dpo", "Teach a model which of two answers is preferred.")
    folder, before = train(settings), quote(settings.model_path)
    suggest(folder, "talk to it: tinylm chat", f"compare it with its parent: tinylm eval --reference_path {before}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
