"""How much memory a machine has, and how much of it this process uses."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

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
