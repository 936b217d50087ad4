"""The plan of a run: how many steps it has, which rows each of them takes, and where its epochs end."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tinylm.dataset.batches import Batch, StepSource
from tinylm.system.runtime import Runtime
from tinylm.trainer.run.train_settings import TrainSettings


class Plan:
    """Steps of a run, counted from 0; a step never spans two epochs.

    Args:
        source: where the steps come from.
        at_once: micro-batches computed at a time.
    """

    def __init__(self, settings: TrainSettings, runtime: Runtime, source: StepSource, at_once: int = 1) -> None:
        self.settings, self.runtime = settings, runtime
        self.source, self.at_once = source, at_once

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of a whole epoch."""
        return self.source.steps_per_epoch

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        steps = self.settings.epochs * self.steps_per_epoch
        return min(steps, self.settings.max_steps) if self.settings.max_steps else steps

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

    def keep_rows_per_step(self, rows: int) -> None:
        """Plan anew with steps of `rows` rows, which the processes of the run share."""
        self.source = self.source.with_rows_per_step(rows)

    def learning_rate(self, step: int) -> float:
        """Learning rate of optimizer step `step` (from 0)."""
        return self.settings.learning_rate_at(step, self.num_steps)

    def batches(self, start_step: int) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each optimizer step from `start_step` on.

        Dropout's generator is seeded by (seed, step, rank): a resumed run draws what the unbroken run drew, with no
        generator state to keep.
        """
        step = start_step
        for epoch in range(step // self.steps_per_epoch, self.settings.epochs):
            for batches in self.source.batches(epoch, step % self.steps_per_epoch):
                torch.manual_seed((self.settings.seed * 1_000_003 + step) * 1_009 + self.runtime.rank)
                yield batches
                step += 1
