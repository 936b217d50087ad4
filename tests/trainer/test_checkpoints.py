"""What a run saves, restores and locks, and which process does it."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from run_parts import interrupt_at, make_run, said
from trainer_parts import Rows

from tinylm.checkpoint.training_state import load_training_state
from tinylm.system.runtime import Runtime
from tinylm.trainer.run import checkpoints as module
from tinylm.trainer.run import run_folder


def test_the_scaler_of_fp16_continues(tmp_path):
    """It would start at its first scale again, and skip the steps until the scale fits."""
    stopped = make_run(tmp_path, dtype=torch.float16, max_steps=5)
    stopped.checkpoints.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**5, growth_interval=7)
    interrupt_at(stopped, 4)
    resumed = make_run(tmp_path, dtype=torch.float16, max_steps=5, resume=True)
    resumed.checkpoints.restore()
    scaler = resumed.checkpoints.scaler
    assert scaler.get_scale() == 2.0**5 and scaler._get_growth_tracker() == 3  # good steps


def test_a_state_holds_only_what_is_trained(tmp_path):
    run = make_run(tmp_path, max_steps=1, lora=2)
    run.fit()
    names = set(load_training_state(run.checkpoints.state_folder).values["weights"])
    assert names == {name for name, _ in run.learner.model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize(
    ("environment", "starts_at"),
    [
        ({"TORCHELASTIC_RUN_ID": "größe"}, 3),  # a process that has never been restarted, in the same launch
        ({"TORCHELASTIC_RUN_ID": "another"}, 0),
        ({"TORCHELASTIC_RUN_ID": "another", "TORCHELASTIC_RESTART_COUNT": "2"}, 3),
        ({}, 0),
    ],
)
def test_a_run_that_torchrun_has_restarted_resumes_by_itself_and_waits(tmp_path, monkeypatch, environment, starts_at):
    """The lock of a lost machine is freed late, so a restarted run waits for it for half of the timeout."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "größe")
    interrupt_at(make_run(tmp_path, max_steps=5), 4)
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    waited = []
    monkeypatch.setattr(run_folder, "run_lock", lambda path, wait: waited.append(wait) or contextlib.nullcontext())
    run = make_run(tmp_path, max_steps=5, timeout=70.0, overwrite=True)
    run.fit()
    assert run.progress.step == starts_at and waited == [35.0 if starts_at else 0.0]
    assert ("removed the earlier run" in said(run)) == (starts_at == 0)


def test_only_the_main_process_saves_and_discards(tmp_path, monkeypatch):
    """Two processes that write the same file would tear it."""
    done = []
    monkeypatch.setattr(module, "discard_latest_state", lambda folder, step: done.append(("discarded", step)))
    for rank in (1, 0):
        run = make_run(tmp_path, ranks=(rank, 2))
        checkpoints = run.checkpoints
        checkpoints.writer = SimpleNamespace(
            save=lambda state: done.append(("state", state["step"])), wait=lambda: None
        )
        run.learner.save_folder = lambda folder, lineage: done.append((folder.name, lineage["step"]))
        checkpoints.save_state(3)
        checkpoints.save_model(4)
        checkpoints.discard_state(5)
        if rank == 1:
            assert not done
    assert done == [("state", 3), ("pretrain_16_epoch1", 4), ("discarded", 5)]


def test_processes_with_states_of_different_steps_are_refused(tmp_path, monkeypatch):
    """Each machine has its own disk; they would train different models, or wait for each other."""
    interrupt_at(make_run(tmp_path, max_steps=5), 4)
    run = make_run(tmp_path, max_steps=5, resume=True)
    monkeypatch.setattr(Runtime, "max_over_ranks", lambda self, value: value + 3)
    with pytest.raises(ValueError, match="the processes find states of different steps in .*pretrain_16_state"):
        run.checkpoints.restore()


def test_the_lineage_names_the_best_loss_so_far(tmp_path):
    run = make_run(tmp_path, max_steps=4)
    losses = iter([1.25, 1.75])
    run.validate = lambda *_: {"validation_loss": next(losses)}
    run.fit()
    lineage = json.loads((run.checkpoints.last_folder / "lineage.json").read_text())
    assert lineage["best_validation_loss"] == 1.25 and lineage["finished"]
    assert "best validation loss  1.2500" in said(run)


@pytest.mark.parametrize(("batch_size", "rows"), [(2, 12), (1, 2)])
def test_rows_per_step_stay_with_other_processes_but_not_with_other_flags(tmp_path, batch_size, rows):
    """A run of 3 processes with 2 x 2 rows each resumes in one; with another --batch_size it is a different run."""
    run = make_run(tmp_path, data=Rows(30), batch_size=batch_size)
    saved = {"batch_size": 2, "accumulation_steps": 2}
    run.checkpoints._keep_sizes({"identity": {"rows_per_optimizer_step": 12}, "settings": saved})
    assert run.plan.source.rows_per_step == rows and run.plan.steps_per_epoch == -(-30 // rows)
    assert ("note: 1 process(es) now share the 12 rows of a step" in said(run)) == (rows == 12)
    assert sum(len(batch.input_ids) for batch in next(run.plan.batches(0))) == rows
