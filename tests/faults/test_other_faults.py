"""Full and read-only disks under a whole run, damaged files, a clock set back, two runs on one folder, no number."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess

import pytest
import torch
from commands import differences, files, last_step, metrics_of, state_folder
from disk_faults import KILL, LASTING, NO_SYNC, save_states

from tests.checkpoint.saved_states import save_state
from tinylm.checkpoint.training_state import load_training_state, read_training_values

YEAR = 365 * 86400


@pytest.fixture(scope="module")
def pretrain(commands, stages):
    """(words of the command, folder of an undisturbed run)."""
    whole = stages.root / "undisturbed_pretrain"
    words = stages.words("pretrain")
    if not whole.exists():
        commands.run(*words, "--output_dir", whole)
    return words, whole


RUN_FAULTS = [("ENOSPC", 28, LASTING), ("ENOSPC", 28, 0), ("EIO", 5, LASTING), ("EIO", 5, 0), ("EROFS", 30, LASTING)]


@pytest.mark.slow
@pytest.mark.parametrize("times", [pytest.param(1, id="once"), pytest.param(60, id="often", marks=pytest.mark.long)])
@pytest.mark.parametrize(("name", "code", "flags"), [*RUN_FAULTS, ("SIGKILL", KILL, 0)])
def test_a_call_of_a_whole_run_fails(commands, pretrain, tmp_path, tally, name, code, flags, times):
    """The run reaches the same end, or it fails with one line and a status that says so; then --resume reaches that end
    from what it left."""
    words, whole = pretrain
    calls, lost, statuses = 600, [], []  # the run has some more
    chance = random.Random(f"{name} {flags} {times}")
    for number in range(times):
        at = number + 1 if number < times // 5 else chance.randrange(1, calls)  # the beginning, and anywhere
        folder = tmp_path / str(number)
        process = commands.start(*words, "--output_dir", folder, arm=(str(folder), at, code, flags | NO_SYNC))
        status = process.wait()
        statuses.append(status)
        good = status in (0, 1) or (name == "SIGKILL" and status == -9)
        good &= "Traceback" not in process.said and (status != 1 or "tinylm: error: " in process.said)
        if status:
            commands.run(*words, "--resume", "--output_dir", folder)
        if different := differences(folder, whole):
            good = False
        if not good:
            lost.append((at, status, different, process.said))
    tally(f"{name} in a whole run, {'from a call on' if flags else 'once'}, then resume", times, len(lost))
    assert not lost
    if name == "SIGKILL" or flags:
        assert any(statuses), "nothing struck: the run makes fewer calls"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted (that needs root): {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.slow
def test_a_disk_that_is_really_full(commands, pretrain, small_disk, tally):
    """It fills up under a run. The last state stays as it is, byte for byte; with room again the run continues."""
    words, whole = pretrain
    folder = small_disk / "out"
    process = commands.start(*words, "--output_dir", folder, strike=(signal.SIGSTOP, 10, 0))
    process.wait_until_stopped()
    ballast = small_disk / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 4096):
                pass
        except OSError:
            pass
    before = load_training_state(state_folder(folder))
    kept = files(before.folder)
    process.send(signal.SIGCONT)
    status = process.wait()
    assert status == 1 and "could not be saved" in process.said and "No space left" in process.said, process.said
    after = load_training_state(state_folder(folder))
    assert after.values["step"] >= before.values["step"] and not after.damaged
    assert not before.folder.exists() or files(before.folder) == kept
    assert after.folder != before.folder or files(after.folder) == kept
    ballast.unlink()
    commands.run(*words, "--resume", "--output_dir", folder)
    lost = differences(folder, whole)
    tally("a disk that is really full (tmpfs), then room, then resume", 1, bool(lost))
    assert not lost


@pytest.mark.slow
def test_a_disk_that_may_only_be_read(commands, pretrain, small_disk, tally):
    words, _ = pretrain
    (small_disk / "out").mkdir()
    before = files(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    process = commands.start(*words, "--output_dir", small_disk / "out")
    assert process.wait() == 1 and "Read-only file system; choose another path" in process.said, process.said
    tally("a disk that may only be read (tmpfs)", 1, files(small_disk) != before)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere; the test above stands for it")
def test_a_folder_that_may_not_be_written(commands, pretrain, tmp_path):
    (tmp_path / "out").mkdir(mode=0o555)
    process = commands.start(*pretrain[0], "--output_dir", tmp_path / "out")
    assert process.wait() == 2 and "Permission denied" in process.said


@pytest.mark.slow
@pytest.mark.parametrize("stride", [pytest.param(7, id="some"), pytest.param(1, id="every", marks=pytest.mark.long)])
def test_one_damaged_byte_anywhere(tmp_path, tally, stride):
    """A flipped bit in any byte of any file, or a file cut anywhere: the state before it is taken, and it is said why;
    a damaged `latest` costs nothing."""
    for step in (1, 2):
        save_state(tmp_path, {"step": step, "weights": {"w": torch.arange(9.0) * step}})
    newest, lost, tried = tmp_path / "step_00000002", [], 0
    for path in [*sorted(newest.iterdir()), tmp_path / "latest"]:
        good = path.read_bytes()
        for place in range(0, len(good), stride):
            flipped = bytearray(good)
            flipped[place] ^= 1 << place % 8
            for bad in (bytes(flipped), good[:place]):
                path.write_bytes(bad)
                found, tried = load_training_state(tmp_path), tried + 1
                # what a flip in the manifest leaves true (a space, the number of its format) damages nothing
                expected = {2} if path.parent == tmp_path else {1} if path.name != "manifest.json" else {1, 2}
                good_weights = found.values["weights"]["w"].tolist() == [n * found.values["step"] for n in range(9)]
                if found.values["step"] not in expected or not good_weights:
                    lost.append((path.name, place))
        path.write_bytes(good)
    tally("one bit flipped, or the file cut, in a file of a state", tried, len(lost))
    assert not lost


@pytest.mark.slow
def test_a_clock_set_back(commands, pretrain, tmp_path, tally):
    """A year back between two starts, and file times that lie: the newest state is the newest step."""
    words, whole = pretrain
    process = commands.start(*words, "--output_dir", tmp_path, clock=YEAR, strike=(signal.SIGKILL, 21, 0))
    assert process.wait() == -signal.SIGKILL
    newest = read_training_values(state_folder(tmp_path))["step"]
    for age, path in enumerate(sorted(tmp_path.rglob("*"), reverse=True)):
        os.utime(path, (1e9 + age, 1e9 + age))
    said = commands.run(*words, "--resume", "--output_dir", tmp_path, clock=-YEAR)
    assert newest >= 8 and f"from step {newest}" in said, said
    lost = differences(tmp_path, whole)
    tally("a clock set back by two years", 1, bool(lost))
    assert not lost


def test_states_go_by_their_step_and_not_by_their_time(tmp_path):
    for step in (3, 6, 9):
        save_states(step)(tmp_path)
        for number, path in enumerate(sorted((tmp_path / "run" / "state").glob("*"))):
            os.utime(path, (1e9 - number * YEAR, 1e9 - number * YEAR))  # the older the step, the newer it looks
    folder = tmp_path / "run" / "state"
    assert load_training_state(folder).values["step"] == 9
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000006", "step_00000009"]
    (folder / "latest").unlink()
    assert load_training_state(folder).values["step"] == 9


@pytest.mark.slow
def test_two_runs_on_one_folder(commands, pretrain, tmp_path, tally):
    """The second is refused, the first unharmed, and a killed one holds nothing. Runs of one stage share the metrics
    file, whatever their model's width; one of another width was once let in."""
    words, whole = pretrain
    first = commands.start(*words, "--output_dir", tmp_path, strike=(signal.SIGSTOP, 4, 0))
    first.wait_until_stopped()
    for more in ([], ["--resume"], ["--hidden_size", "16"]):
        second = commands.start(*words, *more, "--output_dir", tmp_path)
        assert second.wait() == 2, second.said
        errors = [line for line in second.said.splitlines() if line.startswith("tinylm: error: ")]
        assert len(errors) == 1 and f"is in use by another run (process {first.pid} on " in errors[0], second.said
    first.send(signal.SIGCONT)
    assert first.wait() == 0, first.said
    lost = differences(tmp_path, whole)
    assert not lost
    killed = commands.start(*words, "--output_dir", tmp_path / "again", strike=(signal.SIGKILL, 6, 0))
    assert killed.wait() == -signal.SIGKILL
    commands.run(*words, "--resume", "--output_dir", tmp_path / "again")
    lost += differences(tmp_path / "again", whole)
    tally("a second run on the folder of a first", 3, len(lost))
    assert not lost


