"""Compute several micro-batches at a time on a CPU, each on its own cores, instead of one on all cores.

torch spreads each operation over the cores and then waits for the slowest. A tiny model's operations last a tenth of a
millisecond, so two cores used like this are worth about one and a half. A core with its own rows waits only once a
step. Python's global lock does not slow this down: torch releases it while an operation runs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

from tinylm.system.ordered_map import ordered_map

Item = TypeVar("Item")
Result = TypeVar("Result")


def num_cores(device: torch.device) -> int:
    """Threads that torch uses on a CPU (OMP_NUM_THREADS sets them); 1 on every other device."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def map_on_cores(
    function: Callable[[Item], Result], items: Iterable[Item], at_once: int
) -> Generator[Result, None, None]:
    """`map` that computes `at_once` items at a time; the results have the order of the items.

    Each item gets an equal share of the cores. `function` must not draw random numbers: which item gets which number
    would depend on timing.
    """
    cores = torch.get_num_threads()
    cores_each = max(1, cores // at_once)
    # The matrix library uses the main thread's number in all threads; everything else uses each thread's own.
    torch.set_num_threads(cores_each)
    try:
        yield from ordered_map(_threads(at_once, cores_each), function, items, ahead=2 * at_once)
    finally:
        torch.set_num_threads(cores)


@lru_cache(maxsize=4)
def _threads(at_once: int, cores_each: int) -> ThreadPoolExecutor:
    """A pool of threads. It is kept, because each new thread would repeat torch's set-up."""
    return ThreadPoolExecutor(
        at_once, thread_name_prefix="core", initializer=torch.set_num_threads, initargs=(cores_each,)
    )
