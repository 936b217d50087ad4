"""A run folder has one owner. After a machine is lost, its lock may last until the system notices the loss."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinylm.files.locks import run_lock, try_to_lock

HOLD = """
import os, sys
from pathlib import Path
from tinylm.files.locks import run_lock
with run_lock(Path(sys.argv[1])):
    if sys.argv[2:] == ["fork"] and os.fork() == 0:
        sys.stdin.readline()
        os._exit(0)
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextlib.contextmanager
def hold(path: Path, repository: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock until its standard input is closed; with `fork` a child of it waits too."""
    command, pipe = [sys.executable, "-c", HOLD, str(path), *words], subprocess.PIPE
    with subprocess.Popen(command, cwd=repository, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "naïve 模型" / ".lock"


@pytest.fixture
def holder(path: Path, repository: Path) -> Iterator[subprocess.Popen[str]]:
    with hold(path, repository) as process:
        yield process


def test_a_second_run_is_refused_at_once(path: Path, holder: subprocess.Popen[str], monkeypatch) -> None:
    owner = rf"is in use by another run \(process {holder.pid} on {socket.gethostname()}\); wait for it"
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits"))
    for _ in range(2):  # a refused process leaves the owner's name in the file
        with pytest.raises(ValueError, match=owner), run_lock(path):
            pass
    with path.open("rb") as file:
        assert not try_to_lock(file.fileno())


def test_a_restarted_run_waits_for_the_lock_of_the_lost_one(
    path: Path, holder: subprocess.Popen[str], monkeypatch
) -> None:
    """A file server releases the lock of a lost machine after about a minute; by then three restarts had failed."""
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            holder.communicate()

    monkeypatch.setattr(time, "sleep", sleep)
    with run_lock(path, patience=300):
        assert path.read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    assert len(slept) == 3
    with path.open("rb") as file:  # the file is still there, but does not count as a lock
        assert try_to_lock(file.fileno())


def test_waiting_for_a_lock_ends(path: Path, holder: subprocess.Popen[str]) -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match="is in use by another run"), run_lock(path, patience=0.4):
        pass
    assert 0.4 <= time.monotonic() - start < 300


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_killed_owner_loses_its_lock_although_its_child_lives(path: Path, repository: Path) -> None:
    """A forked child keeps its parent's files open, and so flock's locks. It lives until the pipe closes."""
    with hold(path, repository, "fork") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with run_lock(path, patience=60):
            pass


def test_a_name_longer_than_the_next_leaves_nothing_behind(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("process 1234567890 on " + "x" * 300)
    with run_lock(path):
        assert path.read_text() == f"process {os.getpid()} on {socket.gethostname()}"


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_an_error_and_no_lock_of_another_kind(
    path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library could fall back to a lock that is only a file; such a lock remains after a killed process."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError) as caught, run_lock(path):
        pass
    assert caught.value.errno == code
    with path.open("rb") as file, pytest.raises(OSError):
        try_to_lock(file.fileno())
