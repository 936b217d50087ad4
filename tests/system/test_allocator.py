"""Freed memory is used again without asking the system for more, and is given back on request."""

from __future__ import annotations

import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource, torch
from tinylm.system.allocator import keep_freed_memory
if not {keep}:
    pass
elif not keep_freed_memory():
    raise SystemExit("no glibc")
def use():
    blocks = [torch.ones(10_000_000) for _ in range(2)]
for _ in range(15):  # the heap grows to its size in a few rounds
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(keep: bool) -> int:
    """Page faults when 80 MB are allocated ten times, after they were freed."""
    run = subprocess.run([sys.executable, "-c", COUNT_FAULTS.format(keep=keep)], capture_output=True, text=True)
    if "no glibc" in run.stderr:
        pytest.skip("this system's C library is not glibc")
    return int(run.stdout)


def test_freed_memory_is_not_given_back():
    assert page_faults(keep=False) > 50_000
    assert page_faults(keep=True) < 5_000


IN_THREADS = """
import threading, torch
from tinylm.system.allocator import give_back_freed_memory, keep_freed_memory
from tinylm.system.memory import used_memory
keep_freed_memory()
def use():
    blocks = [torch.ones(1_000_000) for _ in range(50)]
before = used_memory(torch.device("cpu"))
threads = [threading.Thread(target=use) for _ in range(2)]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
kept = used_memory(torch.device("cpu")) - before
give_back_freed_memory()
print(kept, used_memory(torch.device("cpu")) - before)
"""


def test_what_threads_have_freed_is_given_back_on_request():
    run = subprocess.run([sys.executable, "-c", IN_THREADS], capture_output=True, text=True, check=True)
    kept, left = map(int, run.stdout.split())
    if kept < 100e6:
        pytest.skip("this system's C library gives freed memory back by itself")
    assert left < 50e6
