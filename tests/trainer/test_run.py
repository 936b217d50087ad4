"""A run around the loop: resume to the bit, files and their names, and a report that does not flatter."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from run_parts import interrupt_at, make_run, records, said
from trainer_parts import Rows, assert_same_bits, read_bytes, weights_of

from tests.checkpoint.saved_states import save_state
from tinylm.checkpoint import training_state
from tinylm.checkpoint.training_state import load_training_state
from tinylm.trainer.core.objectives import next_token_loss
from tinylm.trainer.run.resume import ADJUSTABLE, FREE
from tinylm.trainer.run.run import Run
from tinylm.trainer.train_dpo import DPOSettings
from tinylm.trainer.train_full_sft import FullSFTSettings
from tinylm.trainer.train_lora import LoRASettings
from tinylm.trainer.train_pretrain import PretrainSettings


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_is_exact_to_the_bit(tmp_path, optimizer):
    """Ten steps at once, or stopped in the seventh and resumed from the sixth, across the end of an epoch: the same
    weights, optimizer state, dropout and metrics. The original project's checkpoint had neither optimizer nor
    position, and held half-precision weights."""
    whole = make_run(tmp_path / "whole", optimizer=optimizer)
    whole.fit()
    stopped = make_run(tmp_path / "parts", optimizer=optimizer)
    interrupt_at(stopped, 7)
    assert load_training_state(stopped.checkpoints.state_folder).values["step"] == 6
    resumed = make_run(tmp_path / "parts", seed=1, optimizer=optimizer, resume=True)  # its own weights must not matter
    resumed.fit()

    assert_same_bits(weights_of(resumed.learner.model), weights_of(whole.learner.model))
    for name in ("pretrain_16_epoch1", "pretrain_16_epoch2", "pretrain_16_state/step_00000010"):
        assert read_bytes(tmp_path / "parts" / name) == read_bytes(tmp_path / "whole" / name), name
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    steps = [record["step"] for record in records(tmp_path / "parts") if "loss" in record]
    assert steps == list(range(1, 11))
    assert "from step 6" in said(resumed)
    assert resumed.progress.best_validation_loss == whole.progress.best_validation_loss


def test_the_best_validation_loss_outlives_a_stop(tmp_path):
    """The best may lie before the stop; what is left of the run may only have worse ones."""
    stopped = make_run(tmp_path, max_steps=4, save_interval=3)
    stopped.validate = lambda *_: {"validation_loss": 0.25}
    interrupt_at(stopped, 4)
    resumed = make_run(tmp_path, max_steps=4, save_interval=3, resume=True)
    resumed.fit()
    assert resumed.progress.step == 3 and resumed.progress.best_validation_loss == 0.25


def test_dropout_is_another_at_every_step_and_is_part_of_the_run(tmp_path):
    """What makes the test above sharp: with other dropout the weights are other weights."""
    runs = [make_run(tmp_path / str(i), seed=0, max_steps=2, dropout=p) for i, p in enumerate((0.2, 0.0))]
    for run in runs:
        run.fit()
    with pytest.raises(AssertionError):
        assert_same_bits(weights_of(runs[0].learner.model), weights_of(runs[1].learner.model))
    drawn = numbers_drawn(make_run(tmp_path / "2", epochs=4, max_steps=0))
    drawn += numbers_drawn(make_run(tmp_path / "3", epochs=4, max_steps=0, seed_setting=7))  # drops other units
    assert len(set(drawn)) == len(drawn) == 2 * 4 * (2 + 2 + 2 + 1)


def numbers_drawn(run) -> list[tuple[float, ...]]:
    """What the generator gives at the start of each micro-batch of a run."""
    drawn = []

    def recorded(model, batch):
        if model.training:
            drawn.append(tuple(torch.rand(4).tolist()))
        return next_token_loss(model, batch)

    run.learner.objective = recorded
    run.fit()
    return drawn[1:]  # without the row on which the run measures its memory


def test_ranks_see_other_rows_and_other_dropout_in_every_epoch(tmp_path):
    """The original project set the seed anew at each epoch, the same on all ranks: they then drew the same dropout."""
    runs = [make_run(tmp_path, ranks=(rank, 2), batch_size=1, max_steps=0) for rank in (0, 1)]
    rows = [[step[0].input_ids for step in run.plan.batches(0)] for run in runs]
    assert len(rows[0]) == len(rows[1]) == 16
    assert not any(map(torch.equal, *rows))
    drawn = []
    for run, step in itertools.product(runs, range(16)):
        run.stage.runtime.seed_step(step)
        drawn.append(tuple(torch.rand(4).tolist()))
    assert len(set(drawn)) == len(drawn) == 32


def test_an_epoch_has_every_row_once_and_its_last_step_is_its_own(tmp_path):
    """A step never spans two epochs, so what is left over at an epoch's end cannot leak into the next."""
    run = make_run(tmp_path, data=(data := Rows(13)), max_steps=0)
    steps = list(run.plan.batches(0))
    assert [len(step) for step in steps] == [2, 2, 2, 1] * 4
    for epoch in range(4):
        seen = [batch for step in steps[4 * epoch : 4 * epoch + 4] for batch in step]
        assert sum(batch.count for batch in seen) == data.num_targets
        assert sum(len(batch.input_ids) for batch in seen) == 13
    orders = [torch.cat([b.input_ids for s in steps[4 * e : 4 * e + 4] for b in s]) for e in range(4)]
    assert not torch.equal(orders[0], orders[1])


