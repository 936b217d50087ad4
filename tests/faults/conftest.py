"""What the tests of faults share: the shim that makes system calls fail, runs by command, and the table of results."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import HERE, Commands, Stages, python_environment

RESULTS = pytest.StashKey[dict[str, Counter]]()


def lacking(what: str) -> None:
    """Skip, and say why; where everything must run, fail."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"this test needs {what}")
    pytest.skip(f"needs {what}")


@pytest.fixture
def tally(request) -> Callable[[str, int, int], None]:
    """(fault, times tried, times something was lost) -> a row of the table that is printed at the end."""
    results = request.config.stash.setdefault(RESULTS, {})

    def add(fault: str, tried: int, lost: int) -> None:
        results.setdefault(fault, Counter()).update(tried=tried, lost=lost)

    return add


def pytest_terminal_summary(terminalreporter, config) -> None:
    if rows := config.stash.get(RESULTS, {}):
        terminalreporter.section("faults")
        for fault, counts in rows.items():
            terminalreporter.write_line(f"| {fault} | {counts['tried']:,} | {counts['lost']:,} |")


@pytest.fixture(scope="session")
def shim(tmp_path_factory) -> Path:
    """The compiled shim.c."""
    if sys.platform != "linux":
        pytest.skip("system calls are counted on Linux only")
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        lacking("a C compiler (cc, gcc or clang)")
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, HERE / "shim.c"], check=True)
    return library


@pytest.fixture(scope="session")
def commands(shim, repository, tmp_path_factory) -> Iterator[Commands]:
    """Starts `tinylm ...` in processes of their own."""
    with Commands(python_environment(repository, shim), tmp_path_factory.mktemp("logs")) as started:
        yield started


@pytest.fixture(scope="session")
def stages(commands, tmp_path_factory) -> Stages:
    """The four stages in miniature, with the data and the parents they need."""
    return Stages(commands, tmp_path_factory.mktemp("stages"))
