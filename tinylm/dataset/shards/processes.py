"""Work spread over processes, with results in order. Threads would wait: the edges of tokenising are Python.

Processes are spawned, not forked: a fork of a process that runs torch's threads or holds a GPU can hang. So
the functions sent here live in modules that do not import torch, and a worker starts in a fraction of a
second.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def available_cores(num_tasks: int | None = None) -> int:
    """Processor cores for this process; a container or `taskset` may allow fewer than the machine has.

    Processes that torchrun starts side by side on one machine (LOCAL_WORLD_SIZE of them) share its cores out, or as
    many of them as there are tasks, where that is known and each task is for one of them.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = os.environ.get("LOCAL_WORLD_SIZE", "1")
    sharers = int(text) if text.isdigit() else 1
    return max(1, cores // max(1, sharers if num_tasks is None else min(sharers, num_tasks)))


def chunked(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def map_in_order(
    function: Callable[..., Result], shared: Sequence[Any], chunks: Iterable[Item], num_workers: int
) -> Generator[Result, None, None]:
    """`function(*shared, chunk)` for each chunk, in order; at most two chunks a worker are in memory.

    Args:
        function: at the top level of a module that does not import torch.
        shared: sent once to each worker, for example the tokenizer.
        num_workers: processes; 1 works in this process, on one core, and 0 in this process on as many as it likes.
    """
    if num_workers <= 1 or not _can_spawn():
        with _one_core() if num_workers == 1 else contextlib.nullcontext():
            for chunk in chunks:
                yield function(*shared, chunk)
        return
    pending: deque[Future[Result]] = deque()
    executor = ProcessPoolExecutor(
        num_workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_set_shared,
        initargs=(function, tuple(shared)),
    )
    try:
        for chunk in chunks:
            pending.append(executor.submit(_call, chunk))
            if len(pending) >= 2 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _can_spawn() -> bool:
    """A spawned process imports the main program again, which fails when that was typed in or piped in."""
    if multiprocessing.current_process().daemon:
        return False
    main = sys.modules["__main__"]
    if getattr(main, "__spec__", None) is not None:
        return True
    path = getattr(main, "__file__", None)
    return path is not None and os.path.exists(path)


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    """Keep `tokenizers` from starting a thread a core, where each core has a process of its own."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


_shared: tuple[Callable[..., Any], tuple[Any, ...]] | None = None


def _set_shared(function: Callable[..., Any], shared: tuple[Any, ...]) -> None:
    global _shared
    _shared = (function, shared)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core is enough


def _call(chunk: Any) -> Any:
    assert _shared is not None
    function, shared = _shared
    return function(*shared, chunk)
