"""The picture at the end of the quickstart, from small metrics files and a scoreboard."""

from __future__ import annotations

import io
import json
from xml.etree import ElementTree

from tinylm.commandline.terminal import make_console
from tinylm.commands.quickstart_report import curves_of, draw_report
from tinylm.commands.quickstart_scores import COLUMNS
from tinylm.evaluation.skills import Scoreboard, SkillReport

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "</text><script>alert('größe & 大')</script>"
LOSSES = {"pretrain": (7.125, 0.8125), "full_sft": (5.5, 0.625), "lora": (4.25, 0.1875), "dpo": (0.693, 0.4375)}
GOALS = [
    {"what": "SFT: mean of skills", "measured": "83.1%", "wanted": ">= 85%", "met": False},
    {"what": f"SFT: weakest skill ({HOSTILE})", "measured": "61.3%", "wanted": ">= 60%", "met": True},
    {"what": "LoRA: points lost", "measured": "1.7%", "wanted": "<= 3%", "met": True},
]


def board() -> Scoreboard:
    """Every number is another one: 11 to 13 for the base model, 21 to 23 after SFT, and so on."""
    columns = {
        name: SkillReport(
            {"who_has": number / 10 + 0.01, HOSTILE: number / 10 + 0.02}, {"in persona": number / 10 + 0.03}, 7, {}
        )
        for number, name in enumerate(COLUMNS, start=1)
    }
    columns["DPO"].summary["prefers the chosen answer"] = 0.97
    return Scoreboard(columns)


def texts(picture: bytes) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(picture).iter(f"{SVG}text")]


def test_the_picture_shows_losses_scores_and_goals(tmp_path):
    folders = {stage: tmp_path / stage for stage in LOSSES}
    for stage, (first, last) in LOSSES.items():
        folders[stage].mkdir()
        lines = [{"step": 1, "loss": first}, {"step": 17, "loss": last}, {"step": 17, "validation_loss": last + 0.25}]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folders[stage] / f"{stage}_256_metrics.jsonl").write_text(text, encoding="utf-8")
    picture = draw_report(curves_of(folders, make_console()), board(), GOALS, ["cpu, größe", HOSTILE])
    shown = texts(picture)
    for _, last in LOSSES.values():
        assert f"training {last:.3f}" in shown and f"held out {last + 0.25:.3f}" in shown
    for number in (11, 12, 13, 21, 22, 23, 31, 32, 33, 41, 42, 43, 97):
        assert shown.count(f"{number}") == 1, number
    assert shown.count("–") == 3, "three models have no share of preferred answers"
    for goal in GOALS:
        place = shown.index(goal["what"])
        wanted = goal["wanted"].replace(">=", "≥").replace("<=", "≤")
        assert shown[place + 1 : place + 4] == [goal["measured"], wanted, "met" if goal["met"] else "missed"]
    assert "2 of 3 goals met" in shown and f"cpu, größe · {HOSTILE}" in shown and HOSTILE in shown
    assert "right of 7 items" in shown and shown.count("SFT") == 2
    assert b"<script" not in picture


def test_a_stage_without_metrics_is_named_and_the_rest_is_drawn(tmp_path):
    heard = io.StringIO()
    stages = curves_of({"pretrain": tmp_path / "größe"}, make_console(file=heard))
    assert "no loss curve of pretrain: " in heard.getvalue() and "größe holds 0 files" in heard.getvalue()
    shown = texts(draw_report(stages, board(), GOALS, []))
    assert "no losses on record" in shown and "42" in shown


def test_nothing_leaves_the_picture():
    """Everything lies inside, whatever the number of skills and goals."""
    wide = Scoreboard({name: SkillReport({f"skill {n}": 1.0 for n in range(40)}, {}, 9, {}) for name in COLUMNS})
    for scores, goals in ((wide, GOALS), (board(), GOALS * 15)):
        root = ElementTree.fromstring(draw_report([], scores, goals, []))
        bottom = max(float(element.get("y") or 0) for element in root.iter(f"{SVG}text"))
        assert bottom < float(root.get("height")) - 10
        lowest = max(float(element.get("y")) for element in root.iter(f"{SVG}text") if element.text != root[-1].text)
        assert bottom - lowest >= 20, "the note stands below all tables"
