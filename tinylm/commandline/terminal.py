"""The terminal: consoles, facts in two columns, and the progress bar.

Nothing outside this folder prints by itself. A progress bar is drawn on a terminal only, not in a pipe or a file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


def make_console(is_main: bool = True, **options: Any) -> Console:
    """A console that does not wrap lines or highlight words by itself. It prints in the main process only.

    Args:
        options: options of rich's Console, such as `stderr` and `markup`.
    """
    return Console(highlight=False, soft_wrap=True, quiet=not is_main, **options)


def print_facts(console: Console, title: str, facts: dict[str, str]) -> None:
    """Print names and values in two columns. Lines are not wrapped, so that paths can be copied."""
    width = max(len(name) for name in facts)
    console.print(f"[bold]{title}[/bold]")
    for name, value in facts.items():
        console.print(f"  [dim]{name:<{width}}[/dim]  {escape(value)}")


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
    columns = TextColumn("[bold]{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[text]}")
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task(escape(title), total=None, text="")

        def show(text: str, done: int | None = None, total: int | None = None) -> None:
            bar.update(task, completed=done, total=total, text=escape(text))

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
