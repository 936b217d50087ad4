"""One case: damage a file, load it, and hold the loader to what docs/reliability.md promises."""

from __future__ import annotations

import contextlib
import ctypes
import io
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.fuzz.targets import Target

MAX_SECONDS = 1.0
"""Of processor time, so that other work on the machine is not counted."""

SMALL_MEMORY = 128 << 20
"""Bytes that a load may take beside twice the size of the file. 64 MB of it are the tables of positions, which are in
no file and which a config may ask for; they take half as much again while they are made."""

_MAX_MESSAGE = 2000


@dataclass(frozen=True)
class Outcome:
    """What became of a case."""

    loaded: bool
    fault: str | None
    seconds: float
    memory: int
    """Bytes by which the process grew at most."""


def run_case(name: str, target: Target, seeds: Path, work: Path, seed: int, number: int) -> Outcome:
    """Damage the target's file by (seed, number), load it, and judge what happens.

    Args:
        seeds: what `make_seeds` wrote.
        work: a copy of it; the damaged file is left there, for whoever wants to see it.
    """
    rng = Random(f"{seed} {name} {number}")
    good = (seeds / target.folder / target.file).read_bytes()
    path = work / target.folder / target.file
    path.write_bytes(target.mutate(rng, good))
    try:
        return judge(target, path)
    finally:
        shutil.copyfile(path, work / "last-case")
        path.write_bytes(good)


def judge(target: Target, path: Path, max_seconds: float = MAX_SECONDS) -> Outcome:
    """Load a file. Only our own errors may come of it: one printable line that names the file or its folder."""
    size = path.stat().st_size
    before = _reset_peak()
    begin = time.process_time()
    loaded, fault, printed = True, None, io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            target.load(path)
    except (ValueError, OSError) as error:
        loaded, fault = False, _fault_of(str(error), target, path)
    except SystemExit as stop:
        loaded, fault = False, f"status {stop.code}"
        if stop.code == 2:
            fault = _fault_of(printed.getvalue().strip(), target, path)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        loaded, fault = False, f"{type(error).__name__}: {error}"
    seconds, memory = time.process_time() - begin, max(_peak() - before, 0)
    if fault is None and seconds > max_seconds:
        fault = f"{seconds:.1f} seconds"
    if fault is None and memory > 2 * size + SMALL_MEMORY:
        fault = f"{memory >> 20} MB of memory for a file of {size} bytes"
    return Outcome(loaded, fault, seconds, max(memory - 2 * size, 0))


def _fault_of(message: str, target: Target, path: Path) -> str | None:
    if target.names_file and path.name not in message and str(path.parent) not in message:
        return f"names no file: {message[:200]!r}"
    if not message.isprintable() or len(message) > _MAX_MESSAGE:
        return f"not one short printable line: {message[:200]!r}"
    return None


def _reset_peak() -> int:
    """Forget the largest memory so far; returns what is in use now, in bytes (Linux)."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:  # else what was freed hides what is taken
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, key
    return int(found[1]) << 10
