"""What may come between two steps: a signal, a number that is none, a second run, a disk that is full."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from run_parts import interrupt_at, make_run, records, said
from trainer_parts import Rows, assert_same_bits, read_bytes, small_model, weights_of

from tinylm.checkpoint import training_state
from tinylm.checkpoint.training_state import load_training_state
from tinylm.commandline.exit_status import STOP_SIGNALS, Stopped, StopRequest
from tinylm.commandline.terminal import make_console
from tinylm.files.locks import run_lock
from tinylm.system.runtime import Runtime
from tinylm.trainer.core import loop
from tinylm.trainer.core.objectives import next_token_loss
from tinylm.trainer.run.run import RiseWatch, SpikeWatch, write_bad_batch


def signal_at(run, step: int, *numbers: int) -> None:
    """Send this process signals while `step` is computed."""
    log = run._log

    def then_signal(report):
        if report.step == step:
            for number in numbers:
                os.kill(os.getpid(), number)
        log(report)

    run._log = then_signal


@pytest.mark.parametrize("number", STOP_SIGNALS)
@pytest.mark.parametrize("step", [3, 4, 6, 10])  # between evaluations; at the end of an epoch, with one; with one; last
def test_a_signal_finishes_the_step_and_saves_and_nothing_is_lost(tmp_path, number, step):
    """What is due after that step, a validation or a model folder, comes when the run goes on."""
    whole = make_run(tmp_path / "whole")
    whole.fit()
    stopped = make_run(tmp_path / "parts")
    signal_at(stopped, step, number)
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=f"after step {step}, which is saved") as stop:
        stopped.fit()
    assert stop.value.signum == number and signal.getsignal(number) is before
    assert load_training_state(stopped.checkpoints.state_folder).values["step"] == step
    resumed = make_run(tmp_path / "parts", seed=1, resume=True)
    resumed.fit()
    assert resumed.progress.step == step
    assert_same_bits(weights_of(resumed.learner.model), weights_of(whole.learner.model))
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    for name in ("pretrain_16_epoch0", "pretrain_16_epoch1", "pretrain_16_epoch2", "pretrain_16_state/step_00000010"):
        assert read_bytes(tmp_path / "parts" / name) == read_bytes(tmp_path / "whole" / name), name
    lineage = json.loads((resumed.checkpoints.last_folder / "lineage.json").read_text())
    assert lineage["finished"] and lineage["best_validation_loss"] == whole.progress.best_validation_loss


def test_a_signal_in_the_last_validation_is_not_forgotten(tmp_path):
    """The run is finished then, but what would follow it, such as the quickstart's next stage, must not start."""
    run = make_run(tmp_path, max_steps=4)
    validate = run.validate

    def then_signal(data, step):
        if run.plan.num_steps == 4 and run.progress.best_validation_loss is not None:
            os.kill(os.getpid(), signal.SIGTERM)  # the second of two validations, at steps 2 and 4
        return validate(data, step)

    run.validate = then_signal
    with pytest.raises(Stopped, match="after the last step; the run is finished") as stop:
        run.fit()
    assert stop.value.signum == signal.SIGTERM and "pretrain: done" in said(run)
    assert load_training_state(run.checkpoints.state_folder).values["step"] == 4
    assert json.loads((run.checkpoints.last_folder / "lineage.json").read_text())["finished"]


def test_ctrl_c_is_acknowledged_while_the_step_is_still_computed(tmp_path):
    """A step may take a minute, and nothing was said until its end: people pressed Ctrl-C again, which ends it all."""
    run, heard = make_run(tmp_path), threading.Event()
    accumulate, console_print = loop.accumulate_gradients, run.stage.console.print

    def then_signal(*arguments, **options):
        if run.report.words:  # in the second step
            os.kill(os.getpid(), signal.SIGINT)
            assert heard.wait(60)
        return accumulate(*arguments, **options)

    def listen(text="", **options):
        console_print(text, **options)
        if str(text).startswith("stopping: finishing the step and saving it; a second Ctrl-C ends the run at once"):
            heard.set()

    run.stage.console.print = listen
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped, match="after step 2, which is saved"):
        patch.setattr(loop, "accumulate_gradients", then_signal)
        run.fit()


