"""The order of the rows: a function of seed, epoch and position, whatever the number of processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tinylm.dataset.batches import Batch, BatchSampler, batches
from tinylm.dataset.packing import RunningTextPacking
from tinylm.dataset.pretrain_dataset import PretrainDataset


@pytest.fixture(scope="module")
def dataset(tokenizer) -> PretrainDataset:
    return PretrainDataset.from_texts([f"{number} little boats sailed" for number in range(60)], tokenizer, 7)


def steps(num_rows: int, batch_size: int, world_size: int, epoch: int = 0, start: int = 0) -> list[list[int]]:
    """Rows of each micro-step, all ranks together."""
    ranks = [
        list(BatchSampler(num_rows, batch_size, 7, rank, world_size).epoch(epoch, start)) for rank in range(world_size)
    ]
    assert len({len(micro_batches) for micro_batches in ranks}) == 1  # or the ranks would wait for each other
    return [sorted(int(i) for part in parts for i in part) for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize("num_rows", [8, 21, 61, 64])
def test_a_global_batch_is_the_same_set_however_it_is_cut(num_rows: int) -> None:
    whole = steps(num_rows, 8, 1)
    singles = steps(num_rows, 1, 1)
    assert whole == [sorted(sum(singles[i : i + 8], [])) for i in range(0, num_rows, 8)]  # 1 x 8 accumulated
    assert whole == steps(num_rows, 4, 2)
    pairs = steps(num_rows, 1, 4)
    assert whole == [sorted(sum(pairs[i : i + 2], [])) for i in range(0, len(pairs), 2)]


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_an_epoch_has_every_row_once(world_size: int) -> None:
    rows = sum(steps(53, 3, world_size), [])
    assert sorted(rows) == list(range(53))
    assert len(steps(53, 3, world_size)) == BatchSampler(53, 3, world_size=world_size).num_batches


def test_epochs_and_seeds_differ_and_are_repeatable() -> None:
    orders = [BatchSampler(50, 4, seed).epoch_order(epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert orders[1] == BatchSampler(50, 4, 0).epoch_order(1).tolist()


@pytest.mark.parametrize(("before", "after"), [((4, 1), (4, 1)), ((2, 2), (4, 1)), ((4, 1), (1, 4))])
def test_resumes_at_any_position_on_any_number_of_processes(before, after) -> None:
    done = steps(41, *before)[:5]
    rest = steps(41, *after, start=20)
    assert sorted(sum(done + rest, [])) == list(range(41))
    assert rest == [sorted(step) for step in steps(41, *before)[5:]]


def test_a_rank_without_a_row_gets_a_batch_that_weighs_nothing(dataset: PretrainDataset) -> None:
    world_size = next(n for n in range(2, 9) if 0 < len(dataset) % n < n - 1)
    last = [list(batches(dataset, 1, 7, rank=r, world_size=world_size))[-1] for r in range(world_size)]
    spare = [batch for batch in last if batch.count == 0]
    assert len(spare) == world_size - len(dataset) % world_size
    assert all((batch.targets == -100).all() for batch in spare)
    assert sum(b.count for r in range(world_size) for b in batches(dataset, 1, 7, 0, 0, r, world_size)) == (
        dataset.num_targets
    )


def test_prefetch_keeps_the_order_and_stops_early(dataset: PretrainDataset) -> None:
    plain = list(batches(dataset, 4, seed=3))
    ahead = list(batches(dataset, 4, seed=3, num_workers=3))
    assert len(plain) == len(ahead)
    for a, b in zip(plain, ahead, strict=True):
        assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.targets, b.targets)
    stream = batches(dataset, 4, seed=3, num_workers=2)
    next(stream)
    stream.close()


def test_an_error_in_a_worker_reaches_the_caller(dataset: PretrainDataset) -> None:
    def fail(index: int) -> None:
        raise OSError("disk gone")

    broken = type("Broken", (), {"row": staticmethod(fail), "collate": dataset.collate, "__len__": lambda s: 9})()
    with pytest.raises(OSError, match="disk gone"):
        list(batches(broken, 2, num_workers=2))


def test_validation_keeps_the_order_of_the_data(dataset: PretrainDataset) -> None:
    first = next(iter(batches(dataset, 2, shuffle=False)))
    assert torch.equal(first.input_ids, dataset.collate([dataset.row(0), dataset.row(1)]).input_ids)


def test_errors() -> None:
    with pytest.raises(ValueError, match="more processes than data rows"):
        BatchSampler(3, 1, world_size=4)
    with pytest.raises(ValueError, match="batch_size is 0"):
        BatchSampler(3, 0)
    with pytest.raises(ValueError, match="rank is 2 of 2"):
        BatchSampler(3, 1, rank=2, world_size=2)
    with pytest.raises(ValueError, match="start_position is 9"):
        list(BatchSampler(3, 1).epoch(0, 9))


def test_documents_are_numbered_through_the_batch(dataset: PretrainDataset) -> None:
    batch = next(iter(batches(dataset, 4)))
    rows = [set(row[row >= 0].tolist()) for row in batch.document_ids]
    assert sum(len(row) for row in rows) == len(set().union(*rows))


def test_to_moves_every_tensor() -> None:
    zeros = torch.zeros(1, 2, dtype=torch.int64)
    moved = Batch(zeros, zeros, zeros, zeros, 1, torch.zeros(1, 2)).to("meta")
    assert {moved.input_ids.device.type, moved.targets.device.type} == {"meta"}
    assert moved.reference_log_probs is not None and moved.reference_log_probs.device.type == "meta"


def test_a_million_rows_resume_at_once() -> None:
    packing = RunningTextPacking(np.full(1000, 1_000_001), 1000)
    sampler = BatchSampler(len(packing), 8)
    assert len(next(sampler.epoch(3, start_position=999_990))) == 8
