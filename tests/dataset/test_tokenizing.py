"""How many processes work side by side."""

from __future__ import annotations

import os

import pytest

from tinylm.dataset.shards import tokenizing
from tinylm.dataset.shards.tokenizing import available_cores, process_map


@pytest.mark.parametrize(
    ("local_world_size", "num_tasks", "cores"),
    [(None, None, 12), ("1", None, 12), ("4", None, 3), ("4", 2, 6), ("4", 1, 12), ("4", 99, 3), ("99", None, 1)]
    + [("0", None, 12), ("many", None, 12), ("4", 0, 12)],
)
def test_processes_on_a_machine_share_its_cores(
    monkeypatch: pytest.MonkeyPatch, local_world_size: str | None, num_tasks: int | None, cores: int
) -> None:
    """Two of them on two cores once started four workers. One file is one process's work, and so are all cores."""
    monkeypatch.setattr(tokenizing.os, "sched_getaffinity", lambda process: set(range(12)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local_world_size is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local_world_size)
    assert available_cores(num_tasks) == cores


@pytest.mark.parametrize("num_processes", [0, 1])
@pytest.mark.parametrize("before", ["true", None])
def test_one_process_keeps_to_one_core(monkeypatch: pytest.MonkeyPatch, num_processes: int, before: str | None) -> None:
    """Two processes with a core each once ran four threads, and were slower than one."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    if before is None:
        monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    with process_map(lambda chunk: os.environ.get("TOKENIZERS_PARALLELISM"), (), num_processes) as map_chunks:
        found = list(map_chunks([1]))
    assert found == ["false" if num_processes else before]
    assert os.environ.get("TOKENIZERS_PARALLELISM") == before
