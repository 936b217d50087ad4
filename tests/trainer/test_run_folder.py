"""What a run may replace in its folder, and which of its models stay."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from run_parts import interrupt_at, make_run, said
from trainer_parts import read_bytes

from tinylm.trainer.run.run_folder import RunFolder
from tinylm.trainer.run.train_settings import TrainSettings


def models_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("pretrain_16_epoch*"))


def run_with_losses(folder: Path, *losses: float, **changes):
    """A run of an epoch for each validation loss, without other validations."""
    run = make_run(folder, max_steps=0, epochs=len(losses), eval_interval=0, save_interval=0, **changes)
    left = iter(losses[run.progress.step // 4 :])
    run.validate = lambda *_: {"validation_loss": next(left)}
    return run


def test_a_finished_run_is_replaced_only_on_request(tmp_path, monkeypatch):
    """A second run replaced the model after a note. The refusal comes before the speed is measured."""
    make_run(tmp_path, max_steps=9).fit()
    before = read_bytes(tmp_path / "pretrain_16_epoch2")
    monkeypatch.setattr("tinylm.trainer.run.run.measured_matmul_flops", lambda runtime: pytest.fail("measured"))
    again = make_run(tmp_path, max_steps=9, seed=5)
    with pytest.raises(ValueError) as error:
        again.fit()
    assert str(error.value) == (
        f"{tmp_path} holds a finished pretrain run of 9 steps; pass --overwrite to replace it, or choose another "
        "--output_dir"
    )
    assert said(again) == "" and read_bytes(tmp_path / "pretrain_16_epoch2") == before


def test_a_replaced_run_leaves_nothing_behind(tmp_path):
    """The model of its last epoch would be taken for that of the new run, which is shorter."""
    make_run(tmp_path, max_steps=9, keep_epochs="all").fit()
    new = make_run(tmp_path, max_steps=3, seed=5, overwrite=True)
    new.fit()
    assert models_of(tmp_path) == ["pretrain_16_epoch0"]
    names = "pretrain_16_epoch0, pretrain_16_epoch1, pretrain_16_epoch2, pretrain_16_state"
    assert f"removed the earlier run ({names})" in said(new)
    assert [path.name for path in (tmp_path / "pretrain_16_state").glob("step_*")] == ["step_00000003"]


def test_an_unfinished_run_asks_whether_to_continue(tmp_path, monkeypatch):
    """Only the small file of the state is read for it, and no weights."""
    interrupt_at(stopped := make_run(tmp_path, max_steps=9), 7)
    (stopped.checkpoints.state_folder / "step_00000006" / "state.safetensors").write_bytes(b"damaged")
    monkeypatch.setattr("tinylm.checkpoint.training_state.read_tensors", lambda path: pytest.fail("read the tensors"))
    with pytest.raises(ValueError) as error:
        make_run(tmp_path, max_steps=9).fit()
    assert str(error.value) == (
        f"{tmp_path} holds an unfinished pretrain run, stopped at step 6 of 9; pass --resume to continue it, "
        "--overwrite to start again, or choose another --output_dir"
    )


def test_models_without_a_state_are_not_replaced_either(tmp_path):
    """Somebody deletes the training state, which is three times as large as the model."""
    make_run(tmp_path, max_steps=4).fit()
    shutil.rmtree(tmp_path / "pretrain_16_state")
    with pytest.raises(ValueError, match=r"holds a finished pretrain run \(pretrain_16_epoch0\); pass --overwrite"):
        make_run(tmp_path, max_steps=4).fit()
    with pytest.raises(ValueError, match="without a training state; pass --overwrite instead of --resume"):
        make_run(tmp_path, max_steps=4, resume=True).fit()
    lineage = json.loads((tmp_path / "pretrain_16_epoch0" / "lineage.json").read_text())
    (tmp_path / "pretrain_16_epoch0" / "lineage.json").write_text(json.dumps({**lineage, "finished": False}))
    with pytest.raises(ValueError, match="holds an unfinished pretrain run without a saved state; pass --overwrite"):
        make_run(tmp_path, max_steps=4).fit()
    make_run(tmp_path, max_steps=4, resume=True).fit()  # a run that was killed before its first state begins again


def test_other_runs_in_the_folder_are_left_alone(tmp_path):
    """A run of another width, another stage, or one that stopped before it had saved anything."""
    make_run(tmp_path, max_steps=1, shape={"hidden_size": 32}).fit()
    (tmp_path / "pretrain_16_metrics.jsonl").write_text("")
    (tmp_path / "pretrain_16_epoch7").mkdir()  # not a model
    make_run(tmp_path, max_steps=1).fit()
    assert (tmp_path / "pretrain_32_epoch0").is_dir() and (tmp_path / "pretrain_32_state").is_dir()


def test_all_processes_learn_of_the_refusal(tmp_path, monkeypatch):
    """Another process may not see the folder of the main process."""
    make_run(tmp_path, max_steps=1).fit()
    other = make_run(tmp_path / "another disk", max_steps=1, ranks=(1, 2))
    monkeypatch.setattr(type(other.stage.runtime), "any_rank", lambda self, flag: not self.is_restart)
    monkeypatch.setattr(RunFolder, "should_resume", lambda self: False)
    with pytest.raises(ValueError, match="of the main process holds an earlier run"):
        other.checkpoints.require_free()


def test_resume_and_overwrite_exclude_each_other():
    with pytest.raises(ValueError, match="both --resume and --overwrite are given; pass only one of them"):
        TrainSettings(resume=True, overwrite=True)


@pytest.mark.parametrize(
    ("keep", "losses", "kept"),
    [
        ("best", [3.0, 1.0, 2.0, 4.0], [1, 3]),
        ("best", [3.0, 2.0, 1.0, 0.5], [3]),
        ("best", [3.0, float("nan"), 3.0, 4.0], [2, 3]),  # of equal ones the later
        ("best", [float("nan")] * 3, [2]),
        ("last", [3.0, 1.0, 2.0, 4.0], [3]),
        ("all", [3.0, 1.0, 2.0, 4.0], [0, 1, 2, 3]),
    ],
)
def test_the_last_and_the_best_epoch_stay(tmp_path, keep, losses, kept):
    run = run_with_losses(tmp_path, *losses, keep_epochs=keep)
    if keep == "last":
        run.validate = lambda *_: {"validation_loss": losses[-1]}
    run.fit()
    assert models_of(tmp_path) == [f"pretrain_16_epoch{epoch}" for epoch in kept]
    assert not list(tmp_path.glob(".*.tmp"))
    removed = len(losses) - len(kept)
    assert (f"{removed} removed; --keep_epochs all keeps them" in said(run)) == (removed > 0)
    if kept == [1, 3]:
        assert "lowest validation loss, 1.0000: " + str(tmp_path / "pretrain_16_epoch1") in said(run)


def test_without_validation_the_last_epoch_stays(tmp_path):
    run = make_run(tmp_path, max_steps=0, epochs=3)
    run.validation_data = None
    run.fit()
    assert models_of(tmp_path) == ["pretrain_16_epoch2"]


def test_a_resumed_run_keeps_the_same_models(tmp_path):
    """Models of later epochs, from before the stop, are made again."""
    losses = [3.0, 1.0, 2.0, 4.0]
    run_with_losses(tmp_path / "whole", *losses).fit()
    stopped = run_with_losses(tmp_path / "parts", *losses)
    interrupt_at(stopped, 12)  # after the state of step 8
    for epoch in (5, 6):
        shutil.copytree(tmp_path / "parts" / "pretrain_16_epoch1", tmp_path / "parts" / f"pretrain_16_epoch{epoch}")
    resumed = run_with_losses(tmp_path / "parts", *losses, resume=True)
    left = iter(losses[2:])
    resumed.validate = lambda *_: {"validation_loss": next(left)}
    resumed.fit()
    assert resumed.progress.step == 8
    assert (
        models_of(tmp_path / "parts") == models_of(tmp_path / "whole") == ["pretrain_16_epoch1", "pretrain_16_epoch3"]
    )


def test_an_epochs_model_names_its_own_loss(tmp_path):
    run = make_run(tmp_path, max_steps=0, epochs=3, eval_interval=4, keep_epochs="all")
    left = iter([3.0, 1.0, 2.0])
    run.validate = lambda *_: {"validation_loss": next(left)}
    run.fit()
    lineages = [json.loads((tmp_path / name / "lineage.json").read_text()) for name in models_of(tmp_path)]
    assert [lineage["validation_loss"] for lineage in lineages] == [3.0, 1.0, 2.0]
    assert [lineage["best_validation_loss"] for lineage in lineages] == [3.0, 1.0, 1.0]
