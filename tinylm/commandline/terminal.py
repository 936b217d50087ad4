"""The terminal: consoles, facts in two columns, and progress.

Nothing outside this folder prints by itself. Progress is a bar on a terminal, and a line now and then in a pipe or a
file. A string is always printed as it is: "[/b]" or ":smile:" in a path has no meaning. For colours, print a rich
`Text`.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from tinylm.commandline.exit_status import CONTROL_CHARACTERS

WIDTH = 80
"""Columns that a line of progress may take where the width is unknown: in a pipe or a file."""
FIRST_SIGN, NEXT_SIGN = 10.0, 30.0
"""Seconds to the first line of progress in a pipe, and at most from one line to the next."""


class _Console(Console):
    """A console that prints strings as they are, without rich's markup and emoji codes.

    The reader of its output may have gone (`tinylm pretrain | head`).
    """

    when_closed: Callable[[], None] | None = None

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(text.translate(CONTROL_CHARACTERS), **{**options, "markup": False, "emoji": False})

    def on_broken_pipe(self) -> None:
        """Called by rich instead of raising. Nothing more is printed, and Python's own flush at exit must not fail."""
        self.quiet = True
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())
        if self.when_closed is None:
            raise BrokenPipeError
        self.when_closed()


def make_console(is_main: bool = True, **options: Any) -> Console:
    """A console that does not wrap lines or highlight words by itself. It prints in the main process only.

    Args:
        options: options of rich's Console, such as `stderr` and `style`.
    """
    return _Console(highlight=False, soft_wrap=True, quiet=not is_main, **options)


@contextlib.contextmanager
def closed_pipe_calls(console: Console, function: Callable[[], None]) -> Iterator[None]:
    """Inside the block, `function` is called when the reader of the output has gone, and nothing is raised."""
    if not isinstance(console, _Console):
        yield
        return
    console.when_closed = function
    try:
        yield
    finally:
        console.when_closed = None


def fit_words(words: Sequence[str], width: int) -> str:
    """As many of the first words as have room in `width` columns, with dots between them."""
    line = words[0] if words else ""
    for word in words[1:]:
        if len(line) + 3 + len(word) > width:
            break
        line += f" · {word}"
    return line if len(line) <= width else f"{line[: max(0, width - 3)]}..."


def print_facts(console: Console, title: str, facts: dict[str, str]) -> None:
    """Print names and values in two columns. Lines are not wrapped, so that paths can be copied."""
    width = max(len(name) for name in facts)
    console.print(Text(title, style="bold"))
    for name, value in facts.items():
        console.print(Text.assemble("  ", (f"{name:<{width}}", "dim"), f"  {value.translate(CONTROL_CHARACTERS)}"))


def lines_of_words(words: Sequence[str], width: int = WIDTH) -> list[str]:
    """All words, with dots between them, in as many lines as they need; later lines are indented."""
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + 3 + len(word) <= width:
            lines[-1] += f" · {word}"
        else:
            lines.append(f"    {word}")
    return lines


def print_next(console: Console, *lines: str) -> None:
    """Print the commands that may come next, each as `what it does: the command`."""
    for number, line in enumerate(lines):
        console.print(f"{'next' if number == 0 else '    '}  {line}")


class ShowProgress(Protocol):
    """The function that `progress` yields.

    Args:
        words: what is shown, the most important first: those that have no room are left out.
        done, total: the numbers for the bar, if they are known.
        is_due: whether to print a line in a pipe now.
    """

    def __call__(
        self, words: str | Sequence[str], done: int | None = None, total: int | None = None, is_due: bool = False
    ) -> None: ...


Listener = Callable[[str, int, int], str | None]
"""(title, done, total) of a progress that moved -> a line to print above it, or None."""
_listener: ContextVar[Listener] = ContextVar("listener", default=lambda title, done, total: None)