@pytest.mark.parametrize("closed_at", [0, 5, 10])
def test_a_closed_pipe_stops_the_run_as_a_signal_does(tmp_path, capfd, closed_at):
    """rich ended the program with status 1, and the steps since the last state were lost."""
    reader, writer = os.pipe()
    run = make_run(tmp_path)
    with os.fdopen(writer, "w") as file:
        console = make_console(file=file)
        run.stage = dataclasses.replace(run.stage, console=console)
        run.checkpoints.stage = run.report.stage = run.stage
        log = run._log

        def then_close(report):
            if report.step == closed_at:
                os.close(reader)
            log(report)

        run._log = then_close
        if closed_at == 0:
            os.close(reader)
        with pytest.raises(Stopped, match=f"after step {closed_at or 1}, which is saved|the run is finished") as stop:
            run.fit()
    assert 128 + stop.value.signum == 141 and console.when_closed is None
    assert load_training_state(run.checkpoints.state_folder).values["step"] == (closed_at or 1)
    assert capfd.readouterr().err == ""


def test_a_second_signal_ends_the_process_at_once(monkeypatch):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.signum == signal.SIGTERM and not left
        os.kill(os.getpid(), signal.SIGINT)
        assert left == [130]


def broken_at(*steps: int):
    """The next-token loss, but not a number in these steps (two micro-batches to a step, counted from 1)."""
    calls = itertools.count(-1)  # the first call is before the first step: it measures the memory of a row

    def objective(model, batch):
        loss, metrics = next_token_loss(model, batch)
        bad = model.training and next(calls) // 2 + 1 in steps
        return loss * float("nan") if bad else loss, metrics

    return objective


def test_a_step_that_is_no_number_is_skipped_counted_and_recorded(tmp_path):
    run = make_run(tmp_path, epochs=6, data=Rows(16))
    run.learner.objective = broken_at(3, 4)
    run.fit()
    assert said(run).count("; nothing was updated") == 2
    assert "skipped               2 of 10 steps" in said(run)
    lines = {record["step"]: record for record in records(tmp_path) if "loss" in record}
    assert [step for step, record in lines.items() if record["loss"] is None] == [3, 4]
    assert json.loads((run.checkpoints.last_folder / "lineage.json").read_text())["skipped_steps"] == 2
    state = load_training_state(run.checkpoints.state_folder).values
    assert state["num_skipped"] == 2


def test_a_stop_in_a_skipped_step_keeps_the_state_before_it(tmp_path):
    """The weights may be broken, so they must not replace the last good ones."""
    run = make_run(tmp_path, epochs=6, data=Rows(16))
    run.learner.objective = broken_at(5)
    signal_at(run, 5, signal.SIGINT)
    with pytest.raises(Stopped, match="after step 5, in which nothing was updated; the state before it is kept"):
        run.fit()
    assert load_training_state(run.checkpoints.state_folder).values["step"] == 4


def test_a_stop_that_cannot_save_its_state_is_an_error(tmp_path, monkeypatch):
    """It would say that step 5 is saved, and a resume would begin at step 4."""
    write = training_state.write_tensors

    def full_at_the_end(path, tensors):
        if "step_00000005" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, tensors)

    monkeypatch.setattr(training_state, "write_tensors", full_at_the_end)
    run = make_run(tmp_path)
    signal_at(run, 5, signal.SIGTERM)
    with pytest.raises((RuntimeError, Stopped), match="the training state could not be saved: .* No space left"):
        run.fit()


def test_a_signal_to_another_process_stops_this_one_too(tmp_path, monkeypatch):
    """Else it would wait for the other one until the timeout, and have no state of the same step."""
    run = make_run(tmp_path)
    log = run._log

    def then_signal_the_other(report):
        log(report)
        if report.step == 5:
            monkeypatch.setattr(Runtime, "any_rank", lambda self, flag: True)

    run._log = then_signal_the_other
    with pytest.raises(Stopped, match="after step 5, which is saved") as stop:
        run.fit()
    assert stop.value.signum == signal.SIGTERM


