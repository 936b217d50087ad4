"""What is shown: a line when a figure is ready, the table at the end, and the JSON file."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.text import Text

from tinylm.benchmark.bench import Bench
from tinylm.benchmark.figures import OURS, THEIRS, Figure
from tinylm.benchmark.machine import machine_facts, machine_line, versions
from tinylm.commandline.terminal import WIDTH, format_count, lines_of_words

NAME, NUMBER, SPREAD, PEER = 27, 9, 17, 13
"""Widths of the columns; with a ratio and a share of 6 each they fill 78 of 80 columns."""


def number(value: float) -> str:
    """Three digits or more: 0.123, 12.3, 1,234, 1.23M."""
    if value >= 1e6:
        return format_count(value)
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{digits}f}"


def spread(figure: Figure, contender: str = OURS) -> str:
    """From the lowest sample to the highest."""
    values = figure.samples[contender]
    return f"{number(min(values))}–{number(max(values))}"


def words_of(figure: Figure, bench: Bench) -> list[str]:
    """A figure in words, the most important first."""
    words = [f"{figure.part}, {figure.name}: {number(figure.median())} {figure.unit}"]
    if figure.ratio is not None:
        words.append(f"{figure.ratio:.2f}x {THEIRS} ({number(figure.median(THEIRS))})")
    words += [f"{figure.ratio_to(name):.2f}x {name} ({number(figure.median(name))})" for name in figure.others]
    if (share := figure.share(bench.ceilings)) is not None:
        words.append(f"{share:.0%} of the ceiling")
    return words


def show_figure(console: Console, figure: Figure, bench: Bench) -> None:
    """A line (two if it is long), at once: a run that is stopped has said something."""
    for line in lines_of_words(words_of(figure, bench)):
        console.print(line)


def table_lines(figures: Sequence[Figure], bench: Bench) -> list[Text]:
    """The table, at most 80 columns wide. A heading names part, shape and unit; below it one line for each figure."""
    head = f"{'':<{NAME}}{OURS:>{NUMBER}}{'lowest–highest':>{SPREAD}}{THEIRS:>{PEER}}{'ratio':>6}{'share':>6}"
    lines = [Text(head, style="bold")]
    for (part, group, unit), found in itertools.groupby(figures, lambda f: (f.part, f.group, f.unit)):
        heading = f"{part}{f': {group}' * bool(group)} ({unit})"
        lines += [Text(line, style="bold") for line in wrapped(heading)]
        for figure in found:
            lines.append(Text(_row(f"  {figure.name}", figure, bench)))
            lines += [Text(_row(f"    {name}", figure, bench, name)) for name in figure.others]
    return lines


def _row(title: str, figure: Figure, bench: Bench, contender: str = OURS) -> str:
    share = figure.share(bench.ceilings, contender)
    ratio = figure.ratio if contender == OURS else figure.ratio_to(contender)
    peer = number(figure.median(THEIRS)) if contender == OURS and ratio is not None else ""
    cells = [
        f"{title:<{NAME}}",
        f"{number(figure.median(contender)):>{NUMBER}}",
        f"{spread(figure, contender):>{SPREAD}}",
        f"{peer:>{PEER}}",
        f"{'' if ratio is None else f'{ratio:.2f}':>6}",
        f"{'' if share is None else f'{share:.0%}':>6}",
    ]
    return "".join(cells).rstrip()


NOTE = (
    "Medians of the rounds. ratio: ours over theirs, the median of the rounds' own; in s and GB less is better. "
    "share: of the ceiling, matmul or memory, whichever is nearer."
)


def bar_lines(figures: Sequence[Figure]) -> list[str]:
    """Each bar, what was reached, and whether that is enough."""
    lines = []
    for figure in figures:
        for bar in figure.bars:
            met = "met" if figure.meets(bar) else "not met"
            if bar.contender is None:
                found, wanted = f"{figure.reached(bar):.3f} {figure.unit}", f"at most {bar.bound:g} {figure.unit}"
            else:
                found, wanted = f"{figure.reached(bar):.2f}x {bar.contender}", f"at least {bar.bound:g}x"
            lines.append(f"{met}: {figure.name}: {found}; the bar is {wanted}")
    return lines


def wrapped(line: str) -> list[str]:
    """A long line in lines of at most 80 columns."""
    return textwrap.wrap(line, WIDTH, subsequent_indent="    ", break_long_words=False)


def show_table(console: Console, figures: Sequence[Figure], bench: Bench) -> None:
    """Print the machine, the table, and what was left out."""
    for line in wrapped(machine_line(machine_facts(bench.runtimes[0]))):
        console.print(line)
    for text in table_lines(figures, bench):
        console.print(text)
    for line in [*bar_lines(figures), NOTE, *bench.remarks]:
        console.print("\n".join(wrapped(line)))


def to_json(figures: Sequence[Figure], bench: Bench, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that was measured.

    Args:
        facts: when, how long, and whether all chosen parts are in it.
    """
    return {
        **facts,
        "machine": machine_facts(bench.runtimes[0]),
        "versions": versions(),
        "settings": asdict(bench.settings),
        "ceilings": {"flops": bench.ceilings.flops, "memory_bytes_per_second": bench.ceilings.bytes_per_second},
        "figures": [figure.to_json(bench.ceilings) for figure in figures],
        "remarks": bench.remarks,
    }
