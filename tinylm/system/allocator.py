"""Freed memory kept at hand on a CPU, instead of given back to the operating system after every step.

A training step frees all its activations and the next one asks for them again. glibc hands large blocks back at once,
and the system must then map and clear every page anew: some ten thousand page faults a step of the `tiny` preset, a
tenth of its time.
"""

from __future__ import annotations

import ctypes
import sys

# glibc's <malloc.h>: the parameters of mallopt.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Let the C library keep what this process frees, for its own next use; False where it cannot be told (not glibc).

    The process then holds on to the most it ever used, up to 2 GB of it in one piece.
    """
    # CDLL(None), the C library of this process itself, is an error on Windows.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    settings = {_M_MMAP_THRESHOLD: 2**30, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 2**26}
    return all([mallopt(name, value) == 1 for name, value in settings.items()])
