"""Keep freed memory in the process on a CPU, instead of returning it to the operating system after every step.

A training step frees all its activations, and the next step allocates them again. glibc returns large blocks to the
system at once, which must then map and clear every page again: about ten thousand page faults in a step of the `tiny`
preset, a tenth of its time.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

# glibc's <malloc.h>: the parameters of mallopt.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Let the C library keep the memory that this process frees; False if it is not glibc, which has this setting.

    The process then keeps the most memory that it ever used, up to 2 GB in one block.
    """
    mallopt = _glibc("mallopt")
    if mallopt is None:
        return False
    settings = {_M_MMAP_THRESHOLD: 2**30, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 2**26}
    return all([mallopt(name, value) == 1 for name, value in settings.items()])


def give_back_freed_memory() -> None:
    """Return what was kept to the system, before something else than a step needs memory.

    Each thread keeps memory of its own. What the threads of a step have freed is of no use to the main thread.
    """
    if (malloc_trim := _glibc("malloc_trim")) is not None:
        malloc_trim(ctypes.c_size_t(0))


def _glibc(name: str) -> Any:
    """A function of the C library, None if this is not glibc. (CDLL(None), this process, is an error on Windows.)"""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
