"""A measured number with its uncertainty, and how a list of them is printed and written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Measure:
    """One row of a report."""

    task: str
    """What was measured, such as a file's name or a skill."""
    metric: str
    """How, such as `accuracy` or `bits per byte`."""
    value: float
    standard_error: float | None
    """Sampling error over the items; None where the items are not a sample (a single text)."""
    count: int
    """Number of items behind the value."""


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error, sqrt(sample variance / n); the error is None for fewer than two values."""
    if not values:
        raise ValueError("no values; expected at least one item to measure; check the data and the limit")
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def ratio_and_error(tops: Sequence[float], bottoms: Sequence[float]) -> tuple[float, float | None]:
    """sum(tops) / sum(bottoms) and its standard error, for items of unequal size (nats over bytes of texts).

    The error is the usual linearised one of a ratio estimator (Cochran, Sampling Techniques, section 2.11).
    """
    total = math.fsum(bottoms)
    if total <= 0:
        raise ValueError("nothing to measure: no bytes or tokens; expected at least one; check the data")
    ratio = math.fsum(tops) / total
    count = len(tops)
    if count < 2:
        return ratio, None
    residual = math.fsum((top - ratio * bottom) ** 2 for top, bottom in zip(tops, bottoms, strict=True))
    return ratio, math.sqrt(residual * count / (count - 1)) / total


def measure_of(task: str, metric: str, values: Sequence[float]) -> Measure:
    """The mean of per-item values as a `Measure`."""
    mean, error = mean_and_error(values)
    return Measure(task, metric, mean, error, len(values))


def measures_table(measures: Sequence[Measure], title: str) -> Table:
    """A rich table with a row per measure."""
    table = Table(title=title, title_justify="left")
    table.add_column("task")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("± error", justify="right")
    table.add_column("items", justify="right")
    for measure in measures:
        error = "" if measure.standard_error is None else _number(measure.standard_error)
        table.add_row(measure.task, measure.metric, _number(measure.value), error, f"{measure.count:,}")
    return table


def measures_json(measures: Sequence[Measure]) -> list[dict[str, Any]]:
    """Measures as plain dictionaries."""
    return [asdict(measure) for measure in measures]


def _number(value: float) -> str:
    """Four decimals for small numbers, four significant digits for large ones (perplexities)."""
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}" if abs(value) < 1e6 else f"{value:.3g}"