def test_first_last_skipped_and_every_third_step_are_recorded(tmp_path):
    run = make_run(tmp_path, epochs=6, data=Rows(16), log_interval=3)
    run.learner.objective = broken_at(5)
    run.spikes = SimpleNamespace(warning=lambda loss: "größer als sonst")
    run.fit()
    assert [record["step"] for record in records(tmp_path) if "loss" in record] == [1, 3, 5, 6, 9, 10]
    warned = [line for line in said(run).splitlines() if line.endswith(": größer als sonst")]
    assert warned == [f"warning: step {step}: größer als sonst" for step in range(1, 11) if step != 5]


def test_the_bad_batch_has_every_row_with_its_targets(tmp_path):
    rows = Rows(3)
    batches = [rows.collate(rows.rows[:2]), rows.collate(rows.rows[2:])]
    write_bad_batch(tmp_path / "bad.jsonl", 14, batches, lambda ids: f"größe {ids[0]}")
    found = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [(row["step"], row["micro_batch"]) for row in found] == [(14, 0), (14, 0), (14, 1)]
    for row, batch, place in zip(found, [batches[0], *batches], (0, 1, 0), strict=True):
        ids, targets = batch.input_ids[place].tolist(), batch.targets[place].tolist()
        assert (row["text"], row["input_ids"], row["targets"]) == (f"größe {ids[0]}", ids, targets)


def test_ten_in_a_row_end_the_run_and_leave_the_batch(tmp_path):
    run = make_run(tmp_path, epochs=9, max_steps=30, data=Rows(16), save_interval=1)
    run.learner.objective = broken_at(*range(5, 31))
    run.learner.tokenizer = SimpleNamespace(decode=lambda ids: f"{len(ids)} tokens")
    with pytest.raises(RuntimeError, match=r"step 14: the loss is nan .* in 10 steps in a row; the last batch is in "):
        run.fit()
    rows = [json.loads(line) for line in (tmp_path / "pretrain_16_bad_batch_rank0.jsonl").read_text().splitlines()]
    assert [(row["step"], row["micro_batch"]) for row in rows] == [(14, 0), (14, 0), (14, 1), (14, 1)]
    step_14 = next(itertools.islice(run.plan.batches(0), 13, None))
    expected = [row for batch in step_14 for row in batch.input_ids.tolist()]
    assert [row["input_ids"] for row in rows] == expected and rows[0]["text"] == f"{len(expected[0])} tokens"
    kept = load_training_state(run.checkpoints.state_folder).values
    assert kept["step"] == 3  # the update of step 4 may be what broke the weights
    assert all(torch.isfinite(weight).all() for weight in kept["weights"].values())
    again = make_run(tmp_path, epochs=9, max_steps=30, data=Rows(16), resume=True, learning_rate=1e-3)
    again.fit()
    assert again.progress.step == 3 and again.progress.num_skipped == 0


def test_a_folder_belongs_to_one_run(tmp_path):
    run = make_run(tmp_path, max_steps=2)
    with run_lock(tmp_path / ".pretrain.lock"):
        with pytest.raises(ValueError, match=rf"is in use by another run \(process {os.getpid()} on "):
            run.fit()
        assert not run.checkpoints.state_folder.exists()
        make_run(tmp_path / "other", max_steps=1).fit()
    run.fit()  # the file is still there, and means nothing


def test_a_dead_owner_keeps_no_lock(tmp_path):
    child = os.fork()
    if child == 0:
        with run_lock(tmp_path / "lock"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / "lock").read_text().startswith(f"process {child} on ")
    with run_lock(tmp_path / "lock"):
        assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_run_sweeps_up_after_a_killed_one(tmp_path):
    for name in (".pretrain_16_epoch0.abc.tmp", ".pretrain_16_epoch0.abc.old", ".other.abc.tmp"):
        (tmp_path / name).mkdir(parents=True)
    make_run(tmp_path, max_steps=1).fit()
    hidden = {path.name for path in tmp_path.glob(".*")}
    assert hidden == {".other.abc.tmp", ".pretrain.lock"}