@pytest.mark.parametrize("epochs", [1, 4])
def test_max_steps_rules_over_epochs_and_repeats_the_data(tmp_path, epochs):
    """A run of 50 steps on a small text ended after its one epoch of a single step, without a word."""
    run = make_run(tmp_path, max_steps=10, epochs=epochs, save_interval=0)
    run.fit()
    steps = [record["step"] for record in records(tmp_path) if "loss" in record]
    assert (run.plan.num_steps, run.plan.last_epoch) == (10, 2) and steps == list(range(1, 11))
    assert "10 in 3 epochs" in said(run)


def test_the_schedule_ends_at_a_tenth_of_its_peak_with_accumulation(tmp_path):
    run = make_run(tmp_path, max_steps=0, epochs=10, eval_interval=0)
    run.fit()
    rates = [record["learning_rate"] for record in records(tmp_path) if "learning_rate" in record]
    assert run.plan.num_steps == len(rates) == 40
    assert rates[0] == pytest.approx(1e-2 / 8) and max(rates) == pytest.approx(1e-2)
    assert rates[-1] == pytest.approx(1e-3, rel=0.05)


def test_folders_names_and_the_finished_flag(tmp_path):
    run = make_run(tmp_path, keep_epochs="all")
    assert run.fit() == tmp_path / "pretrain_16_epoch2" == run.checkpoints.last_folder
    assert str(tmp_path / "pretrain_16_epoch2") in said(run).partition("pretrain: done")[0]  # the plan says so too
    names = ["pretrain_16_epoch0", "pretrain_16_epoch1", "pretrain_16_epoch2", "pretrain_16_state"]
    assert {path.name for path in tmp_path.glob("[!.]*")} == {*names, "pretrain_16_metrics.jsonl"}
    lineages = [json.loads((tmp_path / name / "lineage.json").read_text()) for name in names[:3]]
    assert [(x["epoch"], x["step"], x["finished"]) for x in lineages] == [(0, 4, False), (1, 8, False), (2, 10, True)]
    assert all(x["stage"] == "pretrain" and x["parent"]["weights"] == "abc" for x in lineages)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pkl", ".pt", ".pth", ".bin")]


