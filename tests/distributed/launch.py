"""Runs of the real commands in one or several processes, and what came of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import recorded_recipe
import torch
from safetensors.torch import load_file

from tests.processes import run_ranks

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RECIPE = HERE / "recorded_recipe.py"
SHAPE = [
    "--preset", "tiny", "--hidden_size", "32", "--num_hidden_layers", "2", "--num_attention_heads", "4",
    "--num_key_value_heads", "2",
]  # fmt: skip
SHARED = [
    "--device", "cpu", "--dtype", "float32", "--max_seq_len", "64", "--log_interval", "1", "--eval_interval", "0",
    "--eval_batches", "0", "--validation_fraction", "0.1", "--warmup_fraction", "0", "--epochs", "1",
]  # fmt: skip
ROWS_PER_STEP = 8
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def environment(**more: str) -> dict[str, str]:
    """The environment of a run: one thread a process, this repository, and no other run's ranks."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "PET_"))}
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


@dataclass(frozen=True)
class Outcome:
    """What a run has left, be it of one command or of several that went on with each other."""

    folder: Path
    """The run's --output_dir."""
    records: Path
    """Where `recorded_recipe.py` wrote."""
    said: str = ""

    def metrics(self, name: str) -> dict[int, float]:
        """Step -> the metric `name`, where it was logged."""
        (path,) = self.folder.glob("*_metrics.jsonl")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return {line["step"]: line[name] for line in lines if name in line}

    def steps(self) -> list[dict[str, Any]]:
        """Every record of every process, in the order of time. A killed process may leave half a line."""
        found = []
        for path in self.records.glob("*.jsonl"):
            for line in path.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    found.append(json.loads(line))
        return sorted(found, key=lambda record: record["time"])

    def rows(self) -> dict[int, list[int]]:
        """Step -> the rows that the final model has seen in it, over all ranks.

        A step that was done twice, since its first result was lost with a process, counts as it was done last.
        """
        by_step: dict[int, dict[tuple[int, int], list[int]]] = {}
        last_size: dict[int, int] = {}
        for record in self.steps():
            step, size = record["step"], record["world_size"]
            by_step.setdefault(step, {})[size, record["rank"]] = record["rows"]
            last_size[step] = size
        return {
            step: [row for rank in range(last_size[step]) for row in parts[last_size[step], rank]]
            for step, parts in sorted(by_step.items())
        }

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights of the newest model folder."""
        files = sorted(self.folder.glob("*_epoch*/*model.safetensors"), key=lambda path: path.parent.name)
        return load_file(files[-1])


def command_of(stage: str, where: Path, argv: Sequence[object], launcher: Sequence[str] = (sys.executable,)) -> list:
    """The command line of a recorded run whose output and records go to the folder `where`."""
    return [*launcher, str(RECIPE), *words_of(stage, where, argv)]


def words_of(stage: str, where: Path, argv: Sequence[object]) -> list[str]:
    """The arguments of `recorded_recipe.py` for a run whose output and records go to the folder `where`."""
    (where / "records").mkdir(parents=True, exist_ok=True)
    return [str(word) for word in (where / "records", stage, "--output_dir", where / "out", *argv)]


def run(stage: str, where: Path, argv: Sequence[object], processes: int = 1, accumulation_steps: int = 1) -> Outcome:
    """Run a stage to its end in so many processes, which share `ROWS_PER_STEP` rows a step; it must succeed."""
    batch_size = ROWS_PER_STEP // processes // accumulation_steps
    words = words_of(stage, where, ["--batch_size", batch_size, "--accumulation_steps", accumulation_steps, *argv])
    return Outcome(where / "out", where / "records", run_ranks(recorded_recipe.main, [[words]] * processes, where))


@contextlib.contextmanager
def started(command: Sequence[str], log: Path, **more: str) -> Iterator[subprocess.Popen]:
    """A process group of its own that runs `command`, its words in the file `log`; killed at the end."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=environment(**more), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        kill_group(process)


def kill_group(process: subprocess.Popen) -> None:
    """Kill -9 a torchrun and all its workers; each worker leads a session of its own."""
    for pid in [*descendants(process.pid), process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    """The children of a process, theirs, and so on."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def wait_until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """What `condition` gives as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for: {what}"
        time.sleep(0.05)
    return value
