"""How much memory a machine has, how much of it this process uses, and what happens when there is none left."""

from __future__ import annotations

import contextlib
import gc
import os
from pathlib import Path

import torch

_OUT_OF_MEMORY_TEXTS = (
    "can't allocate memory", "not enough memory", "out of memory", "_ALLOC_FAILED", "bad_alloc",
    "could not create a primitive",  # oneDNN got no memory for generated code; after that, this process gets none
)  # fmt: skip
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_limit(device: torch.device) -> int | None:
    """Bytes of memory that the device has: a GPU's own, or the machine's, or what a container may use of it.

    None if the system does not say.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    sizes = []
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for name in _CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no limit
            sizes.append(int(Path(name).read_text()))
    return min(sizes, default=None)


def used_memory(device: torch.device) -> int:
    """Bytes of the device's memory that this process uses now; 0 if the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    with contextlib.suppress(OSError, ValueError, IndexError):  # Linux: total and resident pages
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error`, or one of the errors behind it, says that memory could not be had.

    torch has a class for GPUs only; the CPU's allocator, MPS and CUDA's libraries say it in the text of a RuntimeError.
    """
    return any(
        isinstance(each, (torch.OutOfMemoryError, MemoryError))
        or (isinstance(each, RuntimeError) and any(text in str(each) for text in _OUT_OF_MEMORY_TEXTS))
        for each in errors_behind(error)
    )


def errors_behind(error: BaseException) -> list[BaseException]:
    """`error`, the error that it was raised from, the one behind that, and so on.

    torch.compile keeps that error in an attribute. An error that was only being handled at the time is not meant.
    """
    found: list[BaseException] = []
    behind: BaseException | None = error
    while behind is not None and behind not in found:
        found.append(behind)
        behind = getattr(behind, "inner_exception", None) or behind.__cause__
    return found


def free_memory(device: torch.device) -> None:
    """Free what only Python's garbage collector finds, and give a GPU's free blocks back: larger ones may then fit."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
