"""How the processes that torchrun starts find each other, also after a restart.

torchrun restarts all processes when one is lost or a machine joins. Each round of processes gets the same key-value
store (pytorch/pytorch#135712: the number of restarts does not identify a round, because every machine counts its own).
The store still holds the entries of earlier rounds, among them addresses. A process that reads an old address before it
is overwritten calls a process that has ended, and the new round fails. So the processes of a round first agree on a new
name, which only running processes can do, and keep all their entries under this name.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

POLL_SECONDS = 0.02


def fresh_store(address: str, port: int, rank: int, world_size: int, timeout: float) -> Store:
    """An empty key-value store, shared by the processes of this round.

    Args:
        address, port: of torchrun's store (MASTER_ADDR, MASTER_PORT).
        timeout: seconds to wait for the other processes.

    Raises:
        TimeoutError: some of them did not answer in time.
    """
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout))
    return PrefixStore(agree_on_name(store, rank, world_size, timeout), store)


def agree_on_name(store: Store, rank: int, world_size: int, timeout: float) -> str:
    """A new name, the same for all processes of this round.

    Process 0 makes it. Every other process writes a new random word under "call". It accepts only an answer that begins
    with this word, which no earlier process can have written, and confirms it under "heard". Process 0 keeps answering
    until all have confirmed, because the first call that it reads may be from an earlier round.

    Raises:
        TimeoutError: some of them did not answer in time.
    """
    deadline = time.monotonic() + timeout
    if rank != 0:
        word = uuid.uuid4().hex
        store.set(f"call/{rank}", word)
        while not (answer := _read(store, f"answer/{rank}")).startswith(word):
            _wait(deadline, timeout, [0])
        name = answer[len(word) :]
        store.set(f"heard/{rank}", name)
        return name
    name = uuid.uuid4().hex
    missing = set(range(1, world_size))
    while missing:
        for other in missing:
            if call := _read(store, f"call/{other}"):
                store.set(f"answer/{other}", call + name)
        missing = {other for other in missing if _read(store, f"heard/{other}") != name}
        if missing:
            _wait(deadline, timeout, sorted(missing))
    return name


def _read(store: Store, key: str) -> str:
    """The value of a key, or "" if it is not set; `get` alone would wait for it."""
    return store.get(key).decode() if store.check([key]) else ""


def _wait(deadline: float, timeout: float, missing: list[int]) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"process {', '.join(map(str, missing))} did not answer within {timeout:g} s")
    time.sleep(POLL_SECONDS)
