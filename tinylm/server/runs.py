"""The training runs in a folder, for the page: which there are, and the lines of their metrics."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from functools import lru_cache
from glob import glob
from pathlib import Path
from typing import Any

from tinylm.files.untrusted import parse_json

ENDING = "_metrics.jsonl"
DEPTH = 3
"""Levels of folders that are searched."""
MOST_BYTES = 1 << 25
"""Of a run's metrics: 150,000 lines."""
TAIL_BYTES = 1 << 14
"""Of a run's metrics, in which its last step and its last validation are looked for."""
MOST_ROWS = 3000
"""That a chart gets; of more, every second or third is left out, and those with a validation or sample stay."""


def runs_in(folder: Path) -> dict[str, Path]:
    """The metrics files below a folder, by names such as `pretrain/pretrain_256`; the newest first."""
    found = newest_first(folder, "*" + ENDING)
    return {path.relative_to(folder).as_posix().removesuffix(ENDING): path for path in found}


def newest_first(folder: Path, pattern: str) -> list[Path]:
    """The files of this pattern in a folder and `DEPTH` levels of it; one that vanishes meanwhile is left out."""
    found = []
    for name in [name for depth in range(DEPTH) for name in glob("*/" * depth + pattern, root_dir=folder)]:
        path = folder / name
        with contextlib.suppress(OSError):
            if path.is_file():
                found.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(found, reverse=True)]


def last_row(metrics: Path) -> dict[str, Any]:
    """The values of the last lines together, back to the last validation, and when the file "changed"."""
    try:
        status = metrics.stat()
        return {**_last_row(metrics, status.st_size, status.st_mtime_ns), "changed": status.st_mtime}
    except OSError:
        return {}


@lru_cache(maxsize=1024)  # each page that shows the runs asks every three seconds, and few of them change
def _last_row(metrics: Path, size: int, mtime_ns: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with metrics.open("rb") as file:
        file.seek(max(0, size - TAIL_BYTES))
        for row in map(_row, reversed(file.read().splitlines())):
            found = {**(row or {}), **found}
            if "validation_loss" in found:
                break
    return found


def rows_of(metrics: Path) -> dict[str, Any]:
    """The metrics of a run that may still be written; a line that is half there is left out.

    A run that was resumed may have written steps twice. The later line counts: when the steps go back, what an earlier
    attempt wrote from that step on is left out.

    Returns:
        "rows": one for each step, in their order; "not_numbers": how many values of a figure are none, by its name;
        "notes": sentences about what is left out.

    Raises:
        ValueError: the file is too large.
    """
    if metrics.stat().st_size > MOST_BYTES:
        raise ValueError(f"{metrics.name} has more than {MOST_BYTES:,} bytes; draw it with benchmarks/curves.py")
    data = metrics.read_bytes()
    read = [_row(line) for line in data.splitlines()]
    if not data.endswith(b"\n") and read and read[-1] is None:
        read.pop()  # the run is writing it
    rows, num_replaced = _in_order([row for row in read if row is not None])
    num_bad, every = read.count(None), max(1, -(-len(rows) // MOST_ROWS))
    notes = {
        f"{num_bad:,} line{'s' * (num_bad > 1)} left out: not the metrics of a step": num_bad,
        f"{num_replaced:,} step{'s' * (num_replaced > 1)} of an earlier attempt left out": num_replaced,
        f"one of {every} steps is drawn": every > 1,
    }
    last = len(rows) - 1
    kept = [row for place, row in enumerate(rows) if place % every == 0 or place == last or "validation_loss" in row]
    return {
        "rows": kept,
        "not_numbers": Counter(key for row in rows for key, value in row.items() if value is None),
        "notes": [note for note, is_so in notes.items() if is_so],
    }


def _row(line: bytes) -> dict[str, Any] | None:
    """The step, figures and samples of a line. A figure that is not a finite number is None."""
    try:
        row = parse_json(line, finite=False)
    except ValueError:
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    return {key: _value(key, value) for key, value in row.items()}


def _value(key: str, value: Any) -> str | float | None:
    if isinstance(value, str) and key.startswith("sample_"):
        return value
    return value if type(value) is int or (isinstance(value, float) and math.isfinite(value)) else None


def _in_order(lines: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """One row for each step, the steps rising, and the number of steps whose earlier lines are left out."""
    rows: list[dict[str, Any]] = []
    replaced: set[int] = set()
    for line in lines:
        step = line["step"]
        if rows and rows[-1]["step"] > step:
            while rows and rows[-1]["step"] >= step:
                replaced.add(rows.pop()["step"])
        if not rows or rows[-1]["step"] < step:
            rows.append({})
        if rows[-1].keys() & line.keys() - {"step"}:
            replaced.add(step)
        rows[-1] |= line
    return rows, len(replaced)