def test_the_loop_gets_what_the_run_was_asked_for(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("tinylm.trainer.run.run.fit", lambda *args, **options: calls.append((args, options)))
    run = make_run(tmp_path, grad_clip=0.25, dtype=torch.float16, max_steps=7)
    run.fallback.decide_to_compile = lambda seconds: setattr(run.plan, "at_once", 3)
    run.fit()
    ((args, options),) = calls
    assert args[1] is run.learner.objective and args[6] == 7
    options.pop("on_step")
    assert options == {"start_step": 0, "grad_clip": 0.25, "scaler": run.checkpoints.scaler, "at_once": 3}
    assert isinstance(options["scaler"], torch.amp.GradScaler)


def test_a_state_holds_all_a_run_needs_in_full_precision(tmp_path):
    """Resuming from half-precision weights loses every small update since. Computing in bf16 must not show here."""
    run = make_run(tmp_path, dtype=torch.bfloat16, max_steps=3, optimizer="adamw")
    run.fit()
    state = load_training_state(run.checkpoints.state_folder).values
    assert state["step"] == 3 and state["settings"]["seed"] == 42
    assert {name: w.dtype for name, w in state["weights"].items()} == {
        name: torch.float32 for name, _ in run.learner.model.named_parameters()
    }
    assert_same_bits(state["weights"], weights_of(run.learner.model))
    assert any((w != w.bfloat16().float()).any() for w in state["weights"].values())
    (moments,) = state["optimizers"]
    assert moments.keys() == state["weights"].keys()
    for moment in moments.values():
        assert moment["step"] == 3 and moment["exp_avg"].dtype == moment["exp_avg_sq"].dtype == torch.float32


def test_under_lora_only_the_adapter_is_in_the_state(tmp_path):
    run = make_run(tmp_path, lora=2, max_steps=2)
    run.fit()
    names = set(load_training_state(run.checkpoints.state_folder).values["weights"])
    assert names == {name for name, p in run.learner.model.named_parameters() if "lora_" in name} and len(names) == 14


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"data": Rows(13, seed=4), "data_path": "größe/new text.txt"},
            "made with no --data_path, this run has --data_path 'größe/new text.txt'; leave out --data_path to resume",
        ),
        (
            {"data": Rows(13, seed=4)},
            "made with the data TinyWorld, and the files in it are others now; restore it to resume the run, or",
        ),
        (
            {"parent": {"path": "out/other", "weights": "def"}},
            r"made with parent out/sft \(fingerprint abc\), this run has out/other \(fingerprint def\); ",
        ),
        ({"parent": {"path": "out/sft", "weights": "def"}}, "the parent out/sft, and its weights are others now; "),
        ({"batch_size": 4}, "made with --batch_size 2, this run has --batch_size 4; pass --batch_size 2 to resume it"),
        ({"max_steps": 9}, "made with --max_steps 2, this run has --max_steps 9; pass --max_steps 2 to resume it"),
        (
            {"max_steps": 0, "epochs": 3},
            "made with --max_steps 2 --epochs 4, this run has --max_steps 0 --epochs 3; pass --max_steps 2 --epochs 4",
        ),
        ({"optimizer": "muon"}, "made with --optimizer adamw, this run has --optimizer muon; pass --optimizer adamw"),
        ({"seed_setting": 7}, "made with --seed 42, this run has --seed 7; pass --seed 42 to resume it"),
        ({"shape": {"num_hidden_layers": 2}}, "this run has"),
        ({"shape": {"num_attention_heads": 4, "num_key_value_heads": 2}}, "num_attention_heads 2, this run has 4"),
        ({"lora": 2}, "made with trained parameters"),
    ],
)
def test_a_resume_of_another_run_is_refused_in_one_line(tmp_path, change, message):
    make_run(tmp_path, max_steps=2).fit()
    run = make_run(tmp_path, **{"max_steps": 2, "resume": True, **change})
    before = weights_of(run.learner.model)
    with pytest.raises(ValueError, match=message) as error:
        run.fit()
    assert "\n" not in str(error.value)
    assert_same_bits(before, weights_of(run.learner.model))


@pytest.mark.parametrize(
    ("name", "was", "now"),
    [("weight_decay", 0.1, 0.2), ("beta1", 0.9, 0.8), ("beta2", 0.95, 0.99), ("warmup_fraction", 0.2, 0.1),
     ("final_lr_fraction", 0.1, 0.5)],
)  # fmt: skip
def test_a_setting_of_the_mathematics_cannot_change_halfway(tmp_path, name, was, now):
    """weight_decay and the betas were silently replaced by those of the saved optimizer, the schedule's were taken
    over in silence: either way the run was not the one that was asked for, and recorded as if it were."""
    interrupt_at(make_run(tmp_path, max_steps=5), 4)
    run = make_run(tmp_path, max_steps=5, resume=True, **{name: now})
    before = weights_of(run.learner.model)
    with pytest.raises(ValueError) as error:
        run.fit()
    folder = run.checkpoints.state_folder
    assert str(error.value) == (
        f"{folder} was made with --{name} {was}, this run has --{name} {now}; pass --{name} {was} to resume it, "
        "or choose another --output_dir for a new run"
    )
    assert_same_bits(before, weights_of(run.learner.model))


