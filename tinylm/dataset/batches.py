"""Batches: which rows come when. The order is a function of (seed, epoch, position) and of nothing else.

An epoch is one permutation of the rows. A *position* counts the rows of the epoch that all processes together
have used. From position p on, a micro-step takes the next `batch_size * world_size` rows of the permutation
and gives each rank its consecutive share. So the rows of a global batch are the same whether they come as 8
rows at once, as 8 accumulated micro-batches of 1, or as 4 rows on each of 2 ranks; and a run resumes at any
position, on any number of processes, without replaying what came before.

The last micro-step of an epoch may have fewer rows; none is left out and none is seen twice. Where it has
fewer rows than there are ranks, a rank without one gets a batch with `count` 0: it adds exactly zero to the
loss, and all ranks make the same number of steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tinylm.dataset.rows import FILLER_DOCUMENT, IGNORE_INDEX, Batch, Row

__all__ = ["FILLER_DOCUMENT", "IGNORE_INDEX", "Batch", "BatchSampler", "Dataset", "Row", "batches"]


class Dataset(Protocol):
    """What PretrainDataset, SFTDataset and DPODataset have in common."""

    @property
    def num_targets(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def row(self, index: int) -> Any: ...

    def collate(self, rows: Sequence[Any]) -> Batch: ...


@dataclass(frozen=True)
class BatchSampler:
    """Deals the rows of a data set to the ranks.

    Raises:
        ValueError: if a number is out of range, or there are more processes than rows.
    """

    num_rows: int
    batch_size: int
    """Rows of a micro-batch on one rank."""
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    shuffle: bool = True
    """False keeps the order of the data set, as for validation."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; expected at least 1; pass --batch_size 8")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank is {self.rank} of {self.world_size} processes; expected 0 to world_size - 1")
        if self.num_rows < self.world_size:
            raise ValueError(
                f"more processes than data rows: {self.world_size} processes, {self.num_rows} rows; expected "
                "at least one row for each process; add data, start fewer processes or lower --max_seq_len"
            )

    @property
    def rows_per_step(self) -> int:
        """Rows that all ranks together use in one micro-step: how far the position moves."""
        return self.batch_size * self.world_size

    @property
    def num_batches(self) -> int:
        """Micro-batches of a whole epoch, the same on every rank."""
        return -(-self.num_rows // self.rows_per_step)

    def epoch_order(self, epoch: int) -> np.ndarray:
        """The permutation of epoch `epoch`, [num_rows] int64.

        Philox is a counter-based generator (Salmon et al. 2011, doi:10.1145/2063384.2063405): its key is
        (seed, epoch), so epochs are independent streams and none has to be drawn to reach the next.
        """
        if not self.shuffle:
            return np.arange(self.num_rows)
        key = np.array([self.seed % 2**64, epoch], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key)).permutation(self.num_rows)

    def epoch(self, epoch: int, start_position: int = 0) -> Iterator[np.ndarray]:
        """This rank's row numbers, one array for each micro-batch, from `start_position` to the epoch's end.

        An array is empty where the epoch's last rows are fewer than the ranks.
        """
        if not 0 <= start_position <= self.num_rows:
            raise ValueError(
                f"start_position is {start_position}; expected 0 to {self.num_rows}, the rows of the data; "
                "was the run started on other data?"
            )
        order = self.epoch_order(epoch)
        for begin in range(start_position, self.num_rows, self.rows_per_step):
            step = order[begin : begin + self.rows_per_step]
            yield np.array_split(step, self.world_size)[self.rank]


def batches(
    dataset: Dataset,
    batch_size: int,
    seed: int = 0,
    epoch: int = 0,
    start_position: int = 0,
    rank: int = 0,
    world_size: int = 1,
    shuffle: bool = True,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """This rank's micro-batches of one epoch, from `start_position` (in rows, over all ranks) on.

    Args:
        dataset: a PretrainDataset, SFTDataset or DPODataset.
        batch_size: rows (or pairs) of a micro-batch on one rank.
        num_workers: threads that prepare batches ahead; the order is the same with any number of them.
    """
    sampler = BatchSampler(len(dataset), batch_size, seed, rank, world_size, shuffle)

    def load(indices: np.ndarray) -> Batch:
        if len(indices) == 0:
            return dataset.collate([dataset.row(0)]).without_targets()
        return dataset.collate([dataset.row(int(index)) for index in indices])

    steps = sampler.epoch(epoch, start_position)
    if num_workers <= 0:
        yield from map(load, steps)
        return
    pending: deque[Future[Batch]] = deque()
    executor = ThreadPoolExecutor(num_workers, thread_name_prefix="batches")
    try:
        for indices in steps:
            pending.append(executor.submit(load, indices))
            if len(pending) > 2 * num_workers:  # each thread has one batch in hand and one ready
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
