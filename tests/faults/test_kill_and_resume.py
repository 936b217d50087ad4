"""Runs by command that are killed, signalled and resumed: 2N steps = N + kill -9 + N, bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal

import pytest
from commands import differences, files, last_step, metrics_of, state_folder, wait_for_step

from tinylm.checkpoint.training_state import load_training_state, read_training_values

STAGES = ["pretrain", "sft", "lora", "dpo"]
STOPS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)]


@pytest.fixture(scope="module")
def undisturbed(commands, stages):
    """Stage -> the folder of a run that nobody disturbed."""

    def run(stage, *words, **options):
        folder = stages.root / "_".join(["undisturbed", stage, *words])
        if not folder.exists():
            commands.run(*stages.words(stage), *words, "--output_dir", folder, **options)
        return folder

    return run


def killed_in(commands, words, folder, step, number=signal.SIGKILL, within=0.02):
    """(exit status, process) of a run that a signal reaches within so many seconds from the start of a step."""
    strike = (number, step, random.random() * within)
    process = commands.start(*words, "--output_dir", folder, strike=strike)
    return process.wait(), process


def killed_cold(commands, words, folder, step):
    """As above, of a run in a Python of its own, which is killed when the step is seen."""
    process = commands.start(*words, "--output_dir", folder, cold=True)
    wait_for_step(process, folder, step)
    assert process.poll() is None, f"it had ended before it could be killed: {process.said}"
    process.send(signal.SIGKILL)
    return process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_resumed_is_the_undisturbed_run(commands, stages, undisturbed, tmp_path, tally, stage):
    """Dropout is on (in sft and dpo there is none), steps are accumulated, and the kill comes in mid-epoch."""
    whole = undisturbed(stage)
    status, _ = killed_in(commands, stages.words(stage), tmp_path, 14)
    assert status == -signal.SIGKILL and 4 <= read_training_values(state_folder(tmp_path))["step"] < 60
    said = commands.run(*stages.words(stage), "--resume", "--output_dir", tmp_path)
    assert "from step" in said
    lost = differences(tmp_path, whole)
    tally(f"kill -9 and resume ({stage}), bit for bit", 1, bool(lost))
    assert not lost
    steps = [record["step"] for record in metrics_of(tmp_path) if "loss" in record]
    assert steps == list(range(1, 61))
    epochs = read_training_values(state_folder(whole))["settings"]["epochs"]
    assert not list(whole.glob("*_epoch0")) and epochs > 1  # kills and ends lie inside epochs


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_resumed_from_nothing(commands, stages, undisturbed, tmp_path, tally, stage):
    """As above, and each command is a Python of its own, as a user starts it; three kills."""
    whole = undisturbed(stage)
    for step in (3, 15, 30):
        words = [*stages.words(stage), "--resume"]
        assert killed_cold(commands, words, tmp_path, step) == -signal.SIGKILL
    commands.run(*stages.words(stage), "--resume", "--output_dir", tmp_path, cold=True)
    lost = differences(tmp_path, whole)
    tally(f"kill -9 and resume ({stage}), bit for bit", 3, bool(lost))
    assert not lost


@pytest.mark.long
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler for torch.compile")
@pytest.mark.parametrize("stage", ["pretrain", "lora"])
def test_killed_and_resumed_compiled(commands, stages, undisturbed, tmp_path, tally, stage):
    compiled = ["--use_compile", "true"]
    whole = undisturbed(stage, *compiled, cold=True)
    assert killed_cold(commands, [*stages.words(stage), *compiled], tmp_path, 13) == -signal.SIGKILL
    said = commands.run(*stages.words(stage), *compiled, "--resume", "--output_dir", tmp_path, cold=True)
    assert "compiled in the first step" in said and "torch.compile failed" not in said  # eager runs prove nothing here
    lost = differences(tmp_path, whole)
    tally(f"kill -9 and resume ({stage}, compiled), bit for bit", 1, bool(lost))
    assert not lost


@pytest.mark.slow
def test_the_same_settings_give_the_same_bits_twice(commands, stages, undisturbed, tmp_path, tally):
    whole = undisturbed("pretrain")
    commands.run(*stages.words("pretrain"), "--output_dir", tmp_path, cold=True)
    lost = differences(tmp_path, whole)
    tally("the same run twice, bit for bit", 1, bool(lost))
    assert not lost
    commands.run(*stages.words("pretrain"), "--seed", "7", "--overwrite", "--output_dir", tmp_path)
    assert differences(tmp_path, whole)  # what makes the line above sharp


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), STOPS)
def test_a_signal_saves_the_step_and_ends_with_its_status(
    commands, stages, undisturbed, tmp_path, tally, number, status
):
    found, process = killed_in(commands, stages.words("pretrain"), tmp_path, 11, number, within=0)
    assert found == status
    step = read_training_values(state_folder(tmp_path))["step"]
    assert step == last_step(tmp_path) == 11, "the step that the signal came in is the last"
    assert f"stopped after step {step}, which is saved; run the same command with --resume" in process.said
    assert "Traceback" not in process.said
    commands.run(*stages.words("pretrain"), "--resume", "--output_dir", tmp_path)
    lost = differences(tmp_path, undisturbed("pretrain"))
    tally(f"{signal.Signals(number).name}: saved, ended with status {status} in time, resumed", 1, bool(lost))
    assert not lost


@pytest.mark.slow
def test_a_second_signal_ends_at_once(commands, stages, undisturbed, tmp_path, tally):
    """Both arrive before the step is done: the process is held while they are sent."""
    process = commands.start(*stages.words("pretrain"), "--output_dir", tmp_path, strike=(signal.SIGSTOP, 11, 0))
    process.wait_until_stopped()
    saved = files(state_folder(tmp_path))["latest"]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
        process.send(number)
    assert process.wait() == 143 and "which is saved" not in process.said
    assert saved <= files(state_folder(tmp_path))["latest"]
    commands.run(*stages.words("pretrain"), "--resume", "--output_dir", tmp_path)
    lost = differences(tmp_path, undisturbed("pretrain"))
    tally("a second signal: ended at once, resumed", 1, bool(lost))
    assert not lost


@pytest.mark.slow
def test_killed_in_the_evaluation_that_a_stop_had_put_off(commands, stages, undisturbed, tmp_path, tally):
    """A stopped run evaluates when it continues. Killed after that, it evaluated once more, and the step's validation
    stood in the metrics file twice."""
    status, _ = killed_in(commands, stages.words("pretrain"), tmp_path, 18, signal.SIGTERM, within=0)
    assert status == 143 and read_training_values(state_folder(tmp_path))["step"] == 18
    line = json.dumps({"step": 18, "validation_loss": 1.0, "validation_accuracy": 0.5, "sample_0": "of the killed"})
    path = next(tmp_path.glob("pretrain_*_metrics.jsonl"))
    path.write_text(path.read_text() + line + "\n")
    commands.run(*stages.words("pretrain"), "--resume", "--output_dir", tmp_path)
    lost = differences(tmp_path, undisturbed("pretrain"))
    tally("killed in an evaluation that a stop had put off", 1, bool(lost))
    assert not lost


@pytest.mark.slow
def test_a_line_that_a_full_disk_has_cut_is_dropped(commands, stages, undisturbed, tmp_path):
    """A cut line that happened to end with a brace (texts are recorded too) made every resume fail."""
    assert killed_in(commands, stages.words("pretrain"), tmp_path, 11)[0] == -signal.SIGKILL
    path = next(tmp_path.glob("pretrain_*_metrics.jsonl"))
    path.write_text(path.read_text() + '{"step": 3, "sample_0": "a {brace}')
    commands.run(*stages.words("pretrain"), "--resume", "--output_dir", tmp_path)
    assert not differences(tmp_path, undisturbed("pretrain"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "cycles"),
    [("pretrain", 3), *(pytest.param(stage, 50, marks=pytest.mark.long) for stage in STAGES)],
)
def test_the_soak(commands, stages, tmp_path, tally, stage, cycles):
    """Random signals at random moments, from the first line of the program to the last step."""
    seed = int(os.environ.get("FAULTS_SEED", random.SystemRandom().randrange(10**6)))
    print(f"FAULTS_SEED={seed}")
    chance = random.Random(seed)
    per_cycle = 24
    words = [*stages.words(stage), "--max_steps", str(per_cycle * (cycles + 4)), "--epochs", "99"]
    commands.run(*words, "--output_dir", tmp_path / "whole")
    folder, counts = tmp_path / "parts", {}
    for _ in range(cycles):
        number = chance.choice([signal.SIGKILL, *(number for number, _ in STOPS)])
        at_the_start = number, 0, chance.random() * 0.3
        in_a_step = number, 1 + chance.randrange(per_cycle), chance.random() * 0.02
        strike = at_the_start if chance.random() < 0.3 else in_a_step
        process = commands.start(*words, "--resume", "--output_dir", folder, strike=strike)
        status = process.wait()
        # before the command minds signals, they do what they do to any process
        assert status in (-number, 128 + number), (number, status, process.said)
        counts[status] = counts.get(status, 0) + 1
        if list(folder.glob("*_state/latest")):
            load_training_state(state_folder(folder))
    commands.run(*words, "--resume", "--output_dir", folder)
    print(f"exit statuses: {counts}")
    lost = differences(folder, tmp_path / "whole")
    tally(f"a random signal at a random moment, then resume (soak, {stage})", cycles, len(lost))
    assert not lost