def test_a_diverged_run_goes_on_with_a_lower_learning_rate_and_says_so(tmp_path):
    """The error about a loss that is no number advises just that. It is shown, and recorded in the lineage."""
    interrupt_at(make_run(tmp_path, max_steps=8), 4)
    run = make_run(tmp_path, max_steps=8, resume=True, learning_rate=5e-3, grad_clip=0.5)
    interrupt_at(run, 7)
    assert "note: learning_rate is 0.005 from step 3 on; it was 0.01" in said(run)
    assert "note: grad_clip is 0.5 from step 3 on; it was 1.0" in said(run)
    rates = {record["step"]: record["learning_rate"] for record in records(tmp_path) if "learning_rate" in record}
    schedule = make_run(tmp_path, max_steps=8, learning_rate=1e-2).stage.settings.learning_rate_at
    assert rates == {step: pytest.approx(schedule(step - 1, 8) / (1 if step <= 3 else 2)) for step in range(1, 8)}
    again = make_run(tmp_path, max_steps=8, resume=True, learning_rate=5e-3, grad_clip=0.5)
    again.fit()
    assert again.progress.step == 6 and "note:" not in said(again)
    lineage = json.loads((again.checkpoints.last_folder / "lineage.json").read_text())
    assert lineage["changed_on_resume"] == [
        {"step": 3, "setting": "learning_rate", "was": 1e-2, "now": 5e-3},
        {"step": 3, "setting": "grad_clip", "was": 1.0, "now": 0.5},
    ]
    with pytest.raises(ValueError, match="made with --learning_rate 0.005, this run has --learning_rate 0.02; pass"):
        make_run(tmp_path, max_steps=8, resume=True, learning_rate=2e-2, grad_clip=0.5).fit()  # nothing left to train


def test_what_does_not_touch_the_mathematics_may_change(tmp_path):
    """How often something is shown or saved, where it is computed, how a batch is cut up: to the same weights."""
    whole = make_run(tmp_path / "whole", max_steps=5, dropout=0.0)
    whole.fit()
    interrupt_at(make_run(tmp_path / "parts", max_steps=5, dropout=0.0), 4)
    free = {"log_interval": 2, "eval_interval": 0, "eval_batches": 1, "save_interval": 1, "num_workers": 1}
    free |= {"device": "cuda", "batch_size": 1, "accumulation_steps": 4, "epochs": 2}
    resumed = make_run(tmp_path / "parts", max_steps=5, dropout=0.0, resume=True, **free)
    resumed.fit()
    assert resumed.progress.step == 3 and "note:" not in said(resumed)
    for name, weight in weights_of(resumed.learner.model).items():
        torch.testing.assert_close(weight, weights_of(whole.learner.model)[name], atol=1e-4, rtol=1e-3)


def test_a_state_without_settings_is_held_to_what_it_has(tmp_path):
    """Written before states named their settings; such a run can still be resumed."""
    interrupt_at(stopped := make_run(tmp_path, max_steps=5), 4)
    state = load_training_state(stopped.checkpoints.state_folder).values
    for name in ("settings", "sources", "changed_on_resume", "first_weights"):
        del state[name]
    save_state(stopped.checkpoints.state_folder, state)
    resumed = make_run(tmp_path, max_steps=5, resume=True)
    resumed.fit()
    assert resumed.progress.step == 3 and moved(resumed).endswith(", since step 3")


def test_every_setting_is_free_or_held_by_choice():
    """A setting that is new is held, until somebody says that it is harmless; and FREE names nothing that is gone."""
    stages = (PretrainSettings, FullSFTSettings, LoRASettings, DPOSettings)
    names = {field.name for stage in stages for field in dataclasses.fields(stage)}
    assert FREE | ADJUSTABLE <= names and not FREE & ADJUSTABLE
    assert names - FREE - ADJUSTABLE == {
        "beta", "beta1", "beta2", "final_lr_fraction", "lora_alpha", "lora_dropout", "lora_rank", "optimizer",
        "read_control_tokens", "seed", "target_modules", "tinyworld_chats", "tinyworld_documents", "tinyworld_pairs",
        "warmup_fraction", "weight_decay",
    }  # fmt: skip


def test_a_finished_run_resumed_does_nothing_and_a_new_one_starts_over(tmp_path):
    first = make_run(tmp_path, max_steps=2)
    first.fit()
    again = make_run(tmp_path, max_steps=2, resume=True, seed=1)
    assert again.fit() == first.checkpoints.last_folder
    assert_same_bits(weights_of(again.learner.model), weights_of(first.learner.model))
    nothing = make_run(tmp_path / "elsewhere", max_steps=1, resume=True)
    nothing.fit()
    assert "nothing to resume" in said(nothing) and nothing.progress.step == 0


