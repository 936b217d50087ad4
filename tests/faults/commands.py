"""`tinylm ...` as processes that can be watched, signalled and compared.

Importing torch takes seconds, and hundreds of commands are run: they are forked from one process (this file, run as a
program) that has imported everything and has no threads. With `cold` a command is `python -m tinylm.cli`, from nothing.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tinylm.checkpoint.training_state import load_training_state

HERE = Path(__file__).resolve().parent
PATIENCE = 300
"""Seconds until a command counts as stuck."""
TIMING = ("tokens_per_second", "matmul_share")
SHARED = [
    "--device", "cpu", "--dtype", "float32", "--max_seq_len", "64", "--batch_size", "2", "--accumulation_steps", "2",
    "--max_steps", "60", "--epochs", "20", "--save_interval", "4", "--eval_interval", "9", "--eval_batches", "2",
    "--log_interval", "1", "--validation_fraction", "0.1", "--learning_rate", "1e-2",
]  # fmt: skip
SHAPE = [
    "--preset", "tiny", "--hidden_size", "32", "--num_hidden_layers", "1", "--num_attention_heads", "4",
    "--num_key_value_heads", "2",
]  # fmt: skip


def python_environment(repository: Path, shim: Path | None = None) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(repository), str(HERE)]),
        **({"LD_PRELOAD": str(shim)} if shim is not None else {}),
    }


class Process:
    """One command that was started."""

    def __init__(self, server: Commands, pid: int, log: Path) -> None:
        self.server, self.pid, self.log, self.status = server, pid, log, None

    def poll(self) -> int | None:
        """The exit status (minus the signal that killed it), or None while it runs."""
        if self.status is None:
            self.status = self.server.ask({"poll": self.pid})
        return self.status

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait for the end; returns the exit status."""
        self._wait_until(lambda: self.poll() is not None, timeout)
        assert self.status is not None
        return self.status

    def wait_until_stopped(self) -> None:
        """Wait until SIGSTOP has stopped it."""
        stat = Path(f"/proc/{self.pid}/stat")
        self._wait_until(lambda: self.poll() is not None or stat.read_text().rpartition(")")[2].split()[0] == "T")
        assert self.status is None, f"ended with status {self.status}: {self.said}"

    def _wait_until(self, condition: Callable[[], bool], timeout: float = PATIENCE) -> None:
        end = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                raise TimeoutError(f"waited {timeout} s: {self.said}")
            time.sleep(0.005)

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")


class Commands:
    """Starts commands; a context, which ends what is still running."""

    def __init__(self, environment: dict[str, str], logs: Path) -> None:
        self.environment, self.logs, self.processes = environment, logs, []

    def __enter__(self) -> Commands:
        command = [sys.executable, __file__]
        self.server = subprocess.Popen(
            command, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send(signal.SIGKILL)
                process.wait()
        self.server.stdin.close()
        self.server.wait(PATIENCE)
        self.server.stdout.close()

    def ask(self, request: dict[str, Any]) -> Any:
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, *words: object, cold: bool = False, **fault: Any) -> Process:
        """Start `tinylm WORDS`.

        Faults: `arm` = (folder, call, action, flags) as in disk_faults; `clock` in seconds; `strike` = (signal, step,
        seconds), a signal so long after the command has begun the step (from 1; 0 is its start).
        """
        log = self.logs / f"{len(self.processes)}.txt"
        request = {"argv": [str(word) for word in words], "log": str(log), "cold": cold, **fault}
        self.processes.append(Process(self, self.ask(request), log))
        return self.processes[-1]

    def save(self, folder: Path, **request: Any) -> dict[str, Any]:
        """What `disk_faults.main` returns, from a process that no other test has touched."""
        folder.mkdir()
        process = self.start(save={**request, "folder": str(folder)})
        assert process.wait(1000) == 0, process.said
        return json.loads((folder / "result.json").read_text())

    def run(self, *words: object, **options: Any) -> str:
        """Start it and wait for a good end; returns what it said."""
        process = self.start(*words, **options)
        assert process.wait() == 0, process.said
        return process.said


