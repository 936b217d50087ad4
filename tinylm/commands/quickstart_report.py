"""The quickstart as one picture, report.svg: the loss of each stage, what each model can do, and the goals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tinylm.evaluation.loss_curves import CAPTION, Curves, Panel, read_curves
from tinylm.evaluation.skills import Scoreboard
from tinylm.evaluation.svg import BLUE, GREEN, GRID, INK, MUTED, RED, Drawing

WIDTH, EDGE, GAP = 920.0, 24.0, 32.0
"""Pixels: of the picture, at its edges, and between its two columns."""
COLUMN = (WIDTH - 2 * EDGE - GAP) / 2
PANEL_GAP, PANEL_HEIGHT = 14.0, 176.0
PANEL_WIDTH = (WIDTH - 2 * EDGE - 3 * PANEL_GAP) / 4
LINE, NAME = 20.0, 172.0
"""Pixels: a row of a table, and the room for its name."""
TOP = 308.0
"""Pixels above the tables."""
FOOTNOTE = "Shares in %. LoRA answers as Captain Pip, which no skill expects; “right, persona aside” is its real score."


def curves_of(folders: Mapping[str, Path], console: Console) -> list[Curves]:
    """The losses of each stage; a stage whose metrics are lost is named and gets an empty panel."""
    stages = []
    for stage, folder in folders.items():
        try:
            stages.append(read_curves(folder))
        except (OSError, ValueError) as error:
            console.print(f"no loss curve of {stage}: {error}")
            stages.append(Curves(stage, [], []))
    return stages


def draw_report(
    stages: Sequence[Curves], board: Scoreboard, goals: Sequence[Mapping[str, Any]], facts: Sequence[str]
) -> bytes:
    """The picture.

    Args:
        goals: as `quickstart_scores.goals` makes them.
        facts: about the run, for the line below the title.

    Returns:
        the bytes of an SVG.
    """
    skills, summary = board.rows()
    right = (len(summary) + len(goals)) * LINE + 90
    drawing = Drawing(WIDTH, TOP + max(len(skills) * LINE + 24, right) + 40, "tinylm quickstart: losses and scoreboard")
    drawing.text(EDGE, 38, "tinylm quickstart", 20, font_weight=600)
    drawing.text(EDGE, 60, " · ".join(facts), 12, MUTED)
    num_met = sum(bool(goal["met"]) for goal in goals)
    color = GREEN if num_met == len(goals) else INK
    drawing.text(WIDTH - EDGE, 38, f"{num_met} of {len(goals)} goals met", 15, color, "end", font_weight=600)
    for number, curves in enumerate(stages):
        box = EDGE + number * (PANEL_WIDTH + PANEL_GAP), 80.0, PANEL_WIDTH, PANEL_HEIGHT
        Panel(drawing, box, curves).draw()
    drawing.text(EDGE, 276, CAPTION, 11, MUTED)
    draw_scores(drawing, EDGE, f"right of {board.items_per_skill} items", board, skills, TOP)
    beside = EDGE + COLUMN + GAP
    draw_scores(drawing, beside, "over all skills", board, summary, TOP)
    draw_goals(drawing, beside, goals, TOP + (len(summary) + 2) * LINE + 26)
    drawing.text(EDGE, drawing.height - 20, FOOTNOTE, 11, MUTED)
    return drawing.to_bytes()


def draw_scores(drawing: Drawing, x: float, title: str, board: Scoreboard, rows: Sequence[str], y: float) -> None:
    """A table of shares; the larger a share, the darker its cell."""
    drawing.text(x, y + 8, title, 12, MUTED)
    width = (COLUMN - NAME) / len(board.columns)
    for number, column in enumerate(board.columns):
        drawing.text(x + NAME + (number + 0.5) * width, y + 8, column, 12, anchor="middle", font_weight=600)
    for place, row in enumerate(rows):
        top = y + 18 + place * LINE
        drawing.text(x, top + 14, row, 12)
        for number, (column, cell) in enumerate(zip(board.columns, board.cells(row), strict=True)):
            left, share = x + NAME + number * width, board.value(column, row)
            if share is not None:
                strength = 0.05 + 0.45 * min(1.0, max(0.0, share))  # dark words stay readable on it
                drawing.box(left + 1, top + 1, width - 2, LINE - 2, BLUE, fill_opacity=strength, rx=3)
            drawing.text(left + width / 2, top + 14, cell, 12, INK, "middle")


def draw_goals(drawing: Drawing, x: float, goals: Sequence[Mapping[str, Any]], y: float) -> None:
    """A table of goals: what, measured, wanted, and whether it was met."""
    end = x + COLUMN
    measured, wanted = end - 122, end - 60
    drawing.text(x, y + 8, "goals", 12, MUTED)
    drawing.text(measured, y + 8, "measured", 12, MUTED, "end")
    drawing.text(wanted, y + 8, "wanted", 12, MUTED, "end")
    for number, goal in enumerate(goals):
        top = y + 18 + number * LINE
        drawing.line([(x, top), (end, top)], GRID)
        drawing.text(x, top + 14, goal["what"], 12)
        drawing.text(measured, top + 14, goal["measured"], 12, anchor="end")
        sign_and_share = goal["wanted"].replace(">=", "≥").replace("<=", "≤")
        drawing.text(wanted, top + 14, sign_and_share, 12, MUTED, "end")
        word, color = ("met", GREEN) if goal["met"] else ("missed", RED)
        drawing.text(end, top + 14, word, 12, color, "end", font_weight=600)