@pytest.mark.slow
def test_a_loss_that_is_no_number(commands, pretrain, tmp_path, tally):
    """A step without a number changes nothing and is counted; ten in a row end the run, with the batch for inspection.

    The states saved in between pushed out the last good one: nothing was left to resume from with another learning
    rate. And a sample that was due ended the run early, as if the user had made a mistake (status 2)."""
    words, _ = pretrain
    process = commands.start(*words, "--output_dir", tmp_path, strike=(signal.SIGTERM, 14, 0))
    assert process.wait() == 143
    good = load_training_state(state_folder(tmp_path))
    kept, step = files(good.folder), good.values["step"]
    assert all(math.isfinite(record["loss"]) for record in metrics_of(tmp_path) if "loss" in record)
    short = ["--resume", "--save_interval", "1", "--output_dir", tmp_path]
    process = commands.start(*words, *short, "--learning_rate", "1e30")
    assert process.wait() == 1, process.said
    errors = [line for line in process.said.splitlines() if line.startswith("tinylm: error: ")]
    assert len(errors) == 1 and "as in 10 steps in a row" in errors[0] and "nothing was updated" in process.said
    batch = [json.loads(line) for line in (tmp_path / "pretrain_32_bad_batch_rank0.jsonl").read_text().splitlines()]
    failed = last_step(tmp_path)
    assert {row["step"] for row in batch} == {failed} and all(row["text"] and row["input_ids"] for row in batch)
    skipped = [record["step"] for record in metrics_of(tmp_path) if None in record.values()]
    assert skipped == list(range(failed - 9, failed + 1))
    found = load_training_state(state_folder(tmp_path))
    # A state of the very step whose update broke the weights was saved too, and is withdrawn.
    assert found.folder == good.folder and skipped[0] == step + 2
    assert files(good.folder)["state.safetensors"] == kept["state.safetensors"]
    commands.run(*words, "--resume", "--learning_rate", "5e-3", "--output_dir", tmp_path)
    done = load_training_state(state_folder(tmp_path)).values
    finite = all(bool(weight.isfinite().all()) for weight in done["weights"].values())
    tally("a loss that is no number, ten steps in a row", 1, not finite)
    assert finite and done["step"] == 60 and done["changed_on_resume"]


@pytest.mark.slow
def test_stopped_between_steps_without_a_number(commands, pretrain, tmp_path):
    """What it would save is broken, and would push out what is not."""
    words, _ = pretrain
    process = commands.start(*words, "--output_dir", tmp_path, strike=(signal.SIGTERM, 14, 0))
    assert process.wait() == 143
    good = load_training_state(state_folder(tmp_path))
    broken = ["--resume", "--save_interval", "0", "--learning_rate", "1e30", "--output_dir", tmp_path]
    process = commands.start(*words, *broken, strike=(signal.SIGTERM, 4, 0))
    assert process.wait() == 143
    assert "in which nothing was updated; the state before it is kept" in process.said
    assert load_training_state(state_folder(tmp_path)).folder == good.folder
