"""A picture of a terminal in which the quickstart runs and its model answers, for the README.

    make quickstart 2>&1 | tee out/quickstart.log
    python -m benchmarks.session_picture out/quickstart.log docs/session.svg

The lines are those of the log: the heading and the last step of each stage. The questions at the end are put to the
model that the run left, and the replies are what it says. Nothing in the SVG points to another address.
"""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

COLUMNS = 88
HEADING = re.compile(r"\d/\d \w+ · ")
LAST_STEP = re.compile(r"\w+ +([\d,]+)/\1 · ")
COMMAND = re.compile(r"  (tinylm chat .* --prompt .*)")
ENDING = re.compile(r"\S+ in all; scoreboard in ")
FONTS = re.compile(r"@font-face \{.*?\}\s*", flags=re.DOTALL)


def lines_of_run(log: Iterable[str]) -> Iterator[str]:
    """The lines of a quickstart's log that tell the story."""
    for line in log:
        line = line.rstrip()
        if HEADING.match(line):
            yield line[: COLUMNS - 1].rstrip()
        elif LAST_STEP.match(line) or ENDING.match(line):
            yield line


def replies(log: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(command, what it prints) for the commands that the quickstart ends with."""
    for line in log:
        if found := COMMAND.fullmatch(line.rstrip()):
            words = [sys.executable, "-m", *shlex.split(found[1])]
            done = subprocess.run(words, check=True, capture_output=True, text=True)
            yield found[1], done.stdout.strip()


def draw(log: list[str]) -> str:
    """The SVG."""
    console = Console(width=COLUMNS, record=True, file=io.StringIO(), force_terminal=True, color_system="truecolor")

    def typed(command: str) -> None:
        console.print(Text.assemble(("$ ", "green"), (command, "bold")))

    typed("make quickstart")
    for line in lines_of_run(log):
        console.print(Text(line, style="cyan" if HEADING.match(line) else "dim"))
    for command, reply in replies(log):
        console.print()
        typed(command)
        console.print(Text(reply))
    return FONTS.sub("", console.export_svg(title="tinylm", theme=MONOKAI))


def main(argv: list[str] | None = None) -> int:
    """Draw the picture; returns the exit status."""
    log, picture = sys.argv[1:] if argv is None else argv
    Path(picture).write_text(draw(Path(log).read_text(encoding="utf-8").splitlines()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
