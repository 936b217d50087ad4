"""What a run prints and records, held to worked examples: the plan, a step's line, and the metrics file."""

from __future__ import annotations

import json
import math
import os
import sys
from types import SimpleNamespace

import pytest
from run_parts import interrupt_at, make_run, said
from trainer_parts import Rows

from tinylm.checkpoint import training_state
from tinylm.trainer.core.loop import StepReport
from tinylm.trainer.run.estimate import Memory, expected_seconds
from tinylm.trainer.run.report import MetricsLog


def step_report(step: int, num_tokens: int, seconds: float) -> StepReport:
    rest = {"loss": 2.125, "learning_rate": 3e-3, "grad_norm": 0.75, "num_targets": 9}
    return StepReport(step, 10, num_tokens=num_tokens, seconds=seconds, metrics={"reward_margin": 0.3}, **rest)


def plan_of(run, name: str) -> str:
    (line,) = [line for line in said(run).splitlines() if line.split()[:1] == [name]]
    return line.split(maxsplit=1)[1]


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_the_plan_estimates_time_and_memory(tmp_path, sharding):
    """13 rows in steps of 12 (2 x 2 on 3 processes): 2 steps in each of 4 epochs, of 13 x 24 tokens an epoch.

    A validation has 3 rows, at half the time of a row in training: after steps 2, 4, 6 and 8.
    """
    run = make_run(tmp_path, ranks=(0, 3), max_seq_len=24, sharding=sharding, lora=2, max_steps=0)
    tokens = 4 * 13 * 24 + 4 * 3 * 24 / 2
    operations = tokens * run.learner.model.training_flops_per_token(24.0)
    memory = Memory(fixed=0.9e9, per_row=0.05e9, rows=2, limit=24.25e9)
    speed = operations / (7620 * 3 * 0.4)  # a process reaches 40% of it
    seconds = expected_seconds(run.plan, speed, run.report.flops_per_token, run.validation_data)
    run.report.print_plan(speed, seconds, memory)
    assert plan_of(run, "estimate") == "about 2h07m, 1.0 of 24.2 GB of memory"
    total, trained = run.report.num_parameters, run.report.num_trained
    assert 0 < trained < total
    assert plan_of(run, "parameters") == f"{total:,}, of which {trained:,} train ({100 * trained / total:.2f}%)"
    assert plan_of(run, "steps") == "8 in 4 epochs, each 12 rows x 24"
    assert plan_of(run, "optimizer") == "adamw, learning rate up to 0.01"
    shares = ", each a share of the model" if sharding == "fsdp" else ""
    assert plan_of(run, "device") == f"cpu, float32, 3 processes{shares}"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"max_steps": 0}, "16 in 4 epochs, each 4 rows x 0"),
        ({"max_steps": 16}, "16 in 4 epochs, each 4 rows x 0"),
        ({"max_steps": 3, "epochs": 1}, "3 in 1 epoch, each 4 rows x 0 (--max_steps; all data would take 4)"),
        (
            {"max_steps": 9, "epochs": 1, "batch_size": 99},
            "9 in 9 epochs, each 13 rows x 0 (--max_steps; the data is repeated after every 1 step)",
        ),
    ],
)
def test_the_plan_says_what_max_steps_means_for_the_data(tmp_path, settings, text):
    run = make_run(tmp_path, **settings)
    run.report.print_plan(1e9, 1.0, Memory(0.0, 1.0, 1, None))
    assert plan_of(run, "steps") == text and plan_of(run, "estimate").endswith(", 0.0 GB of memory")


def test_a_steps_line(tmp_path):
    """Resumed after step 6. Step 7 has 100 tokens/s and step 9 has 300: a moving average of 0.9 x 100 + 0.1 x 300."""
    run = make_run(tmp_path, ranks=(0, 3), log_interval=3, epochs=9, eval_interval=0, keep_epochs="last")
    run.progress.step = 6
    report, flops = run.report, run.learner.model.training_flops_per_token(float(run.stage.settings.max_seq_len))
    report.matmul_flops = 120 * flops / (3 * 0.25)  # 3 processes with a quarter of it each do 120 tokens/s
    with report.live():
        report.show_validation(6, {"validation_loss": 1.75, "validation_größe": 0.5}, ["[b]ein\n Satz"], 5.0)
        report.show_step(step_report(7, num_tokens=200, seconds=2.0))
        record = report.show_step(step_report(9, num_tokens=300, seconds=1.0))  # 1 step to do, and a validation
    assert said(run).splitlines() == [
        "pretrain 6/10 · validation loss 1.75 · validation größe 0.5",
        "    [b]ein Satz",
        "pretrain 9/10 · 6s left · loss 2.125 · val 1.750 · reward margin 0.3 · 120 tok/s",
    ]
    assert record == {
        "loss": 2.125, "learning_rate": 3e-3, "grad_norm": 0.75, "tokens_per_second": 120.0, "matmul_share": 0.25,
        "reward_margin": 0.3,
    }  # fmt: skip
    with report.live():
        report.show_step(step_report(10, num_tokens=300, seconds=1.0))  # the last step is always shown
    assert said(run).splitlines()[-1].startswith("pretrain 10/10 · ")


