"""Locks on files: one run folder belongs to one run at a time, and one process at a time changes the cache.

The `filelock` library uses locks of the operating system (flock, LockFileEx). The system frees such a lock when its
process ends for whatever reason. A lock file without a lock on it means nothing.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout, lock_descriptor

POLL_SECONDS = 0.2


@contextlib.contextmanager
def file_lock(path: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path` inside the block.

    Between machines it works on file systems that share locks: NFS 4 and most file systems made for clusters.

    Args:
        patience: seconds to wait for the lock. A file server frees the lock of a lost machine only when it notices the
            loss.

    Raises:
        TimeoutError: another process has the lock.
        OSError: the file cannot be made, or its file system does not support locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(
        path,
        timeout=patience,
        poll_interval=POLL_SECONDS,
        on_acquired=_write_owner,
        fallback_to_soft=False,  # a lock that is only a file would outlive a killed process
        preserve_lock_file=True,  # if it were deleted, two processes could lock two files of the same name
    )
    try:
        lock.acquire()
    except Timeout:
        raise TimeoutError(f"{path} is held by {_owner(path)}") from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def run_lock(path: Path, patience: float = 0.0) -> Iterator[None]:
    """`file_lock` for a run's folder.

    Raises:
        ValueError: another process has the lock; the message names that process.
        OSError: as `file_lock`.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(file_lock(path, patience))
        except TimeoutError:
            raise ValueError(
                f"{path.parent} is in use by another run ({_owner(path)}); wait for it to end, stop it, or choose "
                "another --output_dir"
            ) from None
        yield


def try_to_lock(descriptor: int) -> bool:
    """Lock an open file until it is closed; False if another process has it.

    Raises:
        OSError: the file system does not support locks.
    """
    return lock_descriptor(descriptor, blocking=False)


def _write_owner(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())


def _owner(path: Path) -> str:
    """What the owner of a lock wrote into its file; on Windows other processes cannot read it."""
    with contextlib.suppress(OSError), path.open(encoding="utf-8", errors="replace") as file:
        if owner := file.read(200).strip():
            return owner
    return "another process"
