"""Keep freed memory in the process on a CPU, instead of returning it to the operating system after every step.

A training step frees all its activations, and the next step allocates them again. glibc returns large blocks to the
system at once, which must then map and clear every page again: about ten thousand page faults in a step of the `tiny`
preset, a tenth of its time.
"""

from __future__ import annotations

import ctypes
import sys

# glibc's <malloc.h>: the parameters of mallopt.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Let the C library keep the memory that this process frees; False if it is not glibc, which has this setting.

    The process then keeps the most memory that it ever used, up to 2 GB in one block.
    """
    # CDLL(None), the C library of this process, is an error on Windows.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    settings = {_M_MMAP_THRESHOLD: 2**30, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 2**26}
    return all([mallopt(name, value) == 1 for name, value in settings.items()])
