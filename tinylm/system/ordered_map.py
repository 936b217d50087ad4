"""`map` over an executor (threads or processes) that keeps the order of the items and limits how many are in work."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(
    executor: Executor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Generator[Result, None, None]:
    """Yield `function(item)` for each item, computed by `executor`, in the order of the items.

    The items are read lazily, so they may be endless or larger than memory. When the generator ends (no more items, a
    failed item, or closed by the consumer), no item is in work any more, and the executor can be used again.

    Args:
        ahead: how many items are submitted at a time, at least 1. This counts the items in work and the results that
            wait for their turn.

    Raises:
        Exception: what `function` raises for an item, when that item's turn comes, or what reading the items raises.
    """
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        wait(pending)
