"""The same run on 1, 2 or 4 processes, whole or sharded, unbroken or not, is the same run.

What "the same" means: every step has the same rows, each row of an epoch exactly once; a run that continues with as
many processes as before is the same to the bit; and on another number of processes losses and weights agree to
rounding, since float32 sums come in another order. The tolerances are about ten times what was measured in 27 steps.
Muon's is the wider one: orthogonalising a gradient lifts its small directions to the size of the large ones, their
rounding too.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launch import ROWS_PER_STEP, TORCHRUN, Outcome, command_of, run, started, wait_until

from tests.processes import PATIENCE
from tinylm.checkpoint.model_folder import load_model

LOSS = {"adamw": 2e-6, "muon": 5e-5}
"""Largest relative difference of a loss; measured: 2e-7 and 4e-6."""
WEIGHT = {"adamw": 2e-5, "muon": 1e-3}
"""Largest difference of a weight, whose standard deviation is 0.02 at first; measured: 2e-6 and 1e-4."""


def assert_same_run(one: Outcome, other: Outcome, optimizer: str) -> None:
    """Same rows in every step, and losses, validation loss and weights to rounding."""
    assert {step: sorted(rows) for step, rows in one.rows().items()} == {
        step: sorted(rows) for step, rows in other.rows().items()
    }
    for name in ("loss", "validation_loss"):
        mine, theirs = one.metrics(name), other.metrics(name)
        assert mine and theirs == pytest.approx(mine, rel=LOSS[optimizer], abs=0), name
    mine, theirs = one.weights(), other.weights()
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=WEIGHT[optimizer], msg=name)


def assert_each_row_once(outcome: Outcome, epochs: int = 1) -> None:
    """Each epoch's steps together have every row of the data exactly once, the last one of an epoch fewer rows."""
    rows = list(outcome.rows().values())
    steps = len(rows) // epochs
    num_rows = sum(map(len, rows)) // epochs
    assert num_rows % ROWS_PER_STEP, "the data should not fill its last step"
    for epoch in range(epochs):
        seen = [row for step in rows[epoch * steps : (epoch + 1) * steps] for row in step]
        assert sorted(seen) == list(range(num_rows)), f"epoch {epoch}"


def go_on(
    where: Path, argv: list[object], first: int, second: int, then: tuple[str, ...] = (), at: tuple[str, ...] = ()
) -> Outcome:
    """A run killed with signal 9 when its first state is saved, which then continues in `second` processes.

    Args:
        at, then: more flags of the first command, and of the second.
    """
    # The flags stay the same: the run itself divides the rows of a step among the processes.
    argv = [*argv, "--save_interval", 5, "--batch_size", ROWS_PER_STEP // first]

    def launcher(processes: int) -> list[str]:
        return [*TORCHRUN, "--standalone", f"--nproc_per_node={processes}"]

    latest = where / "out" / "pretrain_32_state" / "latest"
    command = command_of("pretrain", where, [*argv, *at], launcher(first))
    with started(command, where / "log", SECONDS_PER_STEP="0.1"):
        wait_until(latest.exists, PATIENCE, f"a saved state; {where / 'log'}")
    with started(
        command_of("pretrain", where, [*argv, *then, "--resume"], launcher(second)), where / "log2"
    ) as process:
        status = process.wait(timeout=PATIENCE)
    said = (where / "log2").read_text()
    assert status == 0, said
    outcome = Outcome(where / "out", where / "records", said)
    assert "resuming" in said and any(record["world_size"] == first for record in outcome.steps())
    return outcome


# --- one run, cut up otherwise ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "accumulation_steps", "flags"),
    [
        pytest.param(2, 2, [], id="2 processes, 2 micro-batches each"),
        pytest.param(2, 1, ["--sharding", "fsdp"], id="2 processes, sharded"),
        pytest.param(4, 1, [], id="4 processes", marks=pytest.mark.long),
        pytest.param(4, 2, ["--sharding", "fsdp"], id="4 processes, sharded", marks=pytest.mark.long),
    ],
)
def test_any_number_of_processes_trains_the_same_model(
    alone, pretrain_words, tmp_path, processes, accumulation_steps, flags
):
    words = [*pretrain_words, "--optimizer", "adamw", *flags]
    outcome = run("pretrain", tmp_path, words, processes, accumulation_steps)
    assert {record["world_size"] for record in outcome.steps()} == {processes}
    assert_each_row_once(outcome)
    assert_same_run(alone["adamw"], outcome, "adamw")


