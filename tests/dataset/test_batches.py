"""The order of the rows: a function of seed, epoch and position, whatever the number of processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tinylm.dataset.batches import Batch, BatchSampler, StoredSteps, load_batch, step_batches
from tinylm.dataset.packing import RunningTextPacking
from tinylm.dataset.pretrain_dataset import PretrainDataset


@pytest.fixture(scope="module")
def dataset(tokenizer) -> PretrainDataset:
    return PretrainDataset.from_texts([f"{number} little boats sailed" for number in range(60)], tokenizer, 7)


def steps(num_rows: int, batch_size: int, world_size: int, rows_per_step: int = 8, start: int = 0) -> list[list[int]]:
    """Rows of each optimizer step, all micro-batches and ranks together."""
    ranks = [
        list(BatchSampler(num_rows, batch_size, rows_per_step, 7, rank, world_size).steps(0, start))
        for rank in range(world_size)
    ]
    for step in zip(*ranks, strict=True):
        assert len({len(micro_batches) for micro_batches in step}) == 1  # or the ranks would wait for each other
        assert all(len(rows) <= batch_size for micro_batches in step for rows in micro_batches)
    return [
        sorted(int(i) for micro_batches in step for rows in micro_batches for i in rows)
        for step in zip(*ranks, strict=True)
    ]


def flat(dataset: PretrainDataset, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1, **options):
    """The batches of an epoch, one to a step."""
    sampler = BatchSampler(len(dataset), batch_size, batch_size * world_size, seed, rank, world_size)
    for (batch,) in step_batches(dataset, sampler, **options):
        yield batch


@pytest.mark.parametrize("num_rows", [8, 21, 61, 64])
def test_a_step_has_the_same_rows_however_it_is_cut(num_rows: int) -> None:
    whole = steps(num_rows, 8, 1)
    assert len(whole) == -(-num_rows // 8)
    for batch_size, world_size in ((1, 1), (3, 1), (4, 2), (2, 2), (1, 4), (2, 4), (1, 3), (8, 4)):
        assert whole == steps(num_rows, batch_size, world_size), (batch_size, world_size)


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_an_epoch_has_every_row_once(world_size: int) -> None:
    rows = sum(steps(53, 3, world_size), [])
    assert sorted(rows) == list(range(53))
    assert len(steps(53, 3, world_size)) == BatchSampler(53, 3, 8, world_size=world_size).steps_per_epoch == 7


def test_epochs_and_seeds_differ_and_are_repeatable() -> None:
    orders = [BatchSampler(50, 4, 4, seed).epoch_order(epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert orders[1] == BatchSampler(50, 4, 4, 0).epoch_order(1).tolist()


@pytest.mark.parametrize(("before", "after"), [((4, 1), (4, 1)), ((2, 2), (4, 1)), ((4, 1), (1, 4)), ((2, 4), (3, 3))])
def test_goes_on_at_any_step_on_any_number_of_processes(before, after) -> None:
    done = steps(41, *before)[:3]
    rest = steps(41, *after, start=3)
    assert sorted(sum(done + rest, [])) == list(range(41))
    assert rest == steps(41, *before)[3:]


def test_a_rank_without_a_row_gets_a_batch_that_weighs_nothing(dataset: PretrainDataset) -> None:
    world_size = next(n for n in range(2, 19) if 0 < len(dataset) % n < n - 1)
    last = [list(flat(dataset, 1, 7, r, world_size))[-1] for r in range(world_size)]
    spare = [batch for batch in last if batch.count == 0]
    assert len(spare) == world_size - len(dataset) % world_size
    assert all((batch.targets == -100).all() for batch in spare)
    assert sum(b.count for r in range(world_size) for b in flat(dataset, 1, 7, r, world_size)) == dataset.num_targets


def test_prefetch_keeps_the_order_and_stops_early(dataset: PretrainDataset) -> None:
    plain = list(flat(dataset, 4, 3))
    ahead = list(flat(dataset, 4, 3, num_workers=3))
    assert len(plain) == len(ahead)
    for a, b in zip(plain, ahead, strict=True):
        assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.targets, b.targets)
    stream = flat(dataset, 4, 3, num_workers=2)
    next(stream)
    stream.close()


def test_an_error_in_a_worker_reaches_the_caller(dataset: PretrainDataset) -> None:
    def fail(index: int) -> None:
        raise OSError("disk gone")

    broken = type("Broken", (), {"row": staticmethod(fail), "collate": dataset.collate, "__len__": lambda s: 9})()
    with pytest.raises(OSError, match="disk gone"):
        list(flat(broken, 2, num_workers=2))


def test_a_batch_of_no_rows_has_nothing_to_learn(dataset: PretrainDataset) -> None:
    batch = load_batch(dataset, range(0, 2))
    assert torch.equal(batch.input_ids, dataset.collate([dataset.row(0), dataset.row(1)]).input_ids)
    empty = load_batch(dataset, ())
    assert empty.count == 0 and (empty.targets == -100).all()


def test_a_batch_without_targets_has_no_extras_either() -> None:
    """They run over the pairs that `count` counts: DPO's objective would compare 2 pairs with none."""
    ids = torch.tensor([[3, 5], [7, 9]])
    empty = Batch(ids, ids + 1, ids, ids, 2, {"reference_log_probs": torch.tensor([[0.5, 1.5], [2.5, 3.5]])})
    empty = empty.without_targets()
    assert torch.equal(empty.input_ids, ids) and (empty.targets == -100).all()
    assert empty.count == 0 and empty.extras["reference_log_probs"].shape == (0, 2)


