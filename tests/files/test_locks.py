"""A run folder has one owner; whoever goes on after a loss may have to wait until the system knows of the loss."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from tinylm.files.locks import run_lock

HOLD = """
import sys, time
from pathlib import Path
from tinylm.files.locks import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def held(tmp_path, repository):
    """A lock that another process holds for a second."""
    path = tmp_path / "out" / ".lock"
    command = [sys.executable, "-c", HOLD, str(path), "1"]
    with subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield path
        process.wait()


def test_a_second_run_is_refused_at_once(held):
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"belongs to a run that is still going \(process \d+ on "), run_lock(held):
        pass
    assert time.monotonic() - start < 0.5


def test_a_restarted_run_waits_for_the_lock_of_the_lost_one(held):
    """A file server gives the lock of a lost machine back after a minute or so, and three restarts were used up."""
    with run_lock(held, patience=20):
        assert "process" in held.read_text()
