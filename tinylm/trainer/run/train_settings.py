"""The settings that all training stages share; the dataclass of each stage adds its own.

A field is a flag and a YAML key; the text below it is its help. The names are those of the original project,
lyuzlion/Tiny-Language-Model.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.system.runtime import DtypeName
from tinylm.trainer.core.optimizer import cosine_with_warmup, make_optimizers


def require_at_least(least: int, settings: Any, *names: str) -> None:
    """Raise ValueError for the first of the settings `names` that is below `least`."""
    for name in names:
        value = getattr(settings, name)
        if value < least:
            raise ValueError(f"{name} is {value}; expected at least {least}; pass --{name} {least} or more")


def require_share(settings: Any, *names: str) -> None:
    """Raise ValueError for the first of the settings `names` that is not from 0 to below 1."""
    for name in names:
        if not 0 <= getattr(settings, name) < 1:
            raise ValueError(f"{name} is {getattr(settings, name)}; expected a share from 0 to below 1")


def require_output_dir(settings: Any) -> None:
    """Raise ValueError if `output_dir` is empty, which would mean the working directory, or if it is below a file.

    This check comes before the text is read and tokenised, which may take an hour.
    """
    if not settings.output_dir.strip():
        raise ValueError("output_dir is empty; expected the path of a folder, such as --output_dir out")
    path = Path(settings.output_dir)
    there = next((place for place in (path, *path.parents) if os.path.exists(place)), None)
    if there is not None and not os.path.isdir(there):
        raise ValueError(f"output_dir is {path}, but {there} is a file; expected a folder; choose another --output_dir")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of every training stage."""

    LEARNING_RATES: ClassVar[dict[str, tuple[float, int]]] = {"muon": (6e-3, 512), "adamw": (1e-3, 256)}
    """Optimizer -> (peak learning rate by default, largest width it was measured at); see docs/training.md."""

    output_dir: str = "out"
    """folder for the model folders, the training state and the metrics (JSON lines)"""
    data_path: str | None = None
    """training data: files, folders, globs or addresses (s3://...), comma-separated; without it TinyWorld"""
    validation_path: str | None = None
    """held-out data; without it a part of the training data is held out"""
    validation_fraction: float = 0.01
    """share of the training data held out when there is no validation_path"""
    max_bad_rows: float = 0.001
    """share of rows that may be broken (listed and skipped) before the data is refused"""
    tokenizer_path: str | None = None
    """tokenizer folder; by default the model's own, or the one that comes with the project"""

    epochs: int = 1
    """passes over the training data"""
    max_steps: int = 0
    """optimizer steps to do, however many epochs they take; 0 means those of --epochs"""
    batch_size: int = 8
    """rows (or preference pairs) of a micro-batch, per process"""
    accumulation_steps: int = 1
    """micro-batches whose gradients are added up for one optimizer step"""
    max_seq_len: int = 0
    """tokens of a packed row; 0 means the model's context, but at most 512"""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon (with adamw for embeddings and norms)"""
    learning_rate: float | None = None
    """peak learning rate; by default by stage, optimizer and the model's width (docs/training.md)"""
    weight_decay: float = 0.1
    """decay of matrices, times the learning rate, per step"""
    beta1: float = 0.9
    """Adam's decay of the gradient average"""
    beta2: float = 0.95
    """Adam's decay of the squared gradient average"""
    warmup_fraction: float = 0.02
    """share of the steps over which the learning rate rises to its peak"""
    final_lr_fraction: float = 0.1
    """the cosine ends at this share of the peak"""
    grad_clip: float = 1.0
    """largest global gradient norm; 0 turns clipping off"""

    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps"""
    dtype: DtypeName = "auto"
    """precision of matrix products; auto is bfloat16 where the hardware has it, else float32; weights stay float32"""
    sharding: Literal["none", "fsdp"] = "none"
    """with several processes: none (each holds the whole model) or fsdp (each holds a share of every weight)"""
    timeout: float = 600.0
    """seconds after which a process that does not answer counts as lost, with several processes"""
    num_workers: int = 0
    """threads that prepare batches ahead"""
    use_compile: bool | Literal["auto"] = "auto"
    """run the model through torch.compile (on a CPU it needs a C++ compiler); auto: where it saves time"""
    seed: int = 42
    """seed of initialisation, data order and dropout"""

    log_interval: int = 10
    """optimizer steps between log lines"""
    eval_interval: int = 200
    """optimizer steps between validations (the last is always at the end); 0 means only at the end"""
    eval_batches: int = 50
    """most validation batches per validation; 0 means all"""
    save_interval: int = 500
    """optimizer steps between training states, from which --resume continues; 0 means only at epoch ends"""
    resume: bool = False
    """continue from the training state in output_dir"""
    overwrite: bool = False
    """delete the run of this stage in output_dir, finished or not, and start again"""
    keep_epochs: Literal["best", "last", "all"] = "best"
    """models to keep: best (the last epoch's and the one with the lowest validation loss), last, or all"""
    snapshots: int = 0
    """copies of the weights to keep over the run (bfloat16), so that the page can show how the model learns"""
    tensorboard: bool = False
    """also write TensorBoard event files to output_dir/tensorboard"""

    def __post_init__(self) -> None:
        require_output_dir(self)
        require_at_least(1, self, "epochs", "batch_size", "accumulation_steps", "log_interval")
        require_at_least(0, self, "max_steps", "eval_interval", "eval_batches", "save_interval", "num_workers")
        require_at_least(0, self, "max_seq_len", "weight_decay", "grad_clip", "snapshots")
        require_share(self, "validation_fraction", "warmup_fraction", "final_lr_fraction", "max_bad_rows")
        require_share(self, "beta1", "beta2")
        if self.timeout <= 0:
            raise ValueError(f"timeout is {self.timeout}; expected a positive number of seconds, such as 600")
        if self.resume and self.overwrite:
            raise ValueError("both --resume and --overwrite are given; pass only one of them")
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; expected a positive number, such as 1e-3")

    def default_learning_rate(self, width: int) -> float:
        """The peak learning rate for a model `width` wide: beyond the width it was measured at, less in proportion."""
        rate, measured_width = self.LEARNING_RATES[self.optimizer]
        return rate * min(1.0, measured_width / width)

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate that was given or filled in.

        Raises:
            ValueError: neither happened.
        """
        if self.learning_rate is None:
            raise ValueError("learning_rate is not set; expected a positive number, such as 1e-3")
        return self.learning_rate

    def learning_rate_at(self, step: int, num_steps: int) -> float:
        """Learning rate of optimizer step `step` (from 0) in a run of `num_steps`."""
        warmup_steps = round(self.warmup_fraction * num_steps)
        return cosine_with_warmup(step, num_steps, warmup_steps, self.peak_learning_rate, self.final_lr_fraction)

    def make_optimizers(self, model: TinyLMForCausalLM) -> list[torch.optim.Optimizer]:
        """The optimizers over the model's trainable parameters: one AdamW, or Muon and AdamW."""
        betas = (self.beta1, self.beta2)
        return make_optimizers(model, self.optimizer, self.peak_learning_rate, self.weight_decay, betas)
