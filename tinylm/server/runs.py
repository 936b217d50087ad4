"""The training runs in a folder, for the page: which there are, with which settings, and the lines of their metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinylm.files.untrusted import parse_json, read_own_json

ENDING = "_metrics.jsonl"
DEPTH = 3
"""Levels of folders that are searched."""
MOST_RUNS = 200
MOST_BYTES = 1 << 25
"""Of a run's metrics: 150,000 lines."""
MOST_ROWS = 3000
"""That a chart gets; of more, every second or third line is left out, and those with a validation or sample stay."""


def runs_in(folder: Path) -> dict[str, Path]:
    """The metrics files below a folder, by names such as `pretrain/pretrain_256`; the newest first."""
    found = [path for depth in range(DEPTH) for path in folder.glob("*/" * depth + "*" + ENDING) if path.is_file()]
    found.sort(key=lambda path: -path.stat().st_mtime)
    return {path.relative_to(folder).as_posix().removesuffix(ENDING): path for path in found[:MOST_RUNS]}


def settings_of(metrics: Path) -> dict[str, Any]:
    """The settings of a run, from the newest model that it has left; empty before the first one."""
    name = metrics.name.removesuffix(ENDING)
    models = sorted(metrics.parent.glob(f"{name}_epoch*/lineage.json"), key=lambda path: path.stat().st_mtime)
    try:
        settings = read_own_json(models[-1]).get("settings") if models else None
    except (OSError, ValueError):
        settings = None
    return settings if isinstance(settings, dict) else {}


def rows_of(metrics: Path) -> list[dict[str, Any]]:
    """The lines of a run that may still be written; a line that is half there is left out.

    Raises:
        ValueError: the file is too large.
    """
    if metrics.stat().st_size > MOST_BYTES:
        raise ValueError(f"{metrics.name} has more than {MOST_BYTES:,} bytes; draw it with benchmarks/curves.py")
    rows = []
    for line in metrics.read_bytes().splitlines():
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    every = max(1, -(-len(rows) // MOST_ROWS))
    return [row for place, row in enumerate(rows) if place % every == 0 or "validation_loss" in row]
