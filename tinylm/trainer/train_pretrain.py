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
from tinylm.dataset.shards.shared_cache import shared_cache
from tinylm.model.model_tinylm import TinyLMConfig, TinyLMForCausalLM
from tinylm.tokenizer.tokenizer import Tokenizer
from tinylm.trainer.core.distributed import shard
from tinylm.trainer.core.objectives import next_token_loss
from tinylm.trainer.recipe_utils import DEFAULT_SEQ_LEN, make_run, sample_texts, suggest, with_defaults, with_preset
from tinylm.trainer.run.stage import Learner, start_stage
from tinylm.trainer.run.train_settings import TrainSettings, require_at_least
from tinylm.trainer.stage_data import load_texts

ROW_LENGTHS = {"tiny": 256}  # preset -> default tokens of a row, where they differ from `DEFAULT_SEQ_LEN`


# 1. Settings
@dataclass(frozen=True, kw_only=True)
class PretrainSettings(TrainSettings):
    """Settings of pretraining."""

    output_dir: str = "out/pretrain"
    """folder for models, training state and metrics (JSON lines)"""
    optimizer: Literal["adamw", "muon"] = "muon"
    """adamw, or muon (with adamw for embeddings and norms)"""
    max_seq_len: int = 0
    """tokens of a packed row, and the model's context; 0 means 256 for the preset tiny, else 512"""
    preset: Literal["auto", "tiny", "small", "large"] = "auto"
    """shape of the model: tiny (about 3M parameters), small (26M) or large (104M); auto is tiny on a CPU and small on a
    GPU, and small where --hidden_size or another number of the shape is given"""
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
    qk_norm: bool = True
    """normalise queries and keys, as Qwen3 does; without it the model has Llama's shape"""
    dropout: float = 0.0
    """dropout probability"""
    read_control_tokens: bool = False
    """read control tokens spelt in the text, such as <|im_start|>, as these tokens; by default they are letters"""
    tinyworld_documents: int = 14_000
    """documents of TinyWorld to train on when there is no data_path"""
    cache_dir: str | None = None
    """folder for the token shards of all runs; by default $TINYLM_CACHE_DIR or the user's cache folder"""
    cache_gb: float | None = None
    """bound of that folder in GB; by default $TINYLM_CACHE_GB or 10; 0 keeps token shards in output_dir instead"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "tinyworld_documents")
        shared_cache(self.cache_dir, self.cache_gb)  # refuses a bound that is not a number of gigabytes
        require_at_least(2 if self.max_seq_len else 0, self, "max_seq_len")  # a token to read and one to predict

    @property
    def widths(self) -> dict[str, int]:
        """The widths and numbers that replace the preset's."""
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    def model_config(self, vocab_size: int, **roles: int) -> TinyLMConfig:
        """The preset with the widths given, for a tokenizer of `vocab_size` and `role_ids`, rows of `max_seq_len`."""
        return TinyLMConfig.preset(
            self.preset,
            vocab_size=vocab_size,
            max_position_embeddings=self.max_seq_len or ROW_LENGTHS.get(self.preset, DEFAULT_SEQ_LEN),
            position_embedding_type=self.position_embedding_type,
            qk_norm=self.qk_norm,
            hidden_dropout=self.dropout,
            attention_dropout=self.dropout,
            **(self.widths | roles),
        )


def train(settings: PretrainSettings) -> Path:
    """Pretrain a model; returns its folder."""
    # 2. Runtime
    stage = with_preset(start_stage("pretrain", settings))
    # 3. Tokenizer
    tokenizer = Tokenizer.load(settings.tokenizer_path) if settings.tokenizer_path else Tokenizer.default()
    # 4. Model
    model = TinyLMForCausalLM(stage.settings.model_config(tokenizer.vocab_size, **tokenizer.role_ids))
    shard(model.to(stage.runtime.device), settings.sharding, stage.runtime)
    # 5. Data
    stage, cache = with_defaults(stage, model), shared_cache(settings.cache_dir, settings.cache_gb)
    data = load_texts(stage, tokenizer, settings.tinyworld_documents, cache)
    # 6. Optimizer
    optimizers = stage.settings.make_optimizers(model)
    # 7. Fit, saving the model folder after each epoch
    sample = sample_texts(model, tokenizer, "Once upon a time")
    return make_run(stage, Learner(model, tokenizer, optimizers, next_token_loss, sample), data).fit()


def main(argv: list[str]) -> int:
    """The command line: flags -> settings -> train -> what comes next."""
    settings = parse_settings(PretrainSettings, argv, "tinylm pretrain", "Train a model on plain text from scratch.")
    suggest(train(settings), "continue a text: tinylm chat", "teach it to answer: tinylm sft")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