def test_stored_steps_are_those_of_their_sampler(dataset: PretrainDataset, monkeypatch) -> None:
    asked, names = "tinylm.dataset.batches.ordered_map", []
    monkeypatch.setattr(asked, lambda threads, load, steps, ahead: names.append(ahead) or map(load, steps))
    plain = StoredSteps(dataset, BatchSampler(len(dataset), 2, 6, seed=3))
    source = StoredSteps(dataset, BatchSampler(len(dataset), 2, 4, seed=3), num_workers=5).with_rows_per_step(6)
    assert source.rows_per_step == 6 and source.steps_per_epoch == -(-len(dataset) // 6)
    expected = [[batch.input_ids for batch in step] for step in step_batches(dataset, plain.sampler, 2, 1)]
    found = [[batch.input_ids for batch in step] for step in source.batches(2, 1)]
    assert len(found) == source.steps_per_epoch - 1 and names == [11]  # threads prepare steps ahead
    for mine, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert not torch.equal(found[0][0], next(iter(plain.batches(0, 1)))[0].input_ids)


def test_errors() -> None:
    with pytest.raises(ValueError, match="more processes than data rows"):
        BatchSampler(3, 1, 1, world_size=4)
    with pytest.raises(ValueError, match="batch_size is 0"):
        BatchSampler(3, 0, 1)
    with pytest.raises(ValueError, match="rows_per_step is 0"):
        BatchSampler(3, 1, 0)
    with pytest.raises(ValueError, match="rank is 2 of 2"):
        BatchSampler(3, 1, 1, rank=2, world_size=2)
    with pytest.raises(ValueError, match="start_step is 9"):
        list(BatchSampler(3, 1, 1).steps(0, 9))


def test_documents_are_numbered_through_the_batch(dataset: PretrainDataset) -> None:
    batch = next(flat(dataset, 4))
    rows = [set(row[row >= 0].tolist()) for row in batch.document_ids]
    assert sum(len(row) for row in rows) == len(set().union(*rows))


def test_to_moves_what_the_model_computes_with_and_keeps_what_decides_shapes() -> None:
    zeros = torch.zeros(1, 2, dtype=torch.int64)
    moved = Batch(zeros, zeros, zeros, zeros, 1, {"reference_log_probs": torch.zeros(1, 2)}).to("meta")
    tensors = [moved.input_ids, moved.targets, moved.position_ids, moved.document_ids, *moved.extras.values()]
    assert [tensor.device.type for tensor in tensors] == ["meta", "cpu", "meta", "cpu", "meta"]


def test_a_million_rows_resume_at_once() -> None:
    packing = RunningTextPacking(np.full(1000, 1_000_001), 1000)
    sampler = BatchSampler(len(packing), 8, 8)
    assert len(next(sampler.steps(3, start_step=124_998))[0]) == 8
