"""The training loop: one gradient however a batch is cut up, and nothing learnt from what is not a number."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from trainer_parts import Rows, assert_same_bits, run_two_ranks, small_model, weights_of

from tinylm.dataset.batches import BatchSampler, step_batches
from tinylm.system.runtime import Runtime
from tinylm.trainer.core import loop
from tinylm.trainer.core.loop import fit
from tinylm.trainer.core.objectives import next_token_loss

RUNTIME = Runtime(torch.device("cpu"), torch.float32)


def train(step_batches, num_steps, model=None, objective=next_token_loss, rate=0.5, on_step=(), **options):
    """(model, reports) after `num_steps` of plain gradient descent, whose steps show the gradient as it is."""
    model = model or small_model()
    reports: list = []
    optimizer = torch.optim.SGD(model.parameters())
    callbacks = (reports.append, *on_step)
    fit(model, objective, [optimizer], lambda _: rate, step_batches, RUNTIME, num_steps, on_step=callbacks, **options)
    return model, reports


def epoch_of(rows: Rows, batch_size: int, accumulation: int):
    return step_batches(rows, BatchSampler(len(rows), batch_size, batch_size * accumulation, seed=5))


def assert_close(left, right):
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=2e-6, rtol=2e-5, msg=name)


def test_the_gradient_is_that_of_the_mean_over_all_targets():
    """The original project averaged the means of its micro-batches: a row with one target weighed as much as one
    with twenty. Here a step over rows with unequal targets is one gradient of sum / count."""
    rows = Rows(4)
    parts = [rows.collate([rows.row(i)]) for i in range(4)]
    assert len({part.count for part in parts}) > 1
    model, (report,) = train([parts], 1, rate=1.0, grad_clip=0)

    exact = small_model()
    total = torch.stack([next_token_loss(exact, part)[0] for part in parts]).sum()
    count = sum(part.count for part in parts)
    (total / count).backward()
    expected = {name: p.detach() - p.grad for name, p in exact.named_parameters()}
    assert_close(weights_of(model), expected)
    assert report.loss == pytest.approx(total.item() / count, rel=1e-5)
    assert (report.num_targets, report.num_tokens) == (count, 4 * rows.width)

    wrong = small_model()
    torch.stack([next_token_loss(wrong, part)[0] / part.count for part in parts]).mean().backward()
    gap = max(float((p.grad - q.grad).abs().max()) for p, q in zip(wrong.parameters(), exact.parameters(), strict=True))
    assert gap > 1e-2  # these rows do tell the two apart


def test_eight_at_once_equal_one_by_one():
    whole, reports = train(epoch_of(Rows(9), 8, 1), 2)
    parts, others = train(epoch_of(Rows(9), 1, 8), 2)
    assert_close(weights_of(whole), weights_of(parts))
    for mine, other in zip(reports, others, strict=True):
        assert mine.loss == pytest.approx(other.loss, rel=1e-5)
        assert mine.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)
        assert (mine.num_targets, mine.num_tokens) == (other.num_targets, other.num_tokens)


@pytest.mark.slow
def test_eight_at_once_equal_two_processes_with_four(tmp_path: Path):
    """Real processes over gloo: no GPU and no NCCL is needed. In the last step one of them has no row at all."""
    whole, reports = train(epoch_of(Rows(9), 8, 1), 2)
    ranks = run_two_ranks("rank_worker.py", tmp_path / "out")
    assert_same_bits(ranks[0]["weights"], ranks[1]["weights"])
    assert_close(weights_of(whole), ranks[0]["weights"])
    for report, (loss, norm, num_tokens, num_targets) in zip(reports, ranks[0]["facts"], strict=True):
        assert (report.loss, report.grad_norm) == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-5))
        assert report.num_targets == num_targets and num_tokens >= report.num_tokens


def test_nothing_is_left_over_from_a_step():
    """In the original project the micro-batches left at an epoch's end stayed in the gradient and entered the next
    epoch. A short step is a step of its own size, and after every step no gradient is there."""
    rows, seen = Rows(5), []
    model = small_model()

    def gradients_are_gone(report):
        seen.append(all(p.grad is None for p in model.parameters()))

    steps = list(epoch_of(rows, 1, 2))
    assert [len(step) for step in steps] == [2, 2, 1]
    train(steps, 3, model, on_step=(gradients_are_gone,))
    assert seen == [True, True, True]

    alone = small_model()
    train(steps[:2], 2, alone)
    train(steps[2:], 1, alone)  # the last, short step by itself
    assert_same_bits(weights_of(model), weights_of(alone))


def test_the_schedule_counts_optimizer_steps():
    """The original project counted micro-batches, so with accumulation the schedule ran past its end."""
    asked: list[int] = []
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters())
    rates: list[float] = []
    fit(
        model,
        next_token_loss,
        [optimizer],
        lambda step: asked.append(step) or 0.1 / (step + 1),
        epoch_of(Rows(8), 1, 4),
        RUNTIME,
        num_steps=2,
        on_step=(lambda report: rates.append((report.step, report.learning_rate, optimizer.param_groups[0]["lr"])),),
    )
    assert asked == [0, 1]
    assert rates == [(1, 0.1, 0.1), (2, 0.05, 0.05)]


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_step_that_is_not_a_number_is_skipped_and_said(bad):
    """A NaN must not reach the weights, nor the optimizer's moments: the next step is as if it had not been."""
    steps = list(epoch_of(Rows(8), 2, 1))

    def broken_at(number):
        calls = itertools.count(1)

        def objective(model, batch):
            loss, metrics = next_token_loss(model, batch)
            if next(calls) != number:
                return loss, metrics
            # sqrt has no slope at 0: the loss stays what it is, the gradient is 0 * inf
            return (loss * float("nan") if bad == "loss" else loss + (0 * loss).sqrt()), metrics

        return objective

    model, reports = train(steps, 4, objective=broken_at(3))
    assert [report.skipped for report in reports] == [False, False, True, False]
    assert reports[2].grad_norm != reports[2].grad_norm
    without, _ = train([*steps[:2], steps[3]], 3)
    assert_same_bits(weights_of(model), weights_of(without))


