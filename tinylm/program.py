"""How a command ends: the only place where an exception becomes a line on the terminal and an exit status."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn


class _Terminated(KeyboardInterrupt):
    """SIGTERM, raised like Ctrl-C so that the same clean-up runs."""


_USER_MISTAKES = (
    ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError
)  # fmt: skip
_ADVICE = {
    errno.EEXIST: "File exists, where a folder is expected; choose another path",
    errno.ENOTDIR: "Not a directory: a part of this path is a file; choose another path",
    errno.ELOOP: "its symbolic links lead round in a circle; correct them, or choose another path",
}
"""The system's words for an error of a path, where they do not say what to do."""


def run_main(function: Callable[[list[str]], int], argv: list[str] | None = None, resumable: bool = True) -> int:
    """Call a command's `main` and turn whatever it raises into one line on stderr and an exit status.

    Status 2 for the user's mistakes (ValueError, a path that cannot be used), 130 for Ctrl-C, 143 for
    SIGTERM, 1 for the rest. With --debug among the arguments the traceback is printed first.

    Args:
        function: `main(argv) -> status`.
        argv: the arguments; those of the process when None.
        resumable: whether the command knows --resume, which an interruption then mentions.
    """
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    try:
        with _sigterm_raises():
            status = function([word for word in argv if word != "--debug"])
            sys.stdout.flush()
            return status
    except KeyboardInterrupt as stop:
        message = "stopped; run the same command with --resume" if resumable else "stopped"
        return _report(message, 143 if isinstance(stop, _Terminated) else 130, debug)
    except BrokenPipeError:
        # the reader has left (`tinylm eval | head`); a closed stdout must not fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, as when the system stops a program that writes to nobody
    except Exception as error:
        if isinstance(error, _USER_MISTAKES) or (isinstance(error, OSError) and error.errno == errno.ELOOP):
            return _report(f"error: {_one_line(error)}", 2, debug)
        kind = "" if type(error) in (RuntimeError, OSError) else f"{type(error).__name__}: "
        return _report(f"error: {kind}{_one_line(error)}", 1, debug)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM is an exception inside the block, and afterwards what it was to the caller before.

    Only the main thread may say what a signal does; in another one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        yield
    finally:
        if before is not None:  # None: set by other than Python, which cannot put it back
            signal.signal(signal.SIGTERM, before)


def _raise_terminated(signum: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


def _report(message: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"tinylm: {message}", file=sys.stderr)
    return status


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        words = _ADVICE.get(error.errno or 0, error.strerror)
        return f"{error.filename}: {words}" if error.filename is not None else words
    return " ".join(str(error).split())
