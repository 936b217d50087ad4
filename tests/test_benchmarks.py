"""The benchmarks at miniature shape: fair (same weights, same work, in turns) and able to run."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import curves, decode, scaling_model, session_picture, side_by_side, train_step
from benchmarks.side_by_side import OURS, THEIRS, equal_models, results_of, time_in_turns, with_best_ceilings
from tinylm.model.model_tinylm import TinyLMConfig

ROOT = Path(__file__).resolve().parent.parent
MINIATURE = ["--preset", "tiny", "--hidden_size", "32", "--num_hidden_layers", "1", "--device", "cpu"]
FLOAT32 = ["--precision", "float32", "--rounds", "1"]


def test_both_contestants_compute_the_same():
    config = TinyLMConfig.preset("tiny", hidden_size=32, num_hidden_layers=2)
    ours, theirs = equal_models(config)
    ids = torch.randint(3, config.vocab_size, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    turns = [
        decode.our_generation(decode.Engine(ours.eval(), dtype=torch.float32), ids.tolist(), 5),
        decode.their_generation(theirs.eval(), ids.tolist(), 5),
    ]
    assert [turn() for turn in turns] == [10, 10]


def test_turns_are_interleaved_and_the_first_round_is_not_counted(monkeypatch):
    """On a clock that stands still but for the work: 4 and 20 seconds a turn, ten times as long in the first round."""
    order, now = [], [0.0]

    def work(name, seconds):
        def turn():
            order.append(name)
            now[0] += seconds * (10 if len(order) <= 2 else 1)
            return 10

        return turn

    monkeypatch.setattr(side_by_side.time, "perf_counter", lambda: now[0])
    speeds = time_in_turns({OURS: work("a", 4), THEIRS: work("b", 20)}, 2, lambda: None)
    assert order == ["a", "b"] * 3
    assert speeds == {OURS: [2.5, 2.5], THEIRS: [0.5, 0.5]}


def test_medians_ratios_and_ceiling():
    speeds = {OURS: [10.0, 30.0, 20.0], THEIRS: [10.0, 10.0, 10.0]}
    ours, theirs = results_of("here", "float32", speeds, flops_per_token=2.0, ceiling=100.0)
    assert (ours.tokens_per_second, ours.ratio, ours.flops) == (20.0, 2.0, 40.0)
    assert theirs.ratio == 1.0
    disturbed = results_of("there", "float32", speeds, flops_per_token=2.0, ceiling=7.0)
    other = results_of("there", "bfloat16", speeds, flops_per_token=2.0, ceiling=300.0)
    ceilings = [result.ceiling for result in with_best_ceilings([ours, *disturbed, *other])]
    assert ceilings == [100.0, 100.0, 100.0, 300.0, 300.0]


def test_train_step_runs_and_reports(tmp_path, capsys):
    output = tmp_path / "report.json"
    shape = ["--max_seq_len", "8", "--batch_size", "2"]
    assert train_step.main([*MINIATURE, *FLOAT32, *shape, "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert [result["system"] for result in report["results"]] == [OURS, THEIRS]
    assert all(result["tokens_per_second"] > 0 for result in report["results"])
    assert "cores" in report["machine"] and "of ceiling" in capsys.readouterr().out


def test_decode_runs(capsys):
    assert decode.main([*MINIATURE, *FLOAT32, "--batch_sizes", "1,2", "--max_new_tokens", "3"]) == 0
    printed = capsys.readouterr().out
    assert "one stream" in printed and "2 streams" in printed


@pytest.mark.parametrize(
    "build",
    [
        lambda: train_step.TrainStepSettings(preset="huge"),
        lambda: train_step.TrainStepSettings(rounds=0),
        lambda: decode.DecodeSettings(batch_sizes="1,none"),
    ],
)
def test_settings_are_checked(build):
    with pytest.raises(ValueError, match="expected"):
        build()


# --- several processes ------------------------------------------------------------------------------------------------


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