def test_a_compiled_run_says_so_once(tmp_path):
    for resume in (False, True):
        run = make_run(tmp_path, max_steps=5, use_compile=True, resume=resume)
        run.learner.model.compile_for_training = lambda *_: None
        if resume:
            run.fit()
            assert run.progress.step == 3
        else:
            interrupt_at(run, 4)
        assert said(run).count("compiled in the first step, which took ") == 1


def test_a_finished_run_is_not_told_to_train_for_more_steps(tmp_path):
    make_run(tmp_path, max_steps=2, learning_rate=1e-9).fit()
    again = make_run(tmp_path, max_steps=2, learning_rate=1e-9, resume=True)
    again.fit()
    assert "weights moved" in said(again) and "hardly moved" not in said(again)


# --- the metrics file ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_pending", [True, False])
def test_a_resumed_run_keeps_the_lines_up_to_its_step(tmp_path, is_pending):
    """If the evaluation of step 3 is still to be made, its line is dropped: it comes again."""
    lines = [{"step": 1, "loss": 3.5}, {"step": 2, "loss": 2.5}, {"step": 2, "validation_loss": 2.25}]
    lines += [{"step": 3, "loss": 1.5}, {"step": 3, "validation_loss": 1.25}, {"step": 4, "loss": 0.5}]
    path = tmp_path / "dpo_16_metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2, "lo')
    metrics = MetricsLog(tmp_path, "dpo_16")
    with metrics.opened(3, is_pending):
        pass
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines[: 4 if is_pending else 5]
    with metrics.opened(0):
        assert path.read_text() == ""


def test_a_line_is_in_the_file_at_once_and_on_the_disk_after_a_flush(tmp_path, monkeypatch):
    """JSON has neither NaN nor infinity. Whoever follows the file sees each step when it is done."""
    metrics, synced = MetricsLog(tmp_path, "dpo_16"), []
    with metrics.opened(0):
        metrics.write(7, {"loss": math.nan, "grad_norm": -math.inf, "rate": 0.5, "sample_0": "schön"})
        (line,) = metrics.path.read_text(encoding="utf-8").splitlines()
        monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_ino))
        metrics.flush()
    assert json.loads(line) == {"step": 7, "loss": None, "grad_norm": None, "rate": 0.5, "sample_0": "schön"}
    assert "NaN" not in line and synced == [metrics.path.stat().st_ino]


def test_metrics_are_flushed_before_each_state_is_written(tmp_path, monkeypatch):
    """After a power cut, no step before the saved one may lack its line."""
    run = make_run(tmp_path, max_steps=4)
    events, publish = [], training_state._publish
    run.metrics.flush = lambda: events.append("flush")
    monkeypatch.setattr(training_state, "_publish", lambda *args: events.append(args[1]) or publish(*args))
    run.fit()
    assert events == ["flush", 3, "flush", 4]


def test_only_the_main_process_writes_metrics(tmp_path):
    metrics = MetricsLog(tmp_path / "new", "dpo_16", is_main=False)
    with metrics.opened(0):
        metrics.write(1, {"loss": 0.5})
        metrics.flush()
    assert not (tmp_path / "new").exists()


def test_tensorboard_gets_numbers_and_texts_and_forgets_the_steps_after_the_resume(tmp_path, monkeypatch):
    calls = []

    class Writer:
        def __init__(self, folder, purge_step):
            calls.append((folder, purge_step))

        def __getattr__(self, name):
            return lambda *args: calls.append((name, *args))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    metrics = MetricsLog(tmp_path, "dpo_16", tensorboard=True)
    with metrics.opened(6):
        metrics.write(7, {"loss": 0.5, "sample_0": "schön"})
    place = str(tmp_path / "tensorboard" / "dpo_16")
    texts = [("add_scalar", "loss", 0.5, 7), ("add_text", "sample_0", "schön", 7)]
    assert calls == [(place, 7), *texts, ("close",)]


def test_each_sample_has_a_number(tmp_path):
    run = make_run(tmp_path, max_steps=1, data=Rows(5))
    run.learner.sample = lambda: ["eins", "zwei"]
    run.fit()
    last = json.loads(run.metrics.path.read_text().splitlines()[-1])
    assert (last["sample_0"], last["sample_1"]) == ("eins", "zwei")
