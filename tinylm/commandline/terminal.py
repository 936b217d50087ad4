"""The terminal: consoles, facts in two columns, and the progress bar.

Nothing outside this folder prints by itself. A progress bar is drawn on a terminal only, not in a pipe or a file.
A string is always printed as it is: "[/b]" or ":smile:" in a path has no meaning. For colours, print a rich `Text`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from tinylm.commandline.exit_status import CONTROL_CHARACTERS


class _Console(Console):
    """A console that prints strings as they are, without rich's markup and emoji codes."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(text.translate(CONTROL_CHARACTERS), **{**options, "markup": False, "emoji": False})


def make_console(is_main: bool = True, **options: Any) -> Console:
    """A console that does not wrap lines or highlight words by itself. It prints in the main process only.

    Args:
        options: options of rich's Console, such as `stderr` and `style`.
    """
    return _Console(highlight=False, soft_wrap=True, quiet=not is_main, **options)


def print_facts(console: Console, title: str, facts: dict[str, str]) -> None:
    """Print names and values in two columns. Lines are not wrapped, so that paths can be copied."""
    width = max(len(name) for name in facts)
    console.print(Text(title, style="bold"))
    for name, value in facts.items():
        console.print(Text.assemble("  ", (f"{name:<{width}}", "dim"), f"  {value.translate(CONTROL_CHARACTERS)}"))


class ShowProgress(Protocol):
    """The function that `progress` yields: call it with a few words and, if known, the numbers for the bar."""

    def __call__(self, text: str, done: int | None = None, total: int | None = None) -> None: ...


@contextlib.contextmanager
def progress(console: Console, title: str) -> Iterator[ShowProgress]:
    """Show a progress bar on a terminal; it disappears when the block ends.

    Without numbers the bar moves back and forth.
    """
    if not console.is_terminal or console.quiet:
        yield lambda text, done=None, total=None: None
        return
    columns = (
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[text]}", markup=False),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task(title, total=None, text="")

        def show(text: str, done: int | None = None, total: int | None = None) -> None:
            bar.update(task, completed=done, total=total, text=text)

        yield show


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