def test_a_damaged_state_is_named_and_the_one_before_it_is_taken(tmp_path):
    whole = make_run(tmp_path / "whole", max_steps=8)
    whole.fit()
    run = make_run(tmp_path / "parts", max_steps=8)
    interrupt_at(run, 7)
    flip_a_bit(run.checkpoints.state_folder / "step_00000006" / "state.safetensors")
    resumed = make_run(tmp_path / "parts", max_steps=8, resume=True)
    resumed.fit()
    assert "step_00000006/state.safetensors is not what was written" in said(resumed)
    assert "resuming from step_00000004 instead" in said(resumed) and resumed.progress.step == 4
    assert_same_bits(weights_of(resumed.learner.model), weights_of(whole.learner.model))
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    for state in resumed.checkpoints.state_folder.glob("step_*"):
        flip_a_bit(state / "state.json")
    with pytest.raises(ValueError, match="every state in .* is damaged: .*step_00000008.*; .*step_00000006"):
        make_run(tmp_path / "parts", max_steps=8, resume=True).fit()


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_model_that_cannot_be_sampled_trains_on(tmp_path):
    """A step may just have broken its weights, which the next ones will tell. A sample ended the run, as if the user
    had made a mistake; and a best validation loss that was no number could never be improved on."""
    run = make_run(tmp_path, max_steps=4)
    losses = iter([float("nan"), 0.5])
    run.validate = lambda *_: {"validation_loss": next(losses)}
    run.learner.sample = lambda: (_ for _ in ()).throw(ValueError("the model computes no numbers"))
    run.fit()
    assert said(run).count("warning: no sample (the model computes no numbers)") == 2
    assert run.progress.best_validation_loss == 0.5


def test_a_state_that_cannot_be_saved_is_a_warning_and_the_last_one_an_error(tmp_path, monkeypatch):
    """Else the run would end with status 0, and leave a state that is not its end."""
    write, fails = training_state.write_tensors, {"step_00000003"}

    def sometimes(path, tensors):
        if any(step in str(path) for step in fails):
            raise OSError("No space left on device")
        write(path, tensors)

    monkeypatch.setattr(training_state, "write_tensors", sometimes)
    run = make_run(tmp_path / "a", max_steps=6)
    run.fit()
    assert "warning: the last training state could not be saved (No space left on device)" in said(run)
    assert load_training_state(run.checkpoints.state_folder).values["step"] == 6
    fails.add("step_00000006")
    last = make_run(tmp_path / "b", max_steps=6)
    with pytest.raises(RuntimeError, match="the training state could not be saved: No space left"):
        last.fit()
    assert load_training_state(last.checkpoints.state_folder).values["step"] == 4


def test_what_a_killed_run_has_left_half_written_goes_and_nothing_else(tmp_path):
    """A kill while the metrics file was rewritten, or the bad batch written, left its temporary file for good."""
    for name in (
        ".pretrain_16_metrics.jsonl.abc.tmp",
        ".pretrain_16_epoch0.def.tmp",
        ".full_sft_16_metrics.jsonl.abc.tmp",
    ):
        (tmp_path / name).write_text("half")
    make_run(tmp_path, max_steps=1).fit()
    hidden = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("."))
    assert hidden == [".full_sft_16_metrics.jsonl.abc.tmp", ".pretrain.lock"]  # the other is another run's


def test_the_report_says_how_far_the_weights_moved(tmp_path):
    """The original project's DPO had a learning rate of 1e-9: a whole run that changed nothing, and said nothing."""
    moving = make_run(tmp_path / "a", max_steps=3)
    before = weights_of(moving.learner.model)
    moving.fit()
    after = weights_of(moving.learner.model)
    moved = sum(float((after[name] - before[name]).double().pow(2).sum()) for name in before) ** 0.5
    size = sum(float(weight.double().pow(2).sum()) for weight in before.values()) ** 0.5
    assert moved / size > 0.01
    assert f"{moved / size:.1%} of their size at the start" in said(moving) and "hardly moved" not in said(moving)
    idle = make_run(tmp_path / "b", max_steps=3, learning_rate=1e-9)
    idle.fit()
    assert "0.0% of their size" in said(idle)
    assert "warning: the weights hardly moved; raise --learning_rate" in said(idle)


def moved(run: Run) -> str:
    (line,) = [line for line in said(run).splitlines() if "weights moved" in line]
    return line.split("moved")[1].strip()


