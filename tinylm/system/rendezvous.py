"""How the processes of a torchrun meet, again and again.

torchrun starts all processes anew when one is lost or a machine joins, and hands them the same key-value store each
time (pytorch/pytorch#135712: the number of restarts cannot tell the rounds apart, since every machine counts its own).
What the processes before have left there still stands in it, their addresses among it: whoever reads those before they
are overwritten calls a process that is no more, and the new round fails. So each round agrees on a name of its own
first, under which it keeps everything, and which only living processes can have agreed on.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

POLL_SECONDS = 0.02


def fresh_store(address: str, port: int, rank: int, world_size: int, timeout: float) -> Store:
    """A key-value store that holds nothing yet, shared by the processes of this round.

    Args:
        address, port: of torchrun's store (MASTER_ADDR, MASTER_PORT).
        timeout: seconds to wait for the other processes.

    Raises:
        TimeoutError: they did not come.
    """
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout))
    return PrefixStore(agree_on_name(store, rank, world_size, timeout), store)


def agree_on_name(store: Store, rank: int, world_size: int, timeout: float) -> str:
    """A name that all processes of this round get, and none that came before.

    Process 0 invents it. The others each call with a word that nobody has used before, and believe only an answer that
    repeats it, which a process that is no more cannot give; then they say that they have heard. Process 0 goes on
    answering until all have, since the call it saw first may be a left-over one.
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
    """The value of a key, or "" if there is none; `get` would wait for one."""
    return store.get(key).decode() if store.check([key]) else ""


def _wait(deadline: float, timeout: float, missing: list[int]) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"process {', '.join(map(str, missing))} did not come within {timeout:g} s")
    time.sleep(POLL_SECONDS)
