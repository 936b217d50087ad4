"""The scripts in benchmarks/: what several processes send, curves, pictures."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import curves, scaling_model, session_picture

ROOT = Path(__file__).resolve().parent.parent


def test_the_scaling_model_adds_up_a_worked_example():
    """Four buckets of 25 bytes, two machines of two GPUs, round numbers."""
    machine = scaling_model.Machine(gpus=2, inside=100.0, between=10.0, hop_inside=0.5, hop_between=1.0)
    assert scaling_model.all_reduce_seconds(100, 1, machine) == 0
    # Two inside: 2 (W - 1) / W = 1 times the bytes, there and back one hop each.
    assert scaling_model.all_reduce_seconds(100, 2, machine) == pytest.approx(100 / 100 + 2 * 0.5)
    # Four on two machines: 1.5 times the bytes at the slower speed; ring 2 (2 x 0.5 + 1 x 1) = 4, tree 2 x 0.5 + 2 = 3.
    assert scaling_model.all_reduce_seconds(100, 4, machine) == pytest.approx(150 / 10 + 3)
    assert scaling_model.gather_seconds(100, 4, machine) == pytest.approx(75 / 10 + 2 * 0.5 + 1)
    # Hidden up to the last part; and what does not fit behind the backward pass stays.
    assert scaling_model.exposed_seconds(backward=10, exchange=4, last=1) == 1
    assert scaling_model.exposed_seconds(backward=1, exchange=4, last=1) == 3


def test_the_scaling_model_is_sane():
    machine = scaling_model.Machine()
    assert scaling_model.predict("small", 1, 16_384, machine)[0].exposed == 0
    steps = [scaling_model.predict("large", world, 16_384, machine)[0] for world in (8, 16, 64, 1000)]
    assert [step.seconds for step in steps] == sorted(step.seconds for step in steps)
    assert steps[-1].sent == pytest.approx(2 * 999 / 1000 * 4 * 104_030_976)
    page = (ROOT / "docs" / "scaling-out.md").read_text(encoding="utf-8")
    for line in scaling_model.table(machine).splitlines()[2:]:
        shown = line.rpartition("|")[0].rpartition("|")[0] + "|"
        assert shown in page, "docs/scaling-out.md shows another table; python -m benchmarks.scaling_model"


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/net/dev").exists(), reason="reads the counters of Linux")
def test_two_processes_send_the_bytes_that_the_equation_says():
    command = [sys.executable, "-m", "benchmarks.communication", "--preset", "tiny", "--tokens", "64", "--steps", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    if "no network namespace" in done.stdout:
        pytest.skip("other programs' traffic counts too, with no right to a network namespace")
    shares = [float(found) for found in re.findall(r"([\d.]+) times the model's", done.stdout)]
    assert shares[0] == pytest.approx(1, abs=0.03)
    assert 1.5 < shares[1] < 2.7


def test_loss_curves_become_a_picture(tmp_path, capsys):
    (tmp_path / "dpo_64_metrics.jsonl").write_text('{"step": 3, "loss": 0.625}\n', encoding="utf-8")
    picture = tmp_path / "größe.svg"
    assert curves.main([str(tmp_path), "--title", "1 < 2", "--output", str(picture)]) == 0
    assert "training 0.625" in picture.read_text(encoding="utf-8") and str(picture) in capsys.readouterr().out
    with pytest.raises(SystemExit):
        curves.main([str(tmp_path / "none"), "--output", str(picture)])
    assert "holds 0 files" in capsys.readouterr().err


def test_the_picture_of_a_session_shows_the_log_and_the_replies(tmp_path, monkeypatch):
    log = [
        "1/6 tokenizer · 0% of the whole is done, about 5m50s left " + "─" * 40,
        "tokenizer: done",
        "pretrain 20/1,821 · loss 2.3",
        "pretrain 1,821/1,821 · loss 0.78",
        "5m12s in all; scoreboard in out/quickstart/scoreboard.json",
        "  tinylm chat --model_path out/dpo --prompt 'Wer <bist> du?'",
    ]

    def run(words, **_):
        assert words[1:] == ["-m", "tinylm", "chat", "--model_path", "out/dpo", "--prompt", "Wer <bist> du?"]
        return subprocess.CompletedProcess(words, 0, stdout="Grüße & <b>mehr</b>\n")

    monkeypatch.setattr(session_picture.subprocess, "run", run)
    (tmp_path / "log").write_text("\n".join(log), encoding="utf-8")
    assert session_picture.main([str(tmp_path / "log"), str(tmp_path / "session.svg")]) == 0
    svg = (tmp_path / "session.svg").read_text(encoding="utf-8")
    shown = html.unescape(re.sub(r"<[^>]*>", "", svg)).replace("\xa0", " ")
    for text in ("make quickstart", "1/6 tokenizer", "pretrain 1,821/1,821", "5m12s in all", "Grüße & <b>mehr</b>"):
        assert text in shown, text
    assert "20/1,821" not in shown and "tokenizer: done" not in shown
    assert "url(" not in re.sub(r"url\(#", "", svg) and "@font-face" not in svg