class Stages:
    """Words of each stage's command. What a stage starts from is made at its first use."""

    def __init__(self, commands: Commands, root: Path) -> None:
        from tests.stage_files import write_stage_files  # here: a child that runs this file does not see `tests`

        self.commands, self.root = commands, root
        write_stage_files(root, num_chats=60, num_pairs=60)

    def _folder(self, name: str, *words: object) -> Path:
        """Of a tokenizer, or of a model to start from."""
        if not (folder := self.root / name).exists():
            self.commands.run(*words, "--output_dir", folder)
        return folder

    def words(self, stage: str) -> list[str]:
        """The command of a stage without its output folder. Dropout is on where there is any; steps are accumulated."""
        data = {"pretrain": "texts", "dpo": "pairs"}.get(stage, "chats")
        words = [stage, "--data_path", self.root / f"{data}.jsonl", *SHARED]
        if stage == "pretrain":
            vocabulary = ["--data_path", self.root / "texts.jsonl", "--vocab_size", "400"]
            tokenizer = self._folder("tokenizer", "tokenizer", *vocabulary)
            return [*map(str, words), *SHAPE, "--tokenizer_path", str(tokenizer), "--dropout", "0.1"]
        if stage == "dpo":
            parent = self._folder("sft", *self.words("sft"))
        else:
            parent = self._folder("pretrain", *self.words("pretrain"))
        words += ["--model_path", parent]
        if stage == "lora":
            words += ["--lora_rank", "2", "--lora_dropout", "0.1"]
        return [str(word) for word in words]


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of the metrics file, without what depends on the hour."""
    (path,) = folder.glob("*_metrics.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in TIMING} for record in records]


def last_step(folder: Path) -> int:
    """Of the metrics file, which may be in the middle of being written; 0 before there is one."""
    for path in folder.glob("*_metrics.jsonl"):
        lines = path.read_bytes().rpartition(b"\n")[0].splitlines()
        return json.loads(lines[-1])["step"] if lines else 0
    return 0


def wait_for_step(process: Process, folder: Path, step: int) -> None:
    """Until the metrics file has `step`, or the process has ended. On a busy machine the run may be steps ahead by the
    time that the caller looks: where that matters, `strike` (see `Commands.start`)."""
    end = time.monotonic() + PATIENCE
    while last_step(folder) < step and process.poll() is None:
        assert time.monotonic() < end, process.said
        time.sleep(0.001)


def state_folder(folder: Path) -> Path:
    (place,) = folder.glob("*_state")
    return place


def bits(value: Any) -> Any:
    """Nested values with the bytes of each tensor in its place."""
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [bits(item) for item in value]
    return (str(value.dtype), value.numpy().tobytes()) if hasattr(value, "dtype") else value


def differences(folder: Path, whole: Path) -> list[str]:
    """What of a finished run is not, bit for bit, what an undisturbed run left."""
    found = []
    weights = [name for name in files(whole) if "_epoch" in name and name.endswith(".safetensors")]
    ours, theirs = files(folder), files(whole)
    assert weights
    found += [name for name in weights if ours.get(name) != theirs[name]]
    states = [load_training_state(state_folder(place)).values for place in (folder, whole)]
    for name in ("step", "weights", "optimizers", "best_validation_loss", "num_skipped", "is_pending"):
        if bits(states[0][name]) != bits(states[1][name]):
            found.append(f"state: {name}")
    lines = metrics_of(folder), metrics_of(whole)
    if lines[0] != lines[1]:
        found.append(f"metrics: {[r['step'] for r in lines[0]]} for {[r['step'] for r in lines[1]]}")
    found += [f"left behind: {name}" for name in ours if "/." in f"/{name}" and not name.endswith(".lock")]
    return found


# --------------------------------------------------------------------------------------------------
# The process that commands are forked from
# --------------------------------------------------------------------------------------------------


def _child(request: dict[str, Any]) -> None:
    with open(request["log"], "wb") as log, open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0), os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    os.setsid()
    if request["cold"]:
        os.execv(sys.executable, [sys.executable, "-m", "tinylm.cli", *request["argv"]])
    status = 1
    try:
        if "save" in request:
            folder = Path(request["save"].pop("folder"))
            (folder / "result.json").write_text(json.dumps(disk_faults.main(folder, **request["save"])))
            os._exit(0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from tinylm import cli

        library = ctypes.CDLL(None)
        library.fault_clock(ctypes.c_long(request.get("clock", 0)))
        if "arm" in request:
            folder, at, action, flags = request["arm"]
            library.fault_arm(os.fsencode(folder), ctypes.c_long(at), action, flags, -1)
        if "strike" in request:
            _strike(library, *request["strike"])
        status = cli.main(request["argv"])
    except KeyboardInterrupt:  # before or after the command minded signals, where Python itself would end like this
        status = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _strike(library: Any, number: int, step: int, seconds: float) -> None:
    """Let a signal come in a step of this process. A test that watches for the step may look when it is long past."""
    from tinylm.trainer.core import loop

    accumulate, begun = loop.accumulate_gradients, itertools.count(1)
    microseconds = ctypes.c_long(round(seconds * 1e6))

    def accumulate_and_count(*arguments: Any, **options: Any) -> Any:
        if next(begun) == step:
            library.fault_signal(number, microseconds)
        return accumulate(*arguments, **options)

    loop.accumulate_gradients = accumulate_and_count
    if step == 0:
        library.fault_signal(number, microseconds)


def _serve(requests: Iterable[str]) -> None:
    for line in requests:
        request = json.loads(line)
        if "poll" in request:
            ended, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        elif (answer := os.fork()) == 0:
            _child(request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    import disk_faults
    import torch

    from tinylm.commands import quickstart
    from tinylm.trainer.run import run

    torch.set_num_threads(1)
    run.measured_matmul_flops = lambda runtime: 1e11  # 0.3 s a command; only the progress line needs it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert quickstart
    _serve(iter(sys.stdin.readline, ""))
