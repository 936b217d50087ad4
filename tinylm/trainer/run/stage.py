"""What a run is made from: the stage that is run (who), and what learns in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from rich.console import Console

from tinylm.checkpoint.model_folder import save_model
from tinylm.commandline.terminal import make_console
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.system.runtime import Runtime, seed_everything, setup_runtime
from tinylm.tokenizer.tokenizer import Tokenizer
from tinylm.trainer.core.objectives import Objective
from tinylm.trainer.run.train_settings import TrainSettings

Settings = TypeVar("Settings", bound=TrainSettings)


@dataclass(frozen=True)
class Stage(Generic[Settings]):
    """A training stage as one process runs it."""

    name: str
    """pretrain, full_sft, lora or dpo: what the names of all its files begin with."""
    settings: Settings
    runtime: Runtime
    console: Console

    def with_settings(self, **changes: Any) -> Stage[Settings]:
        """The same stage with some settings replaced."""
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, **changes))


def start_stage(name: str, settings: Settings) -> Stage[Settings]:
    """Choose device and precision, join the other processes, and seed the random generators."""
    runtime = setup_runtime(settings.device, settings.dtype, settings.timeout)
    seed_everything(settings.seed)
    return Stage(name, settings, runtime, make_console(runtime.is_main))


@dataclass
class Learner:
    """What learns in a stage, how it is scored and how it is saved."""

    model: TinyLMForCausalLM
    tokenizer: Tokenizer
    optimizers: Sequence[torch.optim.Optimizer]
    objective: Objective
    sample: Callable[[], list[str]] | None = None
    """Texts to look at after each validation; shown and recorded."""
    parent: dict[str, Any] | None = None
    """The model that the stage started from: path, stage, fingerprint of the weights."""
    save_folder: Callable[[Path, dict[str, Any]], None] | None = None
    """(folder, lineage) -> writes an adapter folder, say; by default the model folder is written."""

    def save(self, folder: Path, lineage: dict[str, Any]) -> None:
        """Write the model folder, or what `save_folder` writes."""
        if self.save_folder is not None:
            self.save_folder(folder, lineage)
        else:
            save_model(folder, self.model, self.tokenizer, lineage)
