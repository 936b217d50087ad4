"""Batches: which rows come when. The order depends on (seed, epoch, position) and on nothing else.

An epoch is one permutation of the rows. An optimizer step takes the next `rows_per_step` of them, for any number of
processes: in micro-batches of at most `batch_size` rows per process, of which each rank computes its consecutive share.
So a step has the same rows whether they come as 8 at once, as 8 accumulated micro-batches of 1, or as 4 on each of 2
ranks. A run can resume at any step, on any number of processes, without replaying what came before.

The last step of an epoch may have fewer rows; each row is seen exactly once in an epoch. If a micro-batch has fewer
rows than there are ranks, a rank without a row gets a batch with `count` 0: it adds exactly zero to the loss, and all
ranks compute the same number of micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from tinylm.dataset.rows import FILLER_DOCUMENT, IGNORE_INDEX, Batch, Row
from tinylm.system.ordered_map import ordered_map

__all__ = [
    "FILLER_DOCUMENT", "IGNORE_INDEX", "Batch", "BatchSampler", "Dataset", "Row", "StepSource", "StoredSteps",
    "load_batch", "step_batches",
]  # fmt: skip


class Dataset(Protocol):
    """What PretrainDataset, SFTDataset and DPODataset have in common."""

    @property
    def unit(self) -> str: ...

    @property
    def num_targets(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def row(self, index: int) -> Any: ...

    def collate(self, rows: Sequence[Any]) -> Batch: ...


@dataclass(frozen=True)
class BatchSampler:
    """Which rows of a data set belong to which step, micro-batch and rank.

    Raises:
        ValueError: if a number is out of range, or there are more processes than rows.
    """

    num_rows: int
    batch_size: int
    """Rows of a micro-batch on one rank, at most."""
    rows_per_step: int
    """Rows of an optimizer step, all micro-batches and ranks together."""
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "rows_per_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1; pass --batch_size 8")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank is {self.rank} of {self.world_size} processes; expected 0 to world_size - 1")
        if self.num_rows < self.world_size:
            raise ValueError(
                f"more processes than data rows: {self.world_size} processes, {self.num_rows} rows; expected "
                "at least one row for each process; add data, start fewer processes or lower --max_seq_len"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of a whole epoch, the same on every rank and for any number of ranks."""
        return -(-self.num_rows // self.rows_per_step)

    def epoch_order(self, epoch: int) -> np.ndarray:
        """The permutation of epoch `epoch`, [num_rows] int64.

        Philox is a counter-based generator (Salmon et al. 2011, doi:10.1145/2063384.2063405): its key is
        (seed, epoch), so epochs are independent streams and none has to be drawn to reach the next.
        """
        key = np.array([self.seed % 2**64, epoch], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key)).permutation(self.num_rows)

    def steps(self, epoch: int, start_step: int = 0) -> Iterator[list[np.ndarray]]:
        """This rank's row numbers, step by step from `start_step` of the epoch on: an array for each micro-batch.

        An array is empty where a micro-batch has fewer rows than there are ranks.
        """
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(
                f"start_step is {start_step}; expected 0 to {self.steps_per_epoch}, the steps of an epoch; "
                "was the run started on other data?"
            )
        order = self.epoch_order(epoch)
        together = self.batch_size * self.world_size
        for step in range(start_step, self.steps_per_epoch):
            rows = order[step * self.rows_per_step : (step + 1) * self.rows_per_step]
            micro_batches = (rows[begin : begin + together] for begin in range(0, len(rows), together))
            yield [np.array_split(micro_batch, self.world_size)[self.rank] for micro_batch in micro_batches]


def load_batch(dataset: Dataset, indices: Sequence[int] | np.ndarray) -> Batch:
    """The batch of these rows; without any, one that has no target and therefore adds nothing to a sum."""
    if len(indices) == 0:
        return dataset.collate([dataset.row(0)]).without_targets()
    return dataset.collate([dataset.row(int(index)) for index in indices])


def step_batches(
    dataset: Dataset, sampler: BatchSampler, epoch: int = 0, start_step: int = 0, num_workers: int = 0
) -> Iterator[list[Batch]]:
    """This rank's micro-batches of each optimizer step of one epoch, from `start_step` on.

    Args:
        dataset: a PretrainDataset, SFTDataset or DPODataset.
        num_workers: threads that prepare steps ahead; the order is the same with any number of them.
    """

    def load(step: list[np.ndarray]) -> list[Batch]:
        return [load_batch(dataset, indices) for indices in step]

    steps = sampler.steps(epoch, start_step)
    if num_workers <= 0:
        yield from map(load, steps)
        return
    with ThreadPoolExecutor(num_workers, thread_name_prefix="batches") as threads:
        yield from ordered_map(threads, load, steps, ahead=2 * num_workers + 1)  # each has one in hand and one ready


class StepSource(Protocol):
    """Where the steps of a run come from: a stored data set, or whatever makes batches while the run goes."""

    @property
    def description(self) -> str:
        """What there is to learn from, in a few words."""
        ...

    @property
    def unit(self) -> str:
        """What a step has `rows_per_step` of: "rows" or "pairs"."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes when the data does; a run resumes only on the data that it began with."""
        ...

    @property
    def num_rows(self) -> int:
        """Rows (or pairs) of an epoch."""
        ...

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step, all micro-batches and ranks together."""
        ...

    @property
    def steps_per_epoch(self) -> int: ...

    def with_rows_per_step(self, rows_per_step: int) -> StepSource:
        """The same data in steps of another size."""
        ...

    def with_batch_size(self, batch_size: int) -> StepSource:
        """The same steps in micro-batches of at most `batch_size` rows."""
        ...

    def batches(self, epoch: int, start_step: int) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each optimizer step of one epoch, from `start_step` on."""
        ...


@dataclass(frozen=True)
class StoredSteps:
    """The steps of a run on a stored data set, in the order of a `BatchSampler`."""

    dataset: Dataset
    sampler: BatchSampler
    num_workers: int = 0
    """threads that prepare steps ahead"""

    @property
    def description(self) -> str:
        """Rows and targets, as numbers."""
        return f"{len(self.dataset):,} {self.unit}, {self.dataset.num_targets:,} target tokens"

    @property
    def unit(self) -> str:
        """The data set's: "rows" or "pairs"."""
        return self.dataset.unit

    @property
    def fingerprint(self) -> str:
        """The data set's."""
        return self.dataset.fingerprint

    @property
    def num_rows(self) -> int:
        """Rows (or pairs) of an epoch."""
        return self.sampler.num_rows

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step, all micro-batches and ranks together."""
        return self.sampler.rows_per_step

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of a whole epoch."""
        return self.sampler.steps_per_epoch

    def with_rows_per_step(self, rows_per_step: int) -> StoredSteps:
        """The same data in steps of another size."""
        return replace(self, sampler=replace(self.sampler, rows_per_step=rows_per_step))

    def with_batch_size(self, batch_size: int) -> StoredSteps:
        """The same steps in micro-batches of at most `batch_size` rows."""
        return replace(self, sampler=replace(self.sampler, batch_size=batch_size))

    def batches(self, epoch: int, start_step: int) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each optimizer step of one epoch, from `start_step` on."""
        return step_batches(self.dataset, self.sampler, epoch, start_step, self.num_workers)