@contextlib.contextmanager
def progress_heard_by(listener: Listener) -> Iterator[None]:
    """Inside the block, `listener` hears of all progress that is shown in numbers, and may add a line to it."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextlib.contextmanager
def progress(console: Console, title: str, clock: bool = True) -> Iterator[ShowProgress]:
    """Show progress inside the block. On a terminal it is a bar, which disappears at the end.

    In a pipe it is a line when one is due, but the first after 10 seconds and then one every 30 seconds at least.
    Without numbers the bar moves back and forth.

    Args:
        clock: show the time since the start.
    """
    if console.quiet:
        yield lambda words, done=None, total=None, is_due=False: None
        return
    listener = _listener.get()
    with _bar(console, title, clock) if console.is_terminal else _lines(console, title) as show:

        def show_and_tell(
            words: str | Sequence[str], done: int | None = None, total: int | None = None, is_due: bool = False
        ) -> None:
            show(words, done, total, is_due)
            if done is not None and total and (line := listener(title, done, total)):
                console.print(line)

        yield show_and_tell


@contextlib.contextmanager
def _bar(console: Console, title: str, clock: bool) -> Iterator[ShowProgress]:
    title_column = TextColumn("{task.description}", style="bold", markup=False)
    columns = title_column, BarColumn(bar_width=10), TextColumn("{task.fields[text]}", markup=False)
    clocks = (TimeElapsedColumn(),) if clock else ()
    room = console.width - len(title) - 10 - 3 - 8 * clock
    with Progress(*columns, *clocks, console=console, transient=True) as bar:
        task = bar.add_task(title, total=None, text="")

        def show(
            words: str | Sequence[str], done: int | None = None, total: int | None = None, is_due: bool = False
        ) -> None:
            text = fit_words([words] if isinstance(words, str) else words, room)
            bar.update(task, completed=done, total=total, text=text)

        yield show


@contextlib.contextmanager
def _lines(console: Console, title: str) -> Iterator[ShowProgress]:
    with _Lines(console, title) as lines:
        yield lines.show


class _Lines:
    """Progress in a pipe. A thread prints a line when nothing else has for too long."""

    def __init__(self, console: Console, title: str) -> None:
        self.console, self.title = console, title
        self.words: list[str] = []
        self.started = time.monotonic()
        self.deadline = self.started + FIRST_SIGN
        self.has_ended = threading.Event()
        self.lock = threading.Lock()
        self.error: BrokenPipeError | None = None
        self.thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __enter__(self) -> _Lines:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.has_ended.set()
        self.thread.join()
        if self.error is not None and error[0] is None:
            raise self.error

    def show(
        self, words: str | Sequence[str], done: int | None = None, total: int | None = None, is_due: bool = False
    ) -> None:
        if self.error is not None:
            raise self.error
        self.words = [words] if isinstance(words, str) else list(words)
        if is_due:
            self._print(self.words)

    def _print(self, words: Sequence[str]) -> None:
        with self.lock:
            self.deadline = time.monotonic() + NEXT_SIGN
            self.console.print(fit_words([f"{self.title} {words[0]}", *words[1:]], WIDTH))

    def _watch(self) -> None:
        while not self.has_ended.wait(max(0.01, self.deadline - time.monotonic())):
            if time.monotonic() < self.deadline:
                continue
            passed = f"{format_seconds(time.monotonic() - self.started)} so far"
            try:
                self._print([self.words[0], passed, *self.words[1:]] if self.words else [passed])
            except BrokenPipeError as error:
                self.error = error
                return


def format_seconds(seconds: float) -> str:
    """12s, 3m05s, 2h07m."""
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded}s"
    if rounded < 3600:
        return f"{rounded // 60}m{rounded % 60:02d}s"
    return f"{rounded // 3600}h{rounded % 3600 // 60:02d}m"


def format_count(number: float) -> str:
    """950, 12.3k, 4.56M, 1.20B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"