@pytest.mark.long
@pytest.mark.parametrize(("processes", "flags"), [(2, []), (4, []), (2, ["--sharding", "fsdp"])])
def test_muon_too(alone, pretrain_words, tmp_path, processes, flags):
    """Muon needs each gradient matrix as a whole, which a sharded model has to gather first."""
    outcome = run("pretrain", tmp_path, [*pretrain_words, "--optimizer", "muon", *flags], processes)
    assert_same_run(alone["muon"], outcome, "muon")


# --- interrupted, and continued with another number of processes -----------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    ("first", "second", "at", "then"),
    [
        pytest.param(2, 1, (), (), id="2 to 1"),
        pytest.param(1, 2, (), (), id="1 to 2"),
        pytest.param(2, 4, (), (), id="2 to 4"),
        pytest.param(2, 2, (), ("--sharding", "fsdp"), id="whole to sharded"),
        pytest.param(2, 2, ("--sharding", "fsdp"), ("--sharding", "none"), id="sharded to whole"),
        pytest.param(4, 2, ("--sharding", "fsdp"), ("--sharding", "fsdp"), id="sharded, 4 to 2"),
    ],
)
def test_a_run_goes_on_with_other_processes(alone, pretrain_words, tmp_path, first, second, at, then):
    words = [*pretrain_words, "--optimizer", "adamw"]
    outcome = go_on(tmp_path, words, first, second, then, at)
    assert_each_row_once(outcome)
    assert_same_run(alone["adamw"], outcome, "adamw")


@pytest.mark.long
def test_the_number_of_processes_changes_in_the_second_epoch(pretrain_words, tmp_path):
    """The order of the second epoch is its own, and a state from the middle of it continues that order."""
    words = [*pretrain_words, "--optimizer", "adamw", "--epochs", "2", "--max_seq_len", "256"]
    unbroken = run("pretrain", tmp_path / "unbroken", words)
    outcome = go_on(tmp_path / "broken", words, 1, 2)
    steps = unbroken.rows()
    assert steps[1] != steps[1 + len(steps) // 2]
    assert_each_row_once(outcome, epochs=2)
    assert_same_run(unbroken, outcome, "adamw")


# --- interrupted, and continued with as many -------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    ("processes", "optimizer", "flags"),
    [
        pytest.param(2, "muon", (), id="2 processes"),
        pytest.param(2, "adamw", ("--sharding", "fsdp"), id="2 processes, sharded"),
        pytest.param(4, "adamw", ("--dropout", "0.1"), id="4 processes, with dropout"),
        pytest.param(4, "adamw", ("--sharding", "fsdp"), id="4 processes, sharded"),
    ],
)
def test_kill_9_and_resume_is_the_unbroken_run_to_the_bit(pretrain_words, tmp_path, processes, optimizer, flags):
    """DistributedDataParallel orders its buckets by the first backward pass, and four processes are summed in that
    order: the first step after a resume rounded otherwise, by up to 3e-5 in the final weights.
    """
    words = [*pretrain_words, "--optimizer", optimizer, *flags]
    unbroken = run("pretrain", tmp_path / "unbroken", words, processes)
    outcome = go_on(tmp_path / "broken", words, processes, processes)
    mine, theirs = unbroken.weights(), outcome.weights()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    assert outcome.rows() == unbroken.rows()
    assert outcome.metrics("loss") == unbroken.metrics("loss")


# --- the other stages ------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_every_stage_runs_sharded_and_leaves_folders_that_load(data, alone, tmp_path):
    """SFT, LoRA and DPO on two processes that share the weights give what one process gives."""
    base = alone["adamw"].folder
    words = [*map(str, ("--optimizer", "adamw", "--learning_rate", "1e-3", "--max_steps", "3", "--eval_batches", "0"))]
    words += ["--device", "cpu", "--dtype", "float32", "--max_seq_len", "64", "--log_interval", "1"]
    words += ["--warmup_fraction", "0"]
    chats = ["--data_path", data / "chats.jsonl", "--model_path", base, *words]
    pairs = ["--data_path", data / "pairs.jsonl", "--model_path", base, *words]
    lora = [*chats, "--lora_rank", "2"]
    tables = [*lora, "--target_modules", "q_proj,embed_tokens,lm_head"]
    for number, (stage, argv) in enumerate((("full_sft", chats), ("lora", lora), ("lora", tables), ("dpo", pairs))):
        one = run(stage, tmp_path / f"one{number}", argv)
        two = run(stage, tmp_path / f"two{number}", [*argv, "--sharding", "fsdp"], processes=2)
        assert_same_run(one, two, "adamw")
        logits = []
        for outcome in (one, two):
            model, tokenizer, _ = load_model(outcome.folder)
            with torch.no_grad():
                logits.append(model(torch.tensor([tokenizer.encode("Tom had a red kite.")])))
        torch.testing.assert_close(*logits, rtol=0, atol=1e-3)