def test_a_state_that_cannot_be_saved_is_said_and_the_next_one_is_tried(tmp_path, monkeypatch):
    """A disk may be full for an hour; the run need not end for it, unless at its own end."""
    write, first_good = training_state.write_tensors, ["step_00000008"]

    def sometimes_full(path, tensors):
        if path.parent.name[1:].split(".")[0] < first_good[0]:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, tensors)

    monkeypatch.setattr(training_state, "write_tensors", sometimes_full)
    run = make_run(tmp_path)
    run.fit()
    assert said(run).count("warning: the last training state could not be saved ([Errno 28] No space left") == 3
    assert load_training_state(run.checkpoints.state_folder).values["step"] == 10
    first_good[0] = "step_00000099"
    stopped = make_run(tmp_path / "other", max_steps=3)
    with pytest.raises(RuntimeError, match=r"the training state could not be saved: \[Errno 28\] No space left"):
        stopped.fit()


def test_a_jump_of_the_loss_is_said_once_and_changes_nothing():
    watch = SpikeWatch(num_steps=20)
    losses = [2.0 + 0.1 * (-1) ** step for step in range(40)]
    assert [watch.warning(loss) for loss in losses] == [None] * 40
    assert watch.warning(2.9) == "the loss jumped to 2.9, after 2 on average; look at the data of this step"
    assert watch.warning(2.1) is None
    for loss, is_far in ((2.59, False), (2.61, True)):  # the mean is 2 and the deviation 0.1: 6 of them are far
        watch = SpikeWatch(num_steps=20)
        for step in range(20):
            watch.warning(2.0 + 0.1 * (-1) ** step)
        assert (watch.warning(loss) is not None) == is_far


def test_a_model_that_computes_stays_as_it_was(tmp_path):
    """The hook that holds updates back for a copy goes with the run."""
    run = make_run(tmp_path, max_steps=1)
    run.fit()
    assert all(not optimizer._optimizer_step_pre_hooks for optimizer in run.learner.optimizers)
    assert small_model().training is False


def test_a_run_that_ends_above_its_start_says_so(tmp_path):
    """Fine-tuning on an identity ended at a loss of 5.85, in gibberish and without a word."""
    quiet = make_run(tmp_path / "a", max_steps=20)
    quiet.fit()
    loud = make_run(tmp_path / "b", max_steps=20, learning_rate=3e-3)
    log, loss = loud._log, [1.0] * 2 + [1.5] * 16 + [1.2, 1.5]

    def another_loss(report):
        report.loss = loss[report.step - 1]
        log(report)

    loud._log = another_loss
    interrupt_at(loud, 8)
    resumed = make_run(tmp_path / "b", max_steps=20, learning_rate=3e-3, resume=True)
    log, resumed._log = resumed._log, another_loss
    resumed.fit()
    assert "warning: the loss rose" not in said(quiet)
    assert (
        "warning: the loss rose from 1.00 in the first steps to 1.35 in the last; run it again with a lower "
        "--learning_rate, such as 0.0003 (now 0.003), and --overwrite" in said(resumed)
    )


@pytest.mark.parametrize(
    ("num_steps", "losses", "is_warned"),
    [
        (20, [1.0] * 18 + [1.31, 1.31], True),
        (20, [1.0] * 18 + [1.29, 1.29], False),
        (20, [1.0] * 18 + [1.0, 1.5], False),  # the mean of two
        (20, [0.01] * 18 + [0.1, 0.1], False),  # ten times as much, and still nothing
        (2000, [5.0] + [1.0] * 9 + [2.0] * 10, True),  # ten steps are the most that are compared
        (2000, [1.0] * 5, False),  # fewer than that
    ],
)
def test_how_far_above_the_start_is_too_far(num_steps, losses, is_warned):
    watch = RiseWatch(num_steps, [])
    for loss in losses:
        watch.add(loss)
    assert (watch.warning() is not None) == is_warned
