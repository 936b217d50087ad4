"""LoRA: a small adapter learns something new, and the model's own weights do not change.

    tinylm lora --model_path out/full_sft --data_path identity.jsonl --name Ada --author me

The same as full fine-tuning, with `apply_lora` before the optimizer. The result is a PEFT adapter folder.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tinylm.checkpoint.adapter_folder import save_adapter
from tinylm.commandline.exit_status import run_main
from tinylm.commandline.settings import parse_settings
from tinylm.dataset import tinyworld
from tinylm.model.lora import PROJECTIONS, LoRAConfig, apply_lora, has_lora
from tinylm.trainer.core.distributed import shard
from tinylm.trainer.core.objectives import next_token_loss
from tinylm.trainer.recipe_utils import (
    load_parent,
    make_run,
    sample_texts,
    suggest,
    warn_of_unlearnt_tokens,
    with_defaults,
)
from tinylm.trainer.run.stage import Learner, start_stage
from tinylm.trainer.stage_data import load_chats
from tinylm.trainer.train_full_sft import SAMPLE_QUESTIONS, ChatTrainSettings


# 1. Settings
@dataclass(frozen=True, kw_only=True)
class LoRASettings(ChatTrainSettings):
    """Settings of LoRA fine-tuning."""

    LEARNING_RATES: ClassVar[dict[str, tuple[float, int]]] = {"muon": (5e-3, 512), "adamw": (4e-3, 256)}
    """As in `TrainSettings`, for adapters, which start from zero and have far fewer weights."""

    output_dir: str = "out/lora"
    """folder for the adapter folders, the training state and the metrics (JSON lines)"""
    weight_decay: float = 0.0
    """decay of the adapters' matrices, times the learning rate, per step"""
    lora_rank: int = 8
    """inner width of the adapters"""
    lora_alpha: float = 16.0
    """the adapter's output is multiplied by alpha / rank"""
    lora_dropout: float = 0.0
    """dropout probability on the adapter's input"""
    target_modules: tuple[str, ...] = PROJECTIONS
    """layers to adapt: of the seven projections, embed_tokens and lm_head"""
    tinyworld_chats: int = 3_000
    """persona chats of TinyWorld to train on when there is no data_path"""

    @property
    def lora_config(self) -> LoRAConfig:
        """The adapter's shape."""
        return LoRAConfig(self.lora_rank, self.lora_alpha, self.lora_dropout, tuple(self.target_modules))


def train(settings: LoRASettings) -> Path:
    """Train an adapter; returns its folder."""
    # 2. Runtime
    stage = start_stage("lora", settings)
    # 3. Tokenizer and 4. model: both come from the parent
    model, tokenizer, parent = load_parent(stage, settings.model_path)
    if has_lora(model):
        raise ValueError(f"{settings.model_path} is an adapter; fold it into its model first, with tinylm merge")
    if settings.lora_rank > model.config.hidden_size:
        raise ValueError(
            f"lora_rank is {settings.lora_rank}, more than the model's width of {model.config.hidden_size}: such an "
            "adapter is larger than the weights that it adapts; pass --lora_rank 8"
        )
    apply_lora(model, settings.lora_config)
    shard(model, settings.sharding, stage.runtime)
    # 5. Data
    stage = with_defaults(stage, model)
    persona = tinyworld.persona_conversations
    data = load_chats(stage, tokenizer, settings.tinyworld_chats, settings.replacements, persona)
    warn_of_unlearnt_tokens(stage, model, tokenizer, data[0].documents)
    # 6. Optimizer
    optimizers = stage.settings.make_optimizers(model)

    # 7. Fit, saving the adapter folder after each epoch
    def save(folder: Path, lineage: dict[str, Any]) -> None:
        # relative, so that both can be moved together, and without links, because `..` does not lead back through them
        base = os.path.relpath(os.path.realpath(parent["path"]), os.path.realpath(folder))
        save_adapter(model, folder, base, lineage)

    sample = sample_texts(model, tokenizer, *SAMPLE_QUESTIONS, chat=True)
    return make_run(stage, Learner(model, tokenizer, optimizers, next_token_loss, sample, parent, save), data).fit()


def main(argv: list[str]) -> int:
    """The command line: flags -> settings -> train -> what comes next."""
    folder = train(
        parse_settings(
            LoRASettings, argv, "tinylm lora", "Fine-tune a small adapter of a frozen model on conversations."
        )
    )
    suggest(folder, "talk to it: tinylm chat", "fold it into its model: tinylm merge")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
