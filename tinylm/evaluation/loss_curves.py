"""Loss curves of finished runs, drawn from the metrics that they wrote.

Each stage gets a panel: loss in nats per target (or pair) over optimizer steps. A logged training loss is that of one
step, so it is noisy: it is drawn as a thin line, with the running median as a thick one where there are enough points.
Dots are held-out data. The loss axis is logarithmic where a few high values (the first steps) would flatten the rest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tinylm.evaluation.svg import BLUE, GRID, MUTED, ORANGE, Drawing

TITLES = {"pretrain": "pretraining", "full_sft": "full SFT", "lora": "LoRA", "dpo": "DPO"}
WINDOW = 7
"""Logged steps of the running median; an odd number."""
FLAT = 4.0
"""The loss axis is logarithmic from this ratio of the highest loss to the median loss."""
NUM_TICKS = 5
"""Numbers on an axis at most, about."""
CAPTION = (
    f"Loss in nats over optimizer steps. Thin line: one logged step; thick line: running median of {WINDOW}; "
    "dots: held-out data."
)
WIDTH, HEIGHT, GAP = 360.0, 220.0, 32.0
"""Pixels of a panel in a picture of its own, and between two of them."""
HEAD, LEFT, FOOT, RIGHT = 42.0, 30.0, 18.0, 6.0
"""Pixels beside the axes of a panel: headings above, numbers on the left and below."""

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Curves:
    """The losses of a stage, each as (step, nats)."""

    stage: str
    training: Points
    held_out: Points


def read_curves(folder: Path) -> Curves:
    """The losses of a stage, from the metrics in its output folder. Losses that were no numbers are left out.

    Raises:
        ValueError: no metrics there, metrics of several stages, or a line that is none.
    """
    files = sorted(folder.glob("*_metrics.jsonl"))
    if len(files) != 1:
        raise ValueError(f"{folder} holds {len(files)} files *_metrics.jsonl; give the --output_dir of one stage")
    stage = files[0].name.removesuffix("_metrics.jsonl").rsplit("_", 1)[0]
    found: dict[str, Points] = {"loss": [], "validation_loss": []}
    for number, line in enumerate(files[0].read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            for name, points in found.items():
                if record.get(name) is not None and math.isfinite(record[name]):
                    points.append((int(record["step"]), float(record[name])))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f'{files[0]}, line {number} is not a step\'s metrics; expected {{"step": 20, "loss": 2.5, ...}}; '
                "delete the line"
            ) from None
    return Curves(stage, found["loss"], found["validation_loss"])


def running_median(points: Points, window: int = WINDOW) -> Points:
    """The median of the `window` losses around each point. Towards the ends the window shrinks and stays centred."""
    losses = [loss for _, loss in points]
    reach = [min(window // 2, i, len(points) - 1 - i) for i in range(len(points))]
    return [(step, median(losses[i - reach[i] : i + reach[i] + 1])) for i, (step, _) in enumerate(points)]


def needs_log_axis(points: Points) -> bool:
    """Whether the highest loss is so far above the median that a linear axis would flatten the rest."""
    losses = [loss for _, loss in points]
    return bool(losses) and min(losses) > 0 and max(losses) > FLAT * median(losses)


def ticks(low: float, high: float, is_log: bool = False) -> list[float]:
    """Round numbers from `low` to `high`: 1, 2 or 5 times a power of ten, or multiples of one of these."""
    if is_log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        marks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
        inside = [mark for mark in marks if low <= mark <= high]
        return inside[:: -(-len(inside) // (NUM_TICKS + 2))] if inside else []
    least = (high - low) / NUM_TICKS
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= least * (1 - 1e-9))
    return [step * number for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


class Panel:
    """A stage's axes and what is written beside them.

    Args:
        box: the panel's left edge, upper edge, width and height in pixels.
    """

    def __init__(self, drawing: Drawing, box: tuple[float, float, float, float], curves: Curves) -> None:
        self.drawing, self.curves = drawing, curves
        self.x, self.y, self.width, self.height = box
        both = curves.training + curves.held_out
        self.is_log = needs_log_axis(curves.training) and all(loss > 0 for _, loss in both)
        self.last_step = max((step for step, _ in both), default=1) or 1
        low, high = min((loss for _, loss in both), default=0.0), max((loss for _, loss in both), default=1.0)
        margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0  # all losses may be the same
        self.low, self.high = (low / 1.1, high * 1.1) if self.is_log else (low - margin, high + margin)

    def place(self, step: float, loss: float) -> tuple[float, float]:
        """Where a loss belongs."""
        low, high, value = (math.log(v) if self.is_log else v for v in (self.low, self.high, loss))
        across, up = step / self.last_step, (value - low) / (high - low)
        top, left = self.y + HEAD, self.x + LEFT
        return left + across * (self.width - LEFT - RIGHT), top + (1 - up) * (self.height - HEAD - FOOT)

    def draw(self) -> None:
        """The panel: its headings with the last losses, the axes, and the losses."""
        drawing, curves = self.drawing, self.curves
        drawing.text(self.x, self.y + 12, TITLES.get(curves.stage, curves.stage), 13, font_weight=600)
        if self.is_log:
            drawing.text(self.x + self.width - RIGHT, self.y + 12, "log axis", 10, MUTED, "end")
        if curves.training:
            drawing.text(self.x, self.y + 28, f"training {curves.training[-1][1]:.3f}", 11, BLUE)
        if curves.held_out:
            at = self.x + self.width - RIGHT
            drawing.text(at, self.y + 28, f"held out {curves.held_out[-1][1]:.3f}", 11, ORANGE, "end")
        if curves.training or curves.held_out:
            self._draw_axes()
            self._draw_losses()
        else:
            drawing.text(self.x, self.y + HEAD + 20, "no losses on record", 11, MUTED)

    def _draw_axes(self) -> None:
        for loss in ticks(self.low, self.high, self.is_log):
            left, y = self.place(0, loss)
            self.drawing.line([(left, y), self.place(self.last_step, loss)], GRID)
            self.drawing.text(left - 5, y + 3.5, f"{loss:.4g}", 10, MUTED, "end")
        for step in ticks(0, self.last_step):
            if step == round(step):
                x, bottom = self.place(step, self.low)
                self.drawing.line([(x, bottom), (x, bottom + 3)], MUTED)
                self.drawing.text(x, bottom + 14, f"{step:,.0f}", 10, MUTED, "middle")
        self.drawing.line([self.place(0, self.low), self.place(self.last_step, self.low)], MUTED)

    def _draw_losses(self) -> None:
        training, held_out = self.curves.training, self.curves.held_out
        is_smoothed = len(training) > 2 * WINDOW
        thin: dict[str, Any] = {"width": 0.9, "stroke_opacity": 0.55} if is_smoothed else {"width": 1.6}
        self.drawing.line([self.place(*point) for point in training], BLUE, stroke_linejoin="round", **thin)
        if len(training) == 1:  # a line of one point cannot be seen
            self.drawing.dot(*self.place(*training[0]), BLUE)
        if is_smoothed:
            smooth = [self.place(*point) for point in running_median(training)]
            self.drawing.line(smooth, BLUE, 1.8, stroke_linejoin="round")
        for point in held_out:
            self.drawing.dot(*self.place(*point), ORANGE, 3.2, stroke="#ffffff", stroke_width=0.8)


def draw_curves(stages: Sequence[Curves], title: str = "") -> bytes:
    """A picture of some stages' losses, two in a row; the bytes of an SVG."""
    edge, head = 20.0, 56.0 if title else 20.0
    across, rows = min(2, len(stages)), -(-len(stages) // 2)
    width = 2 * edge + across * (WIDTH + GAP) - GAP
    drawing = Drawing(width, head + rows * (HEIGHT + GAP) + 12, title or "Loss curves")
    drawing.text(edge, 32, title, min(14, 1.6 * (width - 2 * edge) / max(1, len(title))), font_weight=600)
    for number, curves in enumerate(stages):
        row, column = divmod(number, 2)
        box = edge + column * (WIDTH + GAP), head + row * (HEIGHT + GAP), WIDTH, HEIGHT
        Panel(drawing, box, curves).draw()
    drawing.text(edge, drawing.height - 18, CAPTION, 11 if across > 1 else 6, MUTED)
    return drawing.to_bytes()
