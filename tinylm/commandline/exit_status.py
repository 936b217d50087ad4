"""How a command ends: signals, and the only place that turns an exception into a line and an exit status.

0 done · 1 failed while running · 2 the user's mistake · 128 + n stopped by signal n: 130 Ctrl-C, 143 SIGTERM,
138 SIGUSR1 (batch systems send it before they take a machine away), 141 nobody reads the output any more
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

CONTROL_CHARACTERS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""Removed before text is sent to a terminal: a file's name or an answer could move the cursor or change the title."""

RESUME_ADVICE = "run the same command with --resume"
RERUN_ADVICE = "run the same command again to continue"
CLOSED_PIPE = 13
"""SIGPIPE, whose number Windows lacks. A program that it ends has the status 141."""
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Stopped(KeyboardInterrupt):
    """Raised after a signal that asks to stop. It is a KeyboardInterrupt, so that the same clean-up runs."""

    def __init__(self, signum: int, where: str = "") -> None:
        super().__init__(where)
        self.signum, self.where = signum, where


class StopRequest:
    """Inside the block, a signal of `STOP_SIGNALS` sets `signum`, and the program stops when it is ready.

    A second signal ends the process at once. `signum` is 0 until a signal arrives. Only the main thread may set signal
    handlers; in other threads the block changes nothing.

    Args:
        acknowledge: called once, in a thread of its own, when the first signal arrives: the main thread may be in the
            middle of printing.
    """

    def __init__(self, acknowledge: Callable[[], None] = lambda: None) -> None:
        self.signum = 0
        self.acknowledge = acknowledge

    def __enter__(self) -> StopRequest:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # None: not set by Python, which cannot restore it
                signal.signal(number, handler)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            os._exit(128 + signum)  # no file is left half written: one that is being saved still has a temporary name
        self.signum = signum
        threading.Thread(target=self.acknowledge, name="acknowledge", daemon=True).start()

    def ask_because_of_closed_pipe(self) -> None:
        """Ask to stop because the reader of the output has gone, as SIGPIPE ends other programs."""
        self.signum = self.signum or CLOSED_PIPE


_USER_MISTAKES = (
    ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError
)  # fmt: skip
_ADVICE = {
    errno.EACCES: "Permission denied; choose another path, or change its permissions",
    errno.EROFS: "Read-only file system; choose another path",
    errno.EEXIST: "File exists, where a folder is expected; choose another path",
    errno.ENOTDIR: "Not a directory: a part of this path is a file; choose another path",
    errno.ELOOP: "its symbolic links form a loop; correct them, or choose another path",
}
"""Our text for the system's path errors, because the system's own text does not say what to do."""


def run_main(function: Callable[[list[str]], int], argv: list[str] | None = None, advice: str = RESUME_ADVICE) -> int:
    """Call a command's `main` and turn every exception into one line on stderr and an exit status.

    The status is 2 for the user's mistakes (ValueError, a path that cannot be used), 128 + n for signal n, and 1 for
    all other errors. With --debug among the arguments, the traceback is printed first.

    Args:
        function: `main(argv) -> status`.
        argv: the arguments; None takes those of the process.
        advice: how to continue after an interruption, if the command can.
    """
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    _prepare_streams()
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
        # the reader has ended (`tinylm eval | head`); stdout must not fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + CLOSED_PIPE
    except Exception as error:
        if isinstance(error, _USER_MISTAKES) or (isinstance(error, OSError) and error.errno == errno.ELOOP):
            return _report(f"error: {_one_line(error)}", 2, debug)
        kind = "" if type(error) in (RuntimeError, OSError) else f"{type(error).__name__}: "
        return _report(f"error: {kind}{_one_line(error)}", 1, debug)


def _prepare_streams() -> None:
    """Open the null device for each standard stream that a service or a shell has closed; let stdout take any text."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may hold bytes that no encoding has
        sys.stdout.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Inside the block, SIGTERM raises an exception, as Ctrl-C does. Afterwards the caller's handler is restored.

    Only the main thread may set signal handlers; in other threads the block changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        yield
    finally:
        if before is not None:  # None: not set by Python, which cannot restore it
            signal.signal(signal.SIGTERM, before)


def _raise_terminated(signum: int, frame: FrameType | None) -> NoReturn:
    raise Stopped(signum)


def _report(message: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"tinylm: {message.translate(CONTROL_CHARACTERS)}", file=sys.stderr)
    return status


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        words = _ADVICE.get(error.errno or 0, error.strerror)
        return f"{_known_name(error.filename)}: {words}" if error.filename is not None else words
    return " ".join(str(error).split())


def _known_name(name: str | bytes | int) -> str:
    """The path as the user knows it: for a temporary file, the path that it would have replaced."""
    path = Path(os.fsdecode(name)) if not isinstance(name, int) else Path(str(name))
    return str(path.with_name(path.name[1:].rsplit(".", 2)[0]) if path.name.endswith(".tmp") else path)
