"""A save that is made over and over, each time with another of its system calls failing or killing it.

The process that has imported torch forks a child for each save; the child arms the shim, saves, and is killed or told
of an error. The parent looks at what is left.

    LD_PRELOAD=shim.so python disk_faults.py FOLDER '{"scenario": "state"}'
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.checkpoint.saved_states import save_state
from tests.model.small_models import small_model
from tinylm.checkpoint.adapter_folder import save_adapter
from tinylm.checkpoint.model_folder import load_model, save_model
from tinylm.checkpoint.training_state import load_training_state
from tinylm.files.atomic import atomic_write, check_manifest, remove_leftovers
from tinylm.model.lora import LoRAConfig, apply_lora
from tinylm.model.weights import weights_fingerprint
from tinylm.tokenizer.tokenizer import Tokenizer

KILL, COUNT = -1, 0
LASTING, NO_EXCHANGE, NO_SYNC = 1, 2, 4
RAISED, BROKEN = 7, 8
"""Exit statuses of a child: the save raised OSError, or anything else."""


def arm(folder: str | Path, at: int = 0, action: int = COUNT, flags: int = NO_SYNC, log: int = -1) -> None:
    """Let the shim watch `folder`, and strike at its call number `at`."""
    # without fsync on the disk: a kill cannot tell, and it takes most of the time
    ctypes.CDLL(None).fault_arm(os.fsencode(folder), ctypes.c_long(at), action, flags, log)


@dataclass(frozen=True)
class Scenario:
    """What is saved over what, and how to look at it. All paths lie below the folder that is given."""

    prepare: Callable[[Path], None]
    save: Callable[[Path], None]
    read: Callable[[Path], str]
    """A digest of everything that loading gives; "none" where nothing is promised to be."""
    save_next: Callable[[Path], None]
    """What comes after the fault: the next save, or the clean-up that a run begins with."""
    others: str = "nothing"
    """A glob of what the save must not touch."""


def digest(value: Any) -> str:
    """Of nested plain values and tensors, bit for bit."""
    found = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            found.update(f"{part.dtype}{tuple(part.shape)}".encode() + part.detach().numpy().tobytes())
        elif isinstance(part, dict):
            for key in part:
                add(key), add(part[key])
        elif isinstance(part, list | tuple):
            for item in part:
                add(item)
        else:
            found.update(repr(part).encode())

    add(value)
    return found.hexdigest()[:16]


def state_of(step: int) -> dict[str, Any]:
    torch.manual_seed(step)
    weights = {f"layer.{i}": torch.randn(64, 40) for i in range(3)}
    return {"step": step, "weights": weights, "optimizers": [{"layer.0": {"exp_avg": torch.randn(64, 40)}}]}


def save_states(*steps: int) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        for step in steps:
            save_state(folder / "run" / "state", state_of(step))

    return save


def read_state(folder: Path) -> str:
    try:
        found = load_training_state(folder / "run" / "state")
    except FileNotFoundError:
        return "none"
    assert not found.damaged, found.damaged
    latest = folder / "run" / "state" / "latest"
    assert not latest.exists() or latest.read_text() == found.folder.name  # not only found by looking around
    return digest(found.values)


@functools.cache
def small_tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat, the cat sat"], 300)


def save_a_model(seed: int) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        torch.manual_seed(seed)
        save_model(folder / "model", small_model(), small_tokenizer(), {"seed": seed})

    return save


def read_model(folder: Path) -> str:
    check_manifest(folder / "model")
    model, tokenizer, lineage = load_model(folder / "model")
    return digest([weights_fingerprint(model), tokenizer.fingerprint, lineage])


def save_an_adapter(seed: int) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        model, _, _ = load_model(folder / "model")
        torch.manual_seed(seed)
        apply_lora(model, LoRAConfig(rank=2))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_()
        save_adapter(model, folder / "adapter", "../model", {"seed": seed})

    return save


def read_adapter(folder: Path) -> str:
    check_manifest(folder / "adapter")
    model, _, lineage = load_model(folder / "adapter")
    return digest([dict(model.named_parameters()), lineage])


def write_a_file(text: bytes) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        with atomic_write(folder / "file") as file:
            file.write(text)

    return save


def in_order(*saves: Callable[[Path], None]) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        for each in saves:
            each(folder)

    return save


def clean(name: str) -> Callable[[Path], None]:
    return lambda folder: remove_leftovers(folder / name)


SCENARIOS = {
    "state": Scenario(save_states(1, 2), save_states(3), read_state, save_states(4), "run/state/step_00000002/*"),
    "first state": Scenario(lambda folder: None, save_states(3), read_state, save_states(4)),
    "state of the same step": Scenario(
        in_order(save_states(1, 2), lambda folder: save_state(
            folder / "run" / "state", {**state_of(3), "is_pending": True}
        )), save_states(3), read_state, save_states(4), "run/state/step_00000002/*",
    ),
    "model": Scenario(save_a_model(0), save_a_model(1), read_model, clean("model")),
    "adapter": Scenario(
        in_order(save_a_model(0), save_an_adapter(0)), save_an_adapter(1), read_adapter, clean("adapter"), "model/*"
    ),
    "file": Scenario(write_a_file(b"old" * 999), write_a_file(b"new" * 999), lambda folder: digest(
        (folder / "file").read_bytes()
    ), clean("file")),
}  # fmt: skip


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() or path.is_dir())


def bytes_of(folder: Path, pattern: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob(pattern) if path.is_file()}


def in_child(save: Callable[[Path], None], folder: Path, at: int, action: int, flags: int, log: int = -1) -> int:
    """Save in a process of its own; its exit status, -9 when it was killed."""
    if (child := os.fork()) == 0:
        status = BROKEN
        with contextlib.suppress(BaseException):
            try:
                arm(folder, at, action, flags | NO_SYNC, log)
                save(folder)
                status = 0
            except OSError:
                status = RAISED
            except BaseException as error:
                print(repr(error), file=sys.stderr)
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def strike(scenario: Scenario, folder: Path, at: int, action: int, flags: int) -> dict[str, Any]:
    """One save with one fault, what it left, and what the next save made of that."""
    before = bytes_of(folder, scenario.others)
    status = in_child(scenario.save, folder, at, action, flags)
    if flags & NO_EXCHANGE:  # what the next run begins with
        scenario.save_next(folder)
    found = scenario.read(folder)
    untouched = bytes_of(folder, scenario.others) == before
    scenario.save_next(folder)
    return {"at": at, "status": status, "found": found, "untouched": untouched, "names": names(folder)}


def main(folder: Path, scenario: str, fault: str = "KILL", every: int = 1, flags: int = 0) -> dict[str, Any]:
    """The calls of the undisturbed save, and for a fault at every `every`-th of them what became of it."""
    chosen, action = SCENARIOS[scenario], KILL if fault == "KILL" else getattr(errno, fault)
    work, start = folder / "work", folder / "start"
    start.mkdir()
    chosen.prepare(start)
    shutil.copytree(start, work)
    before = names(work)
    old = chosen.read(work) if any(work.iterdir()) else "none"
    with open(folder / "log", "w+") as log:
        assert in_child(chosen.save, work, 0, COUNT, flags, log.fileno()) == 0
        log.seek(0)
        calls = [line.rstrip("\n").split("\t") for line in log]
    new = chosen.read(work)
    chosen.save_next(work)
    clean_names = names(work)
    results = []
    for at in [*range(1, len(calls) + 1, every), len(calls) + 1]:
        shutil.rmtree(work)
        shutil.copytree(start, work)
        results.append(strike(chosen, work, at, action, flags))
    return {"calls": calls, "before": before, "old": old, "new": new, "names": clean_names, "results": results}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), **json.loads(sys.argv[2]))))
