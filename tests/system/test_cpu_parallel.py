"""Work on several cores of a CPU: the order of the results, the threads of each worker, and the state afterwards."""

from __future__ import annotations

import threading

import pytest
import torch

from tinylm.system.cpu_parallel import map_on_cores, num_cores


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_from_two_threads_at_once(two_threads):
    both = threading.Barrier(2, timeout=300)  # passes only when two items are in work at the same time

    def work(item: int) -> tuple[int, int]:
        both.wait()
        return item, torch.get_num_threads()

    assert list(map_on_cores(work, range(6), 2)) == [(item, 1) for item in range(6)]
    assert torch.get_num_threads() == 2


def test_the_number_of_threads_comes_back_after_an_error(two_threads):
    def fail(item: int) -> None:
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 0"):
        list(map_on_cores(fail, range(2), 2))
    assert torch.get_num_threads() == 2


def test_only_a_cpu_has_cores(two_threads):
    assert num_cores(torch.device("cpu")) == 2
    assert num_cores(torch.device("meta")) == 1
