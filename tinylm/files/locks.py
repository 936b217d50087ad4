"""One run folder belongs to one run at a time."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def run_lock(path: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path` inside the block.

    It is the system that holds the lock, for the process and not for the file: when the process ends, however it ends,
    the lock is gone, and the file that stays behind means nothing. Between machines it works on file systems that pass
    locks on (NFS 4 and most of those made for clusters).

    Args:
        patience: seconds to wait for it. A lock of a machine that was lost goes only when the file server has noticed.

    Raises:
        ValueError: another process has it; the message names that process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        deadline = time.monotonic() + patience
        while not (is_ours := try_to_lock(file.fileno())) and time.monotonic() < deadline:
            time.sleep(0.2)
        if not is_ours:
            file.seek(0)
            owner = file.read(200).strip() or "another process"
            raise ValueError(
                f"{path.parent} belongs to a run that is still going ({owner}); wait for it or stop it, or choose "
                "another --output_dir"
            )
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def try_to_lock(descriptor: int) -> bool:
    """Lock an open file for this process, unless another has it; an OSError where the file system knows no locks."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, 1 << 20, os.SEEK_SET)  # a byte far behind the text, which others may still read
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