def test_a_step_without_a_target_changes_nothing():
    """Never 0 / 0, also when a whole step has nothing to learn."""
    rows = Rows(2)
    empty = rows.collate(rows.rows).without_targets()
    model, (report,) = train([[empty, empty]], 1)
    assert (report.loss, report.grad_norm, report.num_targets) == (0.0, 0.0, 0)
    assert_same_bits(weights_of(model), weights_of(small_model()))


@pytest.mark.parametrize("clip", [0.05, 0.0, 1e6])
def test_gradients_are_clipped_to_their_global_norm(clip):
    start = weights_of(small_model())
    model, (report,) = train(epoch_of(Rows(4), 4, 1), 1, rate=1.0, grad_clip=clip)
    moved = sum(float((w - start[name]).double().pow(2).sum()) for name, w in weights_of(model).items()) ** 0.5
    assert report.grad_norm > 0.1  # reported as it was before clipping
    assert moved == pytest.approx(0.05 if clip == 0.05 else report.grad_norm, rel=1e-4)


def test_the_model_trains_in_training_mode_whatever_a_callback_leaves():
    modes = []

    def objective(model, batch):
        modes.append(model.training)
        return next_token_loss(model, batch)

    model = small_model()
    train(epoch_of(Rows(6), 2, 1), 3, model, objective, on_step=(lambda report: model.eval(),))
    assert modes == [True, True, True]


def test_it_stops_where_the_batches_or_the_steps_end():
    assert [r.step for r in train(epoch_of(Rows(6), 2, 1), 2)[1]] == [1, 2]
    assert [r.step for r in train(epoch_of(Rows(6), 2, 1), 9)[1]] == [1, 2, 3]
    assert [r.step for r in train(epoch_of(Rows(6), 2, 1), 9, start_step=7)[1]] == [8, 9]


def test_a_steps_time_includes_the_next_data_but_not_the_evaluation_before_it(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def slow_batches():
        for step in epoch_of(Rows(6), 2, 1):
            clock.now += 3.0
            yield step

    def evaluate(report):
        clock.now += 40.0

    _, reports = train(slow_batches(), 3, on_step=(evaluate,))
    assert [report.seconds for report in reports] == [6.0, 3.0, 0.0]
