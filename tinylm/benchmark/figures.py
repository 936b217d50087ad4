"""Figures: samples of one quantity, from one contender or two, and what they mean.

Contenders take turns (A B A B ...), so that a machine that slows down slows down both. A figure is the median of its
samples, so that one disturbed turn does not count; the spread is from the lowest sample to the highest. The ratio is
the median of the ratios of each round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tinylm.system.runtime import Runtime

OURS, THEIRS = "tinylm", "transformers"
FALLING = ("s", "GB")
"""Units of which less is better."""


@dataclass(frozen=True)
class Work:
    """What one unit of a speed costs at least, to compare it with what the machine can do."""

    precision: str
    """Of the matrix products, such as `bfloat16`."""
    flops: float = 0.0
    """Floating-point operations."""
    num_bytes: float = 0.0
    """Bytes that are read from memory."""


@dataclass
class Ceilings:
    """The most that the machine did in this run.

    Other work on the machine can only lower a measurement, so the highest counts, and it is measured again after each
    part: a ceiling measured on a busy machine would flatter every share.
    """

    flops: dict[str, float] = field(default_factory=dict)
    """Precision -> floating-point operations per second of a large matrix product."""
    bytes_per_second: float = 0.0
    """Bytes per second read from memory."""

    def note_flops(self, precision: str, value: float) -> None:
        """Keep a measurement if it is the highest."""
        self.flops[precision] = max(value, self.flops.get(precision, 0.0))

    def share(self, speed: float, work: Work) -> float | None:
        """The share of the ceiling that is nearer: of matrix products, or of reading memory. None if none is known."""
        shares = []
        if work.flops and self.flops.get(work.precision):
            shares.append(speed * work.flops / self.flops[work.precision])
        if work.num_bytes and self.bytes_per_second:
            shares.append(speed * work.num_bytes / self.bytes_per_second)
        return max(shares, default=None)


@dataclass(frozen=True)
class Bar:
    """What a figure should reach: a multiple of a contender's speed; without a contender, at most its own number."""

    bound: float
    contender: str | None = None


@dataclass(frozen=True)
class Figure:
    """One quantity, measured."""

    part: str
    """The part of the suite, such as `step`."""
    group: str
    """The shape and the precision, in words."""
    name: str
    """What differs within the group, such as `Muon`."""
    unit: str
    """tokens/s, GFLOP/s, GB/s, MB/s, s, GB or %."""
    samples: Mapping[str, tuple[float, ...]]
    """Contender -> a number for each round."""
    work: Work | None = None
    """What one unit costs, where the figure is a speed that a ceiling bounds."""
    bars: tuple[Bar, ...] = ()
    """What it should reach."""

    def median(self, contender: str = OURS) -> float:
        """Of the contender's samples."""
        return statistics.median(self.samples[contender])

    @property
    def ratio(self) -> float | None:
        """Ours over theirs; None where transformers is not measured."""
        return self.ratio_to(THEIRS) if THEIRS in self.samples else None

    @property
    def others(self) -> list[str]:
        """The contenders beside ours and transformers."""
        return [name for name in self.samples if name not in (OURS, THEIRS)]

    def ratio_to(self, contender: str) -> float:
        """Ours over the contender's, the median of the rounds' ratios; of seconds and GB, less than 1 is better."""
        rounds = zip(self.samples[OURS], self.samples[contender], strict=True)
        return statistics.median(ours / theirs for ours, theirs in rounds)

    def reached(self, bar: Bar) -> float:
        """What the bar is about: our ratio to its contender, or our median."""
        return self.median() if bar.contender is None else self.ratio_to(bar.contender)

    def meets(self, bar: Bar) -> bool:
        """Whether the bar is reached."""
        return self.reached(bar) <= bar.bound if bar.contender is None else self.reached(bar) >= bar.bound

    def share(self, ceilings: Ceilings, contender: str = OURS) -> float | None:
        """The contender's median as a share of the machine's ceiling; None where no ceiling bounds it."""
        return None if self.work is None else ceilings.share(self.median(contender), self.work)

    def to_json(self, ceilings: Ceilings) -> dict[str, Any]:
        """Every sample, and what the table shows."""
        contenders = {
            name: {
                "median": self.median(name),
                "lowest": min(values),
                "highest": max(values),
                "share_of_ceiling": self.share(ceilings, name),
                "samples": list(values),
                "ratio": None if name == OURS else self.ratio_to(name),
            }
            for name, values in self.samples.items()
        }
        facts: dict[str, Any] = {"part": self.part, "group": self.group, "name": self.name, "unit": self.unit}
        better = "lower" if self.unit in FALLING else "higher"
        work = None if self.work is None else vars(self.work)
        bars = [{**vars(bar), "reached": self.reached(bar), "met": self.meets(bar)} for bar in self.bars]
        facts |= {"better": better, "ratio": self.ratio}
        return {**facts, "contenders": contenders, "bars": bars, "work_per_unit": work}


@dataclass(frozen=True)
class Turns:
    """What a contender did in its turns."""

    amount: float
    """Units of work in a turn, such as tokens."""
    seconds: tuple[float, ...]
    """Of each turn that counts."""
    first_seconds: float
    """Of the turn before them, which warms up (and compiles)."""

    @property
    def speeds(self) -> tuple[float, ...]:
        """Units per second of each turn."""
        return tuple(self.amount / seconds for seconds in self.seconds)


def take_turns(contenders: Mapping[str, Callable[[], float]], rounds: int, runtime: Runtime) -> dict[str, Turns]:
    """Let each contender work `rounds` times in turn, after a round that warms up and does not count.

    Args:
        contenders: name -> a function that does a turn's work and returns how much it was; the same in each turn.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    amounts: dict[str, float] = {}
    for _ in range(rounds + 1):
        for name, work in contenders.items():
            synchronize(runtime)
            start = time.perf_counter()
            amounts[name] = work()
            synchronize(runtime)
            seconds[name].append(time.perf_counter() - start)
    return {name: Turns(amounts[name], tuple(values[1:]), values[0]) for name, values in seconds.items()}


def synchronize(runtime: Runtime) -> None:
    """Wait until the device has finished."""
    if runtime.device.type != "cpu":
        torch.accelerator.synchronize(runtime.device)
