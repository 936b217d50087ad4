"""The processes of a round agree on a name that an entry of an earlier round cannot match."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet

import pytest
from torch.distributed import HashStore, Store

from tinylm.system.rendezvous import agree_on_name


def meet(store: Store, ranks: list[int], world_size: int, timeout: float = 300) -> list[str]:
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(lambda rank: agree_on_name(store, rank, world_size, timeout), ranks))


def test_every_round_has_a_name_of_its_own():
    """torchrun keeps one store for all rounds. A process found the address of a killed one there, and every restart
    on two machines failed with "Connection refused".
    """
    store = HashStore()
    rounds = [meet(store, list(range(size)), size) for size in (3, 2, 1, 4)]
    assert all(len(set(names)) == 1 for names in rounds)
    assert len({names[0] for names in rounds}) == 4


def test_a_late_process_is_not_taken_for_the_one_before_it():
    """Process 0 comes first and answers an old call of an earlier process 1; then it must still answer the new one."""
    store = HashStore()
    meet(store, [0, 1], 2)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(agree_on_name, store, 0, 2, 300)
        with pytest.raises(NotYet):
            first.result(timeout=0.3)
        second = pool.submit(agree_on_name, store, 1, 2, 300)
        assert first.result() == second.result()


@pytest.mark.parametrize(("rank", "missing"), [(0, "process 1 did"), (1, "process 0 did")])
def test_a_timeout_names_the_missing_process(rank, missing):
    store = HashStore()
    meet(store, [0, 1], 2)
    with pytest.raises(TimeoutError, match=missing):
        meet(store, [rank], 2, timeout=0.1)
