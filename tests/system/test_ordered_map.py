"""A map over threads: the order of its results, how far it reads ahead, and the state afterwards."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest

from tinylm.system.ordered_map import ordered_map


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as threads:
        yield threads


def test_results_come_in_the_order_of_the_items(executor: ThreadPoolExecutor) -> None:
    """Even when later items finish first."""
    second_is_done = threading.Event()

    def work(item: int) -> str:
        if item == 0:
            assert second_is_done.wait(300)
        if item == 1:
            second_is_done.set()
        return f"ü{item}"

    assert list(ordered_map(executor, work, range(7), ahead=3)) == [f"ü{item}" for item in range(7)]


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_no_more_items_are_read_than_may_be_ahead(executor: ThreadPoolExecutor, ahead: int) -> None:
    """Holds for an endless iterator too."""
    read = []

    def items() -> Iterator[int]:
        for item in count():
            read.append(item)
            yield item

    results = ordered_map(executor, lambda item: 3 * item, items(), ahead)
    assert read == []
    for number in range(20):
        assert next(results) == 3 * number
        assert len(read) == number + ahead
    results.close()


def test_an_error_comes_in_its_items_place(executor: ThreadPoolExecutor) -> None:
    def work(item: int) -> int:
        if item == 2:
            raise ValueError(f"item {item}")
        return item

    results = ordered_map(executor, work, count(), ahead=4)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="item 2"):
        next(results)
    assert list(ordered_map(executor, str, range(3), ahead=2)) == ["0", "1", "2"], "the executor can be used again"


@pytest.mark.parametrize("how", ["closed", "an item fails", "reading fails"])
def test_no_item_runs_afterwards(executor: ThreadPoolExecutor, how: str) -> None:
    """Items that have started are waited for; the others never start. All 800 items would take a minute."""
    begun, done = [], []
    in_work = threading.Event()
    three_have_begun = threading.Barrier(3, action=in_work.set, timeout=300)

    def work(item: int) -> int:
        if item == 0:
            return item
        begun.append(item)
        if item <= 3:
            three_have_begun.wait()
            if how == "an item fails" and item == 1:
                raise ValueError("ü")
        time.sleep(0.2)
        done.append(item)
        return item

    def items() -> Iterator[int]:
        yield from range(900)
        assert in_work.wait(300)
        raise ValueError("ü")

    results = ordered_map(executor, work, items(), ahead=2000 if how == "reading fails" else 800)
    if how == "closed":
        assert next(results) == 0
        assert in_work.wait(300)
        results.close()
    else:
        with pytest.raises(ValueError, match="ü"):
            list(results)
    failed = {1} if how == "an item fails" else set()
    assert set(begun) - failed == set(done), "an item was still in work"
    assert len(begun) < 800, "an item began after the end"
