"""Processes for tests that need several of them, forked from one process that has imported torch once.

A Python that imports torch costs 4 to 10 seconds of a small machine, and the tests start dozens. Where the launch
itself is tested, a test starts the real command instead.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PATIENCE = 300
"""Seconds until a process counts as stuck. No test may pass or fail by how busy the machine is: this is minutes."""

_METHOD = "forkserver" if sys.platform == "linux" else "spawn"
_CONTEXT: Any = multiprocessing.get_context(_METHOD)
if _METHOD == "forkserver":
    # No module of the recipes: the tests replace functions that these import by name.
    _CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "pyarrow", "tinylm.trainer.core.loop"])


def start(function: Callable[..., Any], *arguments: Any, log: Path, **environment: str) -> BaseProcess:
    """Call a function of a module in a process of its own, which ends with the status that the function returns.

    Args:
        log: the file that gets both its output streams.
        environment: more environment variables.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "PET_"))}
    variables = {**inherited, "OMP_NUM_THREADS": "1", **environment}
    process = _CONTEXT.Process(target=_call, args=(function, arguments, str(log), variables))
    process.start()
    return process


def end_of(process: BaseProcess, log: Path) -> int:
    """The exit status of a process, minus the signal that ended it. One that is stuck is killed and fails the test."""
    process.join(PATIENCE)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"still running after {PATIENCE} s: {log.read_text(errors='replace')}")
    return process.exitcode


def run_ranks(
    function: Callable[..., Any], arguments: Sequence[Sequence[Any]], folder: Path, **environment: str
) -> str:
    """Call a function in one process a rank, each with its own arguments; all must succeed. Returns what rank 0 said.

    The process group is joined over gloo before the call. The ranks meet at a file, so no port can be taken.
    """
    logs = [folder / f"log.{rank}" for rank in range(len(arguments))]
    ranks = start_ranks(function, arguments, folder, **environment)
    try:
        statuses = [end_of(process, log) for process, log in zip(ranks, logs, strict=True)]
    finally:
        for process in ranks:
            process.kill()
    assert not any(statuses), "\n".join(log.read_text(errors="replace") for log in logs)
    return logs[0].read_text()


def start_ranks(
    function: Callable[..., Any], arguments: Sequence[Sequence[Any]], folder: Path, **environment: str
) -> list[BaseProcess]:
    """As `run_ranks`, without waiting for the end; the process of rank N writes to FOLDER/log.N."""
    names = [
        {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(arguments), "LOCAL_WORLD_SIZE": len(arguments)}
        for rank in range(len(arguments))
    ]
    return [
        start(
            _join_and_call, function, tuple(each), f"file://{folder}/rendezvous",
            log=folder / f"log.{rank}", **{name: str(value) for name, value in names[rank].items()}, **environment,
        )
        for rank, each in enumerate(arguments)
    ]  # fmt: skip


def _call(function: Callable[..., Any], arguments: Sequence[Any], log: str, variables: dict[str, str]) -> None:
    import torch

    with open(log, "wb") as file, open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0), os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(1)
    status = 1
    try:
        status = function(*arguments) or 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _join_and_call(function: Callable[..., Any], arguments: Sequence[Any], rendezvous: str) -> int:
    import torch.distributed as dist

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size > 1:
        dist.init_process_group("gloo", rendezvous, rank=rank, world_size=world_size)
    status = function(*arguments) or 0
    if world_size > 1:
        dist.destroy_process_group()
    return status
