"""Losses read from metrics, and where they are drawn."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tinylm.evaluation.loss_curves import (
    Curves,
    Panel,
    draw_curves,
    needs_log_axis,
    read_curves,
    running_median,
    ticks,
)
from tinylm.evaluation.svg import BLUE, ORANGE, Drawing

SVG = "{http://www.w3.org/2000/svg}"


def metrics(folder: Path, name: str, lines: list) -> Path:
    folder.mkdir(exist_ok=True)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / f"{name}_metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_losses_are_read_and_smoothed(tmp_path):
    """Training and held-out losses stand apart; a spike moves the running median nowhere, and asks for a log axis."""
    losses = [8.0, 3.0, 2.0, 9.0, 2.0, 1.0]
    lines = [{"step": 10 * i, "loss": loss} for i, loss in enumerate(losses)] + [{"step": 51, "validation_loss": 1.5}]
    curves = read_curves(metrics(tmp_path, "full_sft_512", lines))
    assert (curves.stage, curves.held_out) == ("full_sft", [(51, 1.5)])
    assert curves.training == [(0, 8.0), (10, 3.0), (20, 2.0), (30, 9.0), (40, 2.0), (50, 1.0)]
    medians = [(0, 8.0), (10, 3.0), (20, 3.0), (30, 2.0), (40, 2.0), (50, 1.0)]
    assert running_median(curves.training, 3) == medians
    assert not needs_log_axis(curves.training) and needs_log_axis([*curves.training, (60, 13.0)])
    assert not needs_log_axis([(1, 9.0), (2, 0.0), (3, 0.1)]), "0 has no logarithm"


def test_a_loss_that_is_no_number_is_left_out(tmp_path):
    """The metrics hold null for it: JSON has no NaN."""
    lines = ['{"step": 1, "loss": null}', '{"step": 2, "loss": NaN}', {"step": 3, "loss": 2.5, "validation_loss": None}]
    assert read_curves(metrics(tmp_path, "dpo_64", lines)) == Curves("dpo", [(3, 2.5)], [])


@pytest.mark.parametrize(
    "line", ['{"step": 2, "lo', "[]", '{"loss": 2.5}', '{"step": "ä", "loss": 2}', '{"loss": "2"}']
)
def test_a_line_that_is_none_is_named(tmp_path, line):
    folder = metrics(tmp_path, "lora_64", [{"step": 1, "loss": 2.5}, line])
    with pytest.raises(ValueError, match=r"lora_64_metrics.jsonl, line 2 is not a step's metrics; expected .*; delete"):
        read_curves(folder)


def test_the_metrics_of_one_stage_are_asked_for(tmp_path):
    for count in (0, 2):
        with pytest.raises(ValueError, match=rf"holds {count} files \*_metrics.jsonl; give the --output_dir of one"):
            read_curves(tmp_path)
        metrics(tmp_path, "lora_512", [])
        metrics(tmp_path, "dpo_512", [])


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ((0, 827), [0, 200, 400, 600, 800]),
        ((0, 1), [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ((0.455, 0.7), [0.5, 0.55, 0.6, 0.65, 0.7]),
        ((2.499, 2.501), [2.499, 2.4995, 2.5, 2.5005, 2.501]),
        ((0.1, 4.5, True), [0.1, 0.2, 0.5, 1, 2]),
        ((0.001, 4000.0, True), [0.001, 0.01, 0.1, 1, 10, 100, 1000]),
        ((2.5, 4.5, True), []),
    ],
)
def test_ticks_are_round_numbers_inside(limits, expected):
    assert ticks(*limits) == pytest.approx(expected)


def test_losses_are_drawn_to_scale():
    """A panel of 136 x 160 has axes of 100 x 100 with the corner at (40, 152); 5% above and below stay free."""
    curves = Curves("pretrain", [(10, 3.0), (20, 2.0)], [(40, 1.0)])
    panel = Panel(Drawing(300, 300, ""), (10.0, 10.0, 136.0, 160.0), curves)
    assert not panel.is_log
    assert panel.place(0, 0.9) == pytest.approx((40, 152))
    assert panel.place(40, 3.1) == pytest.approx((140, 52))
    assert panel.place(20, 2.0) == pytest.approx((90, 102))
    log = Panel(Drawing(300, 300, ""), (10.0, 10.0, 136.0, 160.0), Curves("", [(1, 10.0), (2, 0.1), (3, 0.1)], []))
    assert log.is_log and log.place(3, 1.0) == pytest.approx((140, 102)), "the middle between 10 and 0.1"


@pytest.mark.parametrize(
    ("training", "held_out"),
    [
        ([(1, 6.93)], [(3, 6.52)]),
        ([(1, 2.5), (20, 2.5)], []),
        ([], [(17, 0.0)]),
        ([(step, 9.0 / step) for step in range(1, 60)], [(30, 0.0), (59, 0.25)]),
        ([], []),
    ],
)
def test_any_number_of_losses_can_be_drawn(training, held_out):
    root = ElementTree.fromstring(draw_curves([Curves("größe & <b>", training, held_out)], "Läufe, 1 < 2"))
    shown = [element.text for element in root.iter(f"{SVG}text")]
    assert "größe & <b>" in shown and "Läufe, 1 < 2" in shown
    for points, words in ((training, "training"), (held_out, "held out")):
        assert not points or f"{words} {points[-1][1]:.3f}" in shown
    assert ("no losses on record" in shown) == (not training and not held_out)
    dots = [dot.get("fill") for dot in root.iter(f"{SVG}circle")]
    assert dots.count(ORANGE) == len(held_out) and dots.count(BLUE) == (len(training) == 1)
    numbers = [float(n) for element in root.iter() for name, n in element.items() if name in ("x", "y", "cx", "cy")]
    assert all(0 <= number <= 500 for number in numbers)
