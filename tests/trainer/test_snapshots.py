"""Snapshots of a run: when they are kept, what they hold, and that an interrupted run leaves the same ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.command_line import SHAPE, tinylm
from tests.stage_files import write_stage_files
from tinylm.checkpoint import snapshots as module
from tinylm.checkpoint.loading import load_for_use
from tinylm.checkpoint.model_folder import load_model
from tinylm.checkpoint.snapshots import load_snapshot, snapshot_folder, snapshot_steps, snapshots_in

PRETRAIN = [
    "pretrain", *SHAPE, "--data_path", "texts.jsonl", "--device", "cpu", "--dtype", "float32", "--max_seq_len", 128,
    "--max_steps", 9, "--eval_batches", 1, "--learning_rate", 0.01,
]  # fmt: skip


@pytest.mark.parametrize(
    ("num_steps", "count", "steps"),
    [
        (1000, 0, []),
        (1000, 1, [1000]),
        (1000, 2, [0, 1000]),
        (1000, 5, [0, 16, 125, 422, 1000]),
        (9, 4, [0, 3, 9]),
        (3, 8, [0, 1, 2, 3]),
    ],
)
def test_steps(num_steps, count, steps):
    assert snapshot_steps(num_steps, count) == steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("größe")
    write_stage_files(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in (
            [*PRETRAIN, "--output_dir", "out", "--snapshots", 5],
            [*PRETRAIN, "--output_dir", "plain"],
            ["lora", "--model_path", "out", "--data_path", "chats.jsonl", "--output_dir", "lora", "--device", "cpu",
             "--dtype", "float32", "--max_seq_len", 128, "--max_steps", 4, "--snapshots", 3, "--learning_rate", 0.05],
        ):  # fmt: skip
            status, said = tinylm(*words)
            assert status == 0, said
    return folder


def model_in(folder: Path) -> Path:
    (found,) = folder.glob("*_epoch*")
    return found


def test_a_run_keeps_them(folder):
    model = model_in(folder / "out")
    kept = snapshots_in(snapshot_folder(model))
    assert list(kept) == snapshot_steps(9, 5) == [0, 1, 4, 9]
    assert {path.parent.name for path in kept.values()} == {"pretrain_32_snapshots"}
    size = (model / "model.safetensors").stat().st_size
    assert all(0.4 * size < path.stat().st_size < 0.6 * size for path in kept.values()), "bfloat16"
    assert not snapshots_in(snapshot_folder(model_in(folder / "plain")))


def test_they_change_nothing(folder):
    one, other = (model_in(folder / name) / "model.safetensors" for name in ("out", "plain"))
    assert one.read_bytes() == other.read_bytes()


def test_they_show_how_the_model_learnt(folder):
    """The first one is the model that a run begins with, the last one the finished one, rounded."""
    model_path = model_in(folder / "out")
    finished = load_model(model_path)[0]
    ids = torch.arange(40)[None] * 7 % 900
    with torch.no_grad():
        expected = finished(ids)
    errors = []
    for path in snapshots_in(snapshot_folder(model_path)).values():
        model = load_model(model_path)[0]
        load_snapshot(model, path)
        with torch.no_grad():
            errors.append((model(ids) - expected).abs().mean().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02 < errors[0] / 3


def test_an_adapters_hold_the_adapter(folder):
    adapter = model_in(folder / "lora")
    kept = snapshots_in(snapshot_folder(adapter))
    assert list(kept) == snapshot_steps(4, 3) == [0, 4]
    ids = torch.arange(40)[None] * 7 % 900
    for step, path in kept.items():
        loaded = load_for_use(model_in(folder / "out"), adapter, merge=False)
        load_snapshot(loaded.model, path)
        expected = load_for_use(model_in(folder / "out"), adapter if step else None).model
        with torch.no_grad():
            torch.testing.assert_close(loaded.model(ids), expected(ids), rtol=0, atol=0.02)
    with pytest.raises(ValueError, match="lacks .* tensors"):
        load_snapshot(load_model(model_in(folder / "out"))[0], path)


def test_a_resumed_run_leaves_the_same(folder, tmp_path, monkeypatch):
    """Stopped after step 2 and resumed: the files are those of a run in one go."""
    monkeypatch.chdir(folder)
    from tinylm.trainer.run.run import Run

    after_step = Run._after_step

    def stopping(run, report):
        after_step(run, report)
        if report.step == 2:
            run._stop(report)

    command = [*PRETRAIN, "--output_dir", tmp_path / "out", "--snapshots", 5]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_after_step", stopping)
        assert tinylm(*command)[0] != 0
    assert list(snapshots_in(tmp_path / "out" / "pretrain_32_snapshots")) == [0, 1]
    assert tinylm(*command, "--resume")[0] == 0
    for path in snapshots_in(snapshot_folder(model_in(folder / "out"))).values():
        assert path.read_bytes() == (tmp_path / "out" / "pretrain_32_snapshots" / path.name).read_bytes()


def test_overwrite_removes_those_of_the_earlier_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    command = [*PRETRAIN, "--output_dir", tmp_path / "out"]
    assert tinylm(*command, "--snapshots", 5)[0] == 0
    status, said = tinylm(*command, "--overwrite")
    assert status == 0 and "pretrain_32_snapshots" in said
    assert not (tmp_path / "out" / "pretrain_32_snapshots").exists()


def test_a_disk_that_is_full_ends_no_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save", full)
    status, said = tinylm(*PRETRAIN, "--output_dir", tmp_path / "out", "--snapshots", 3)
    assert status == 0 and said.count("warning: no snapshot of step") == 3 and "No space left" in said
    assert not snapshots_in(tmp_path / "out" / "pretrain_32_snapshots")
