"""Pretraining: a model learns to predict the next token of plain text.

    tinylm pretrain --data_path books/            (or: cd trainer && torchrun --nproc_per_node=4 train_pretrain.py)

text -> records -> token ids -> shards on disk -> packed rows -> batches -> model -> loss -> fit -> model folder
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tinylm.commandline.exit_status import run_main
from tinylm.commandline.settings import parse_settings
from tinylm.model.model_tinylm import TinyLMConfig, TinyLMForCausalLM
from tinylm.tokenizer.tokenizer import Tokenizer
from tinylm.trainer.core.distributed import shard
from tinylm.trainer.core.objectives import next_token_loss
from tinylm.trainer.recipe_utils import make_run, sample_texts, suggest
from tinylm.trainer.run.run_folder import RunFolder
from tinylm.trainer.run.stage import Learner, start_stage
from tinylm.trainer.run.train_settings import TrainSettings, require_at_least
from tinylm.trainer.stage_data import load_texts


# 1. Settings
@dataclass(frozen=True, kw_only=True)
class PretrainSettings(TrainSettings):
    """Settings of pretraining."""

    output_dir: str = "out/pretrain"
    """folder for models, training state and metrics (JSON lines)"""
    optimizer: Literal["adamw", "muon"] = "muon"
    """adamw, or muon (with adamw for embeddings and norms)"""
    max_seq_len: int = 512
    """tokens of a packed row, and the model's context"""
    preset: Literal["tiny", "small", "large"] = "small"
    """shape of the model: tiny (about 3M parameters), small (26M) or large (104M)"""
    hidden_size: int = 0
    """width of the model; 0 takes the preset's"""
    num_hidden_layers: int = 0
    """number of blocks; 0 takes the preset's"""
    num_attention_heads: int = 0
    """query heads; 0 takes the preset's"""
    num_key_value_heads: int = 0
    """key/value heads (as many as query heads: multi-head; 1: multi-query); 0 takes the preset's"""
    position_embedding_type: Literal["rope", "sinusoidal", "learned"] = "rope"
    """how positions enter the model; only rope can be exported"""
    qk_norm: bool = False
    """normalise queries and keys, as Qwen3 does"""
    dropout: float = 0.0
    """dropout probability"""
    tinyworld_documents: int = 14_000
    """documents of TinyWorld to train on when there is no data_path"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "tinyworld_documents")
        require_at_least(2, self, "max_seq_len")  # one token to read and one to predict

    def model_config(self, vocab_size: int) -> TinyLMConfig:
        """The preset with the widths given, for a tokenizer of `vocab_size` and rows of `max_seq_len`."""
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        widths = {name: getattr(self, name) for name in names if getattr(self, name)}
        return TinyLMConfig.preset(
            self.preset,
            vocab_size=vocab_size,
            max_position_embeddings=self.max_seq_len,
            position_embedding_type=self.position_embedding_type,
            qk_norm=self.qk_norm,
            hidden_dropout=self.dropout,
            attention_dropout=self.dropout,
            **widths,
        )


def train(settings: PretrainSettings) -> Path:
    """Pretrain a model; returns its folder."""
    # 2. Runtime
    stage = start_stage("pretrain", settings)
    # 3. Tokenizer
    tokenizer = Tokenizer.load(settings.tokenizer_path) if settings.tokenizer_path else Tokenizer.default()
    # 4. Model
    config = settings.model_config(tokenizer.vocab_size)
    RunFolder(stage, config.hidden_size).require_free()
    model = TinyLMForCausalLM(config).to(stage.runtime.device)
    shard(model, settings.sharding, stage.runtime)
    # 5. Data
    data = load_texts(stage, tokenizer, settings.tinyworld_documents)
    # 6. Optimizer
    optimizers = settings.make_optimizers(model)
    # 7. Fit, saving the model folder after each epoch
    sample = sample_texts(model, tokenizer, "Once upon a time")
    return make_run(stage, Learner(model, tokenizer, optimizers, next_token_loss, sample), data).fit()


def main(argv: list[str]) -> int:
    """The command line: flags -> settings -> train -> what comes next."""
    folder = train(
        parse_settings(PretrainSettings, argv, "tinylm pretrain", "Train a model on plain text from scratch.")
    )
    suggest(folder, "continue a text: tinylm chat", "teach it to answer: tinylm sft")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
