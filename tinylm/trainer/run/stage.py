"""The parts of a run: the stage, what learns in it, and the plan of its steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from rich.console import Console

from tinylm.checkpoint.model_folder import save_model
from tinylm.commandline.terminal import make_console
from tinylm.dataset.batches import Batch, StepSource
from tinylm.dataset.shards.shared_cache import shared_cache
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.system.compile_cache import keep_compiled_code
from tinylm.system.runtime import Runtime, seed_everything, setup_runtime
from tinylm.tokenizer.tokenizer import Tokenizer
from tinylm.trainer.core.objectives import Objective
from tinylm.trainer.run.train_settings import TrainSettings

Settings = TypeVar("Settings", bound=TrainSettings)


@dataclass(frozen=True)
class Stage(Generic[Settings]):
    """A training stage as one process runs it."""

    name: str
    """pretrain, full_sft, lora or dpo; the names of all its files begin with it."""
    settings: Settings
    runtime: Runtime
    console: Console
    cache_warning: str | None = None
    """What is wrong with the folder for compiled code; to be said if the run is compiled."""

    def with_settings(self, **changes: Any) -> Stage[Settings]:
        """The same stage with some settings replaced."""
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, **changes))


def start_stage(name: str, settings: Settings) -> Stage[Settings]:
    """Choose device and precision, join the other processes, seed the generators, and find room for compiled code."""
    runtime = setup_runtime(settings.device, settings.dtype, settings.timeout, settings.seed)
    seed_everything(settings.seed)
    warning = None
    if settings.use_compile:
        cache = shared_cache(*(getattr(settings, name, None) for name in ("cache_dir", "cache_gb")))
        warning = keep_compiled_code(cache.root if cache is not None else None)
    return Stage(name, settings, runtime, make_console(runtime.is_main), warning)


@dataclass
class Learner:
    """What learns in a stage, its objective, and how it is saved."""

    model: TinyLMForCausalLM
    tokenizer: Tokenizer
    optimizers: Sequence[torch.optim.Optimizer]
    objective: Objective
    sample: Callable[[], list[str]] | None = None
    """Makes sample texts after each validation; they are shown and recorded."""
    parent: dict[str, Any] | None = None
    """The model that the stage started from: its path, stage and the fingerprint of its weights."""
    save_folder: Callable[[Path, dict[str, Any]], None] | None = None
    """(folder, lineage) -> None: writes an adapter folder, for example; by default a model folder is written."""

    def save(self, folder: Path, lineage: dict[str, Any]) -> None:
        """Call `save_folder` if it is given; otherwise write the model folder."""
        if self.save_folder is not None:
            self.save_folder(folder, lineage)
        else:
            save_model(folder, self.model, self.tokenizer, lineage)


class Plan:
    """The steps of a run. A step never spans two epochs.

    Args:
        source: the batches of each step.
    """

    def __init__(self, settings: TrainSettings, runtime: Runtime, source: StepSource) -> None:
        self.settings, self.runtime, self.source = settings, runtime, source
        self.at_once = 1
        """Micro-batches computed at a time, each on its own CPU cores."""
        self.batch_size = settings.batch_size
        """Rows that a process computes at a time, all parts together; lower than asked for after memory ran out."""
        self.compiled = settings.use_compile not in (False, "auto")
        """Whether the model runs through torch.compile; `auto` decides later, and False after it failed."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return self.source.steps_per_epoch

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.settings.max_steps or self.settings.epochs * self.steps_per_epoch

    @property
    def rows_per_step(self) -> float:
        """Rows of a step on average; an epoch's last step may have fewer, or all steps if there is little data."""
        return self.source.num_rows / self.steps_per_epoch

    @property
    def rows_in_memory(self) -> int:
        """The most rows that a process computes at a time."""
        return min(self.batch_size, -(-self.source.num_rows // self.runtime.world_size))

    @property
    def last_epoch(self) -> int:
        """Number of the epoch, from 0, in which the run ends."""
        return self.epoch_of(self.num_steps)

    def epoch_of(self, step: int) -> int:
        """Number of the epoch, from 0, that the `step`-th step belongs to (the first step has `step` 1)."""
        return -(-step // self.steps_per_epoch) - 1

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch, or the run, ends with the `step`-th step."""
        return step % self.steps_per_epoch == 0 or step == self.num_steps

    def validates_after(self, step: int) -> bool:
        """Whether a validation is due after the `step`-th step: at the interval, at the end, and for the best epoch."""
        interval = self.settings.eval_interval
        is_due = bool(interval) and step % interval == 0
        return is_due or (self.settings.keep_epochs == "best" and self.ends_epoch(step)) or step == self.num_steps

    def num_validations(self, after: int = 0) -> int:
        """Validations that are due after the steps that follow step `after`."""
        intervals = [self.settings.eval_interval] if self.settings.eval_interval else []
        intervals += [self.steps_per_epoch] if self.settings.keep_epochs == "best" else []
        due = sum(self.num_steps // interval - after // interval for interval in intervals)
        if len(intervals) == 2:
            both = math.lcm(*intervals)
            due -= self.num_steps // both - after // both
        is_last_extra = after < self.num_steps and all(self.num_steps % interval for interval in intervals)
        return due + is_last_extra

    def keep_rows_per_step(self, rows: int) -> None:
        """Make each step `rows` rows, shared by the processes of the run."""
        self.source = self.source.with_rows_per_step(rows)

    def cut_batches(self, batch_size: int, at_once: int) -> None:
        """Compute at most `batch_size` rows at a time, in `at_once` equal parts; a step keeps its rows."""
        self.batch_size, self.at_once = batch_size, at_once
        self.source = self.source.with_batch_size(batch_size // at_once)

    def learning_rate(self, step: int) -> float:
        """Learning rate of optimizer step `step` (from 0)."""
        return self.settings.learning_rate_at(step, self.num_steps)

    def batches(self, start_step: int) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each optimizer step from `start_step` on."""
        first_epoch, step = divmod(start_step, self.steps_per_epoch)
        for epoch in range(first_epoch, self.last_epoch + 1):
            yield from self.source.batches(epoch, step)
            step = 0
