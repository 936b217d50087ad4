"""How a command ends: signals, and the only place where an exception becomes a line and an exit status.

0 done · 1 failed while running · 2 the user's mistake · 128 + n stopped by signal n: 130 Ctrl-C, 143 SIGTERM,
138 SIGUSR1 (how batch systems announce that a machine is taken away)
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

RESUME_ADVICE = "run the same command with --resume"
RERUN_ADVICE = "run the same command again to go on"
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Stopped(KeyboardInterrupt):
    """A stop that a signal asked for, raised like Ctrl-C so that the same clean-up runs."""

    def __init__(self, signum: int, where: str = "") -> None:
        super().__init__(where)
        self.signum, self.where = signum, where


class StopRequest:
    """Inside the block a signal of `STOP_SIGNALS` asks to stop at the next good moment; a second one stops at once.

    Read `signum`: 0 until a signal has come. Only the main thread may say what a signal does; in another one the block
    changes nothing.
    """

    def __init__(self) -> None:
        self.signum = 0

    def __enter__(self) -> StopRequest:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # None: set by other than Python, which cannot put it back
                signal.signal(number, handler)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            os._exit(128 + signum)  # nothing is half written: what is being saved has not got its name yet
        self.signum = signum


_USER_MISTAKES = (
    ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError
)  # fmt: skip
_ADVICE = {
    errno.EACCES: "Permission denied; choose another path, or change its permissions",
    errno.EROFS: "Read-only file system; choose another path",
    errno.EEXIST: "File exists, where a folder is expected; choose another path",
    errno.ENOTDIR: "Not a directory: a part of this path is a file; choose another path",
    errno.ELOOP: "its symbolic links lead round in a circle; correct them, or choose another path",
}
"""The system's words for an error of a path, where they do not say what to do."""


def run_main(function: Callable[[list[str]], int], argv: list[str] | None = None, advice: str = RESUME_ADVICE) -> int:
    """Call a command's `main` and turn whatever it raises into one line on stderr and an exit status.

    Status 2 for the user's mistakes (ValueError, a path that cannot be used), 128 + n for
    signal n, 1 for the rest. With --debug among the arguments the traceback is printed first.

    Args:
        function: `main(argv) -> status`.
        argv: the arguments; those of the process when None.
        advice: how to go on after an interruption, if the command can.
    """
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    _open_closed_streams()
    try:
        with _sigterm_raises():
            status = function([word for word in argv if word != "--debug"])
            sys.stdout.flush()
            return status
    except KeyboardInterrupt as stop:
        number = stop.signum if isinstance(stop, Stopped) else signal.SIGINT
        message = f"stopped{getattr(stop, 'where', '')}" + f"; {advice}" * bool(advice)
        return _report(message, 128 + number, debug)
    except BrokenPipeError:
        # the reader has left (`tinylm eval | head`); a closed stdout must not fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, as when the system stops a program that writes to nobody
    except Exception as error:
        if isinstance(error, _USER_MISTAKES) or (isinstance(error, OSError) and error.errno == errno.ELOOP):
            return _report(f"error: {_one_line(error)}", 2, debug)
        kind = "" if type(error) in (RuntimeError, OSError) else f"{type(error).__name__}: "
        return _report(f"error: {kind}{_one_line(error)}", 1, debug)


def _open_closed_streams() -> None:
    """Where a service or a shell has closed standard input or output, there is nothing to read and nobody to read."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM is an exception inside the block, like Ctrl-C, and afterwards what it was to the caller before.

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
    raise Stopped(signum)


def _report(message: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"tinylm: {message}", file=sys.stderr)
    return status


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        words = _ADVICE.get(error.errno or 0, error.strerror)
        return f"{_known_name(error.filename)}: {words}" if error.filename is not None else words
    return " ".join(str(error).split())


def _known_name(name: str | bytes | int) -> str:
    """A path that the user knows: of a temporary file the one that it would have become."""
    path = Path(os.fsdecode(name)) if not isinstance(name, int) else Path(str(name))
    return str(path.with_name(path.name[1:].rsplit(".", 2)[0]) if path.name.endswith(".tmp") else path)
