"""Claims on shards: only one process at a time makes a shard, whatever run it belongs to.

A claim is a lock on a file beside the shard. The system releases it when its process ends for any reason.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tinylm.files.atomic import remove_leftovers
from tinylm.files.locks import try_to_lock


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[bool | None]:
    """Claim a shard for the block.

    True: this process has the claim. False: another one has it. None: the disk has no locks, so this is unknown. Then
    two processes may do the same work, and the later result replaces the equal earlier one.
    """
    path = folder.with_name(f".{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        is_ours: bool | None = None
        with contextlib.suppress(OSError):
            is_ours = try_to_lock(file.fileno())
        if is_ours and not _is_still(path, file.fileno()):
            is_ours = False  # its owner removed the file after we opened it; others make a new one
        try:
            yield is_ours
        finally:
            if is_ours is not False:
                with contextlib.suppress(OSError):  # another process may have removed it or hold it open
                    path.unlink()


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether `path` is the name of this open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def sweep(shards: Path) -> None:
    """Remove what killed processes have left in a folder of shards: unfinished shards, and claims that nobody holds."""
    leftovers = [*shards.glob(".*.*.tmp"), *shards.glob(".*.*.old"), *shards.glob(".*.lock")]
    for name in {leftover.name.split(".")[1] for leftover in leftovers}:
        with claim(shards / name) as is_ours:
            if is_ours:
                remove_leftovers(shards / name)
