"""The cores of a CPU, working side by side: several micro-batches at a time instead of one spread over all.

torch spreads each operation over the cores and waits for the slowest at the end of each; a tiny model's operations
last a tenth of a millisecond, so two cores are worth about one and a half. A core that has rows of its own waits once
a step.
Python's lock is no hindrance: torch lets go of it while an operation runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def num_cores(device: torch.device) -> int:
    """Threads that torch uses on a CPU (OMP_NUM_THREADS sets them); 1 on every other device."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def map_on_cores(function: Callable[[Item], Result], items: Iterable[Item], num_workers: int) -> Iterator[Result]:
    """`map`, with `num_workers` items in work at a time; the results come in the order of the items.

    The cores are dealt out evenly among the workers. `function` must not draw random numbers: which item would get
    which is left to chance.
    """
    cores = torch.get_num_threads()
    threads_each = max(1, cores // num_workers)
    # The main thread's number counts for the matrix library of all threads, the workers' own for everything else.
    torch.set_num_threads(threads_each)
    try:
        yield from _workers(num_workers, threads_each).map(function, items)
    finally:
        torch.set_num_threads(cores)


@lru_cache(maxsize=4)
def _workers(num_workers: int, threads_each: int) -> ThreadPoolExecutor:
    """Threads are made once: a new one would pay for torch's own set-up again."""
    return ThreadPoolExecutor(
        num_workers, thread_name_prefix="core", initializer=torch.set_num_threads, initargs=(threads_each,)
    )
