"""Full supervised fine-tuning: a base model learns to answer, and all its weights are trained.

    tinylm sft --model_path out/pretrain --data_path chats.jsonl

chats -> token ids + loss mask (what the assistant wrote) -> packed rows -> batches -> loss -> fit -> model folder
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from tinylm.commandline.exit_status import run_main
from tinylm.commandline.settings import parse_settings
from tinylm.model.lora import merge_lora
from tinylm.trainer.core.distributed import shard
from tinylm.trainer.core.objectives import next_token_loss
from tinylm.trainer.recipe_utils import load_parent, make_run, sample_texts, suggest, with_defaults
from tinylm.trainer.run.stage import Learner, start_stage
from tinylm.trainer.run.train_settings import TrainSettings, require_at_least
from tinylm.trainer.stage_data import load_chats

SAMPLE_QUESTIONS = ("Who are you?", "What is the opposite of big?")


# 1. Settings
@dataclass(frozen=True, kw_only=True)
class ChatTrainSettings(TrainSettings):
    """Settings of fine-tuning on chats."""

    model_path: str
    """the model to start from: a model folder, a stage's output folder, or a .pth of lyuzlion/Tiny-Language-Model"""
    name: str = ""
    """replaces {{name}} in the data"""
    author: str = ""
    """replaces {{author}} in the data"""
    hidden_size: int = 0
    """if given, must be the model's width (the original project's flag)"""
    num_hidden_layers: int = 0
    """if given, must be the model's number of blocks (the original project's flag)"""
    tinyworld_chats: int = 24_000
    """chats of TinyWorld to train on when there is no data_path"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "tinyworld_chats")

    @property
    def replacements(self) -> dict[str, str]:
        """Texts for the {{...}} places in the data."""
        return {key: value for key, value in (("name", self.name), ("author", self.author)) if value}


@dataclass(frozen=True, kw_only=True)
class FullSFTSettings(ChatTrainSettings):
    """Settings of full fine-tuning."""

    LEARNING_RATES: ClassVar[dict[str, tuple[float, int]]] = {"muon": (3e-3, 512), "adamw": (1e-3, 256)}
    """As in `TrainSettings`, for fine-tuning: half of pretraining's with Muon, so that less is forgotten."""

    output_dir: str = "out/full_sft"
    """folder for the model folders, the training state and the metrics (JSON lines)"""
    optimizer: Literal["adamw", "muon"] = "muon"
    """adamw, or muon (with adamw for embeddings and norms)"""
    weight_decay: float = 0.0
    """decay of matrices, times the learning rate, per step"""


def train(settings: FullSFTSettings) -> Path:
    """Fine-tune all weights; returns the model folder."""
    # 2. Runtime
    stage = start_stage("full_sft", settings)
    # 3. Tokenizer and 4. model: both come from the parent; an adapter is folded in
    model, tokenizer, parent = load_parent(stage, settings.model_path)
    merge_lora(model)
    shard(model, settings.sharding, stage.runtime)
    # 5. Data
    stage = with_defaults(stage, model)
    data = load_chats(stage, tokenizer, settings.tinyworld_chats, settings.replacements)
    # 6. Optimizer
    optimizers = stage.settings.make_optimizers(model)
    # 7. Fit, saving the model folder after each epoch
    sample = sample_texts(model, tokenizer, *SAMPLE_QUESTIONS, chat=True)
    return make_run(stage, Learner(model, tokenizer, optimizers, next_token_loss, sample, parent), data).fit()


def main(argv: list[str]) -> int:
    """The command line: flags -> settings -> train -> what comes next."""
    folder = train(
        parse_settings(FullSFTSettings, argv, "tinylm sft", "Fine-tune all weights of a model on conversations.")
    )
    suggest(folder, "talk to it: tinylm chat", "teach it which answers are better: tinylm dpo")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