def test_how_far_the_weights_moved_counts_from_the_true_start(tmp_path):
    """After a resume it counted from the resume: a long run stopped near its end seemed to have learned nothing.

    The state does not hold the first weights; it knows them again when the recipe makes them anew from the seed.
    """
    whole = make_run(tmp_path / "whole")
    whole.fit()
    interrupt_at(make_run(tmp_path / "parts"), 4)
    interrupt_at(make_run(tmp_path / "parts", resume=True), 7)
    resumed = make_run(tmp_path / "parts", resume=True)
    resumed.fit()
    assert resumed.progress.step == 6 and moved(resumed) == moved(whole)
    finished = make_run(tmp_path / "parts", resume=True)
    finished.fit()
    assert moved(finished) == moved(whole)

    interrupt_at(make_run(tmp_path / "others"), 7)
    interrupt_at(make_run(tmp_path / "others", resume=True, seed=1), 10)  # these are not the first weights ...
    others = make_run(tmp_path / "others", resume=True, seed=1)
    others.fit()
    assert moved(others).endswith("their size at the start, since step 9") and moved(others) != moved(
        whole
    )  # ... so it says so
    known = make_run(tmp_path / "others", resume=True)
    known.fit()
    assert moved(known) == moved(whole)


def test_brackets_in_a_path_are_shown(tmp_path):
    """They are the console's own markup, which would swallow them, or stop the run."""
    for resume in (True, False):
        run = make_run(tmp_path / "a[bold]b[" / "i]", max_steps=1, resume=resume, overwrite=not resume)
        assert str(tmp_path / "a[bold]b[" / "i]" / "pretrain_16_epoch0") == str(run.fit())
        assert said(run).count(str(run.checkpoints.last_folder)) == 2
        assert ("nothing to resume in " + str(tmp_path / "a[bold]b[" / "i]") in said(run)) == resume


def test_validation_is_the_mean_over_the_targets(tmp_path):
    """Batches of 2 and of 1 row: the mean over all targets, without dropout, and nothing of the model changed."""
    run = make_run(tmp_path)
    rows = run.validation_data
    before = weights_of(run.learner.model)
    run.learner.model.train()  # as it is between two steps
    found = run.validate(rows)["validation_loss"]
    assert run.learner.model.training
    loss, _ = next_token_loss(run.learner.model.eval(), rows.collate(rows.rows))
    assert found == pytest.approx(loss.item() / rows.num_targets, rel=1e-5)
    assert_same_bits(before, weights_of(run.learner.model))


def test_metrics_and_samples_are_recorded(tmp_path):
    run = make_run(tmp_path, max_steps=4)
    run.fit()
    lines = records(tmp_path)
    training = [record for record in lines if "loss" in record]
    assert all(set(record) == {"step", "loss", "learning_rate", "grad_norm"} for record in training)
    validations = [record for record in lines if "validation_loss" in record]
    assert [record["step"] for record in validations] == [2, 4]
    assert validations[0]["sample_0"] == "drawn: True" and "drawn: True" in said(run)
    assert run.progress.best_validation_loss == min(record["validation_loss"] for record in validations)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile hides it from users
def test_a_compiled_run_saves_plain_names(tmp_path, monkeypatch):
    """Adapters saved from a compiled module had other names, and were then loaded with strict=False: useless.

    aot_eager traces as the real backend does and needs no C++ compiler.
    """
    compile_module, compile_function, used = torch.nn.Module.compile, torch.compile, []

    def compile_without_compiler(module, **options):
        used.append(type(module).__name__)
        compile_module(module, backend="aot_eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_compiler)
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_function(function, backend="aot_eager"))
    plain, compiled = (make_run(tmp_path / str(c), lora=2, max_steps=2, use_compile=c, dropout=0.0) for c in (0, 1))
    names = list(weights_of(compiled.learner.model))
    plain.fit()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "validation_data", None)
        compiled.fit()
    assert used == ["TinyLM"] and "warning" not in said(compiled)
    assert list(weights_of(compiled.learner.model)) == names == list(load_names(compiled.checkpoints.last_folder))
    for name, weight in weights_of(compiled.learner.model).items():
        torch.testing.assert_close(weight, weights_of(plain.learner.model)[name], atol=1e-4, rtol=1e-3)


def load_names(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    return [name for name in weights_of(make_run(folder / "unused", lora=2).learner.model) if name in stored]
