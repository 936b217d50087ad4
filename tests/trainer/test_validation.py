"""The loss on held-out data: which process computes which batch, and what the means are."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from run_parts import make_run, records
from trainer_parts import Rows, small_model

from tinylm.system.runtime import Runtime
from tinylm.trainer.core.objectives import next_token_loss
from tinylm.trainer.run.validation import batches_of_rank, validate

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("max_batches", "expected"),
    [
        (0, [[(0, 2), (4, 1)], [(2, 2), (6, 0)]]),  # (first row, rows with targets); 5 rows are 3 batches, so one lacks
        (2, [[(0, 2)], [(2, 2)]]),
        (1, [[(0, 2)], [(2, 0)]]),
    ],
)
def test_processes_take_turns_and_get_as_many_batches(max_batches, expected):
    """A process without a batch would leave the others of a sharded model waiting."""
    rows = Rows(5)
    for rank in (0, 1):
        found = list(batches_of_rank(rows, 2, Runtime(CPU, torch.float32, rank, 2), max_batches))
        assert [(start, len(batch.input_ids) if batch.count else 0) for start, batch in found] == expected[rank]
        for start, batch in found:
            assert batch.count == sum(rows.row(i).num_targets for i in range(start, min(start + 2, 5)) if batch.count)


def test_the_means_are_per_target_and_bits_are_per_byte():
    """With dropout in the model, a training mode left on would show."""
    rows, model = Rows(5), small_model(hidden_dropout=0.3).train()
    rows.bytes_per_target = 3.5

    def objective(model, batch):
        loss, _ = next_token_loss(model, batch)
        return loss, {"größe": torch.tensor(4.0 * batch.count)}

    found = validate(model, objective, rows, 2, 0, Runtime(CPU, torch.float32))
    assert model.training
    loss = next_token_loss(model.eval(), rows.collate(rows.rows))[0].item() / rows.num_targets
    expected = {"validation_loss": loss, "validation_größe": 4.0, "bits_per_byte": loss / math.log(2) / 3.5}
    assert found == pytest.approx(expected, rel=1e-5)


def test_it_computes_in_the_precision_of_the_run():
    exact, half = (
        validate(small_model(), next_token_loss, Rows(5), 2, 0, Runtime(CPU, dtype))["validation_loss"]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert exact != half and exact == pytest.approx(half, rel=0.02)


def test_a_run_validates_on_its_eval_batches(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("tinylm.trainer.run.run.validate", lambda *args: seen.append(args[3:5]) or {})
    make_run(tmp_path, batch_size=3, eval_batches=7).validate(SimpleNamespace())
    assert seen == [(3, 7)]


@pytest.mark.parametrize(("interval", "steps"), [(3, [3, 6, 7]), (7, [7]), (0, [7]), (9, [7]), (2, [2, 4, 6, 7])])
@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_run_validates_at_every_interval_at_its_end_and_where_the_best_epoch_is_sought(
    tmp_path, monkeypatch, interval, steps, keep
):
    """An epoch has 4 steps. A sample is written at the interval and at the end only."""
    steps = sorted({*steps, 4} if keep == "best" else steps)
    run = make_run(tmp_path, max_steps=7, eval_interval=interval, keep_epochs=keep)
    assert [step for step in range(1, 8) if run.plan.validates_after(step)] == steps
    for done in range(8):
        assert run.plan.num_validations(done) == len([step for step in steps if step > done]), done
    monkeypatch.setattr(run, "validate", lambda *_: {"validation_loss": 1.5})
    run.fit()
    found = [record for record in records(tmp_path) if "validation_loss" in record]
    assert [record["step"] for record in found] == steps
    with_samples = [record["step"] for record in found if "sample_0" in record]
    assert with_samples == [step for step in steps if step == 7 or (interval and step % interval == 0)]
