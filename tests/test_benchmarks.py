"""The benchmarks at miniature shape: fair (same weights, same work, in turns) and able to run."""

from __future__ import annotations

import json
import time

import pytest
import torch

from benchmarks import decode, train_step
from benchmarks.side_by_side import OURS, THEIRS, equal_models, results_of, time_in_turns, with_best_ceilings
from tinylm.model.model_tinylm import TinyLMConfig

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


def test_turns_are_interleaved_and_the_first_round_is_not_counted():
    order = []

    def work(name, seconds):
        def turn():
            order.append(name)
            time.sleep(seconds)
            return 10

        return turn

    speeds = time_in_turns({OURS: work("a", 0.002), THEIRS: work("b", 0.02)}, 2, lambda: None)
    assert order == ["a", "b"] * 3
    assert [len(values) for values in speeds.values()] == [2, 2]
    assert min(speeds[OURS]) > max(speeds[THEIRS])


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
