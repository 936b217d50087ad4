"""The cores of a CPU side by side: several micro-batches at a time, instead of one spread over all cores.

torch spreads each operation over the cores and at its end waits for the slowest. A tiny model's operations last a
tenth of a millisecond, so two cores used like this are worth about one and a half. A core that has rows of its own
waits only once a step.
Python's global lock does not slow this down: torch releases it while an operation runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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


def map_on_cores(function: Callable[[Item], Result], items: Iterable[Item], at_once: int) -> Iterator[Result]:
    """`map`, with `at_once` items in work at a time; the results come in the order of the items.

    The cores are dealt out evenly among these. `function` must not draw random numbers, because which item would get
    which is left to chance.
    """
    cores = torch.get_num_threads()
    cores_each = max(1, cores // at_once)
    # The main thread's number counts for the matrix library of all threads, each thread's own for everything else.
    torch.set_num_threads(cores_each)
    try:
        yield from ordered_map(_threads(at_once, cores_each), function, items, ahead=2 * at_once)
    finally:
        torch.set_num_threads(cores)


@lru_cache(maxsize=4)
def _threads(at_once: int, cores_each: int) -> ThreadPoolExecutor:
    """The threads are kept, because each new one would repeat torch's own set-up."""
    return ThreadPoolExecutor(
        at_once, thread_name_prefix="core", initializer=torch.set_num_threads, initargs=(cores_each,)
    )
