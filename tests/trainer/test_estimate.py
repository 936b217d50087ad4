"""Memory and time of a run: what is announced, what is refused, and the time left."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from run_parts import make_run, said
from trainer_parts import Rows

from tinylm.model.config import TinyLMConfig
from tinylm.trainer.run import estimate, run
from tinylm.trainer.run.estimate import Memory, Pace, compiling_saves_time, expected_memory, require_memory


def test_expected_memory_is_what_is_used_and_states_and_activations(tmp_path, monkeypatch):
    """Trained weights have a gradient and two moments; on a CPU a copy of three is saved. A process holds a share."""
    monkeypatch.setattr(estimate, "used_memory", lambda device: 5e8)
    monkeypatch.setattr(estimate, "memory_limit", lambda device: 8e9)
    monkeypatch.setattr(estimate, "_saved_bytes", lambda learner, plan: 1e6)
    for sharding, holders, state_bytes in (("none", 1, 24), ("fsdp", 3, 24)):
        made = make_run(tmp_path, ranks=(0, 3), lora=2, batch_size=4, sharding=sharding)
        found = expected_memory(made.learner, made.plan)
        trained = made.report.num_trained
        assert found == Memory(5e8 + 0.3e9 + trained * state_bytes / holders, 1.8e6, 4, 8e9)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert expected_memory(made.learner, made.plan).limit == 4e9


def test_activations_are_measured_on_one_row_and_weights_do_not_count(tmp_path):
    """By hand, for the last matrix: 24 positions, of which each with a target has 32 logits of 4 bytes."""
    small = make_run(tmp_path, dropout=0.0)
    wide = make_run(tmp_path, dropout=0.0, data=Rows(13, width=48))
    half = make_run(tmp_path, dropout=0.0, dtype=torch.bfloat16)
    saved = [estimate._saved_bytes(each.learner, each.plan) for each in (small, wide, half)]
    assert 1.5 * saved[0] < saved[1] < 2.5 * saved[0] and 0.4 * saved[0] < saved[2] < saved[0]
    model = small.learner.model
    assert 24 * 16 * 4 * 8 < saved[0] < 24 * 16 * 4 * 60 and not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_estimate_is_near_what_a_step_takes(tmp_path):
    """0.4 GB were announced for the tiny preset and 1.2 taken. Here the activations of a step are 0.5 GB."""
    shape = {"hidden_size": 128, "num_hidden_layers": 4, "max_position_embeddings": 512, "vocab_size": 32}
    made = make_run(tmp_path, shape=shape, data=Rows(64, width=512), batch_size=32, max_steps=1, dropout=0.0)
    per_row = expected_memory(made.learner, made.plan).per_row / estimate.SAVED_FACTOR["cpu"]
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    batch = made.plan.source.dataset.collate([made.plan.source.dataset.row(i) for i in range(32)])
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        made.learner.objective(made.learner.model, batch)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert 32 * per_row == pytest.approx(total, rel=0.1)


@pytest.mark.parametrize(
    ("memory", "settings", "message"),
    [
        (
            Memory(1e9, 7e7, 1_000_000, 24e9),
            {"batch_size": 1_000_000, "accumulation_steps": 2},
            "the run needs about 70,001.0 GB of memory; the machine has 24.0 GB; pass --batch_size 256 "
            "--accumulation_steps 7813 for the same rows per step",
        ),
        (  # all data is less than a batch
            Memory(1e9, 1e9, 100, 24e9),
            {"batch_size": 1_000_000},
            "the run needs about 101.0 GB of memory; the machine has 24.0 GB; pass --batch_size 16 "
            "--accumulation_steps 13 for the same rows per step",
        ),
        (
            Memory(25e9, 1e9, 2, 24e9),
            {"max_seq_len": 48},
            "the run needs about 27.0 GB of memory; the machine has 24.0 GB, not enough for a --batch_size of 1; "
            "choose a smaller model, or a --max_seq_len below 48",
        ),
    ],
)
def test_a_plan_beyond_the_memory_is_refused_with_what_would_fit(tmp_path, memory, settings, message):
    """It announced 70,779 GB, began, and was killed by the system."""
    made = make_run(tmp_path, **settings)
    with pytest.raises(ValueError) as error:
        require_memory(memory, made.plan)
    assert str(error.value) == message
    fits = dataclasses.replace(memory, limit=memory.needed / 0.94)
    require_memory(fits, made.plan)
    require_memory(dataclasses.replace(memory, limit=None), made.plan)


def test_the_refusal_comes_before_the_plan_and_changes_nothing(tmp_path, monkeypatch):
    (tmp_path / "pretrain_16_epoch0").mkdir()
    (tmp_path / "pretrain_16_epoch0" / "lineage.json").write_text("{}")
    monkeypatch.setattr(run, "expected_memory", lambda learner, plan: Memory(9e9, 1e9, 4, 8e9))
    made = make_run(tmp_path, overwrite=True)
    with pytest.raises(ValueError, match="the run needs about 13.0 GB of memory"):
        made.fit()
    assert said(made) == "" and (tmp_path / "pretrain_16_epoch0").is_dir()


def test_all_processes_refuse_together(tmp_path, monkeypatch):
    made = make_run(tmp_path, ranks=(1, 2))
    monkeypatch.setattr(type(made.stage.runtime), "any_rank", lambda self, flag: True)
    with pytest.raises(ValueError, match="the run needs about 3.0 GB"):
        require_memory(Memory(1e9, 1e9, 2, 24e9), made.plan)


@pytest.mark.parametrize(
    ("device", "width", "minutes", "saves"),
    [
        ("cpu", 256, 14, True),
        ("cpu", 256, 13, False),
        ("cpu", 512, 600, False),
        ("cuda", 768, 11, True),
        ("cuda", 768, 9, False),
        ("mps", 256, 600, False),
    ],
)
def test_compiling_pays_in_long_runs_of_narrow_models_and_on_gpus(device, width, minutes, saves):
    """Two minutes saved: 15% of a run of `tiny` on a CPU, 20% on a GPU; `small` gains nothing on a CPU."""
    config = TinyLMConfig(hidden_size=width, num_attention_heads=8)
    assert compiling_saves_time(config, torch.device(device), minutes * 60.0) is saves


def test_the_first_steps_do_not_count_for_the_time_left():
    """With compilation the first step takes a minute, and its share in the mean was hours of time left."""
    pace = Pace(SimpleNamespace(num_steps=1000, num_validations=lambda step: 3 if step < 500 else 0))
    pace.add_step(60.0)
    assert pace.seconds_left(1) == 999 * 60
    pace.add_step(8.0)
    assert pace.seconds_left(2) == 998 * 8
    for step in range(3, 103):
        pace.add_step(1.0 if step < 53 else 2.0)
    assert pace.seconds_left(102) == 898 * 2  # the latest 50
    pace.add_validation(10.0)
    pace.add_validation(20.0)
    assert pace.seconds_left(102) == 898 * 2 + 3 * 15
    assert pace.seconds_left(600) == 400 * 2
