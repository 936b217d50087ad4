"""Figures: turns are fair, and medians, ratios and shares mean what they say."""

from __future__ import annotations

import pytest
import torch

from tinylm.benchmark import figures
from tinylm.benchmark.figures import OURS, THEIRS, Bar, Ceilings, Figure, Work, take_turns
from tinylm.system.runtime import Runtime

CPU = Runtime(torch.device("cpu"), torch.float32)


def test_turns_are_interleaved_and_the_first_round_does_not_count(monkeypatch):
    """On a clock that stands still but for the work: 4 and 20 seconds a turn, ten times as long in the first round."""
    order, now = [], [0.0]

    def work(name, seconds):
        def turn():
            order.append(name)
            now[0] += seconds * (10 if len(order) <= 2 else len(order))
            return 60.0

        return turn

    monkeypatch.setattr(figures.time, "perf_counter", lambda: now[0])
    turns = take_turns({OURS: work("a", 4), THEIRS: work("b", 20)}, 2, CPU)
    assert order == ["a", "b"] * 3
    assert turns[OURS].first_seconds == 40 and turns[OURS].seconds == (12, 20)
    assert turns[OURS].speeds == (5.0, 3.0) and turns[THEIRS].speeds == (60 / 80, 60 / 120)


def test_median_ratio_and_json():
    """The ratio is the median of the rounds' ratios (2, 1, 9), not the ratio of the medians (20 / 9)."""
    figure = Figure("step", "here", "Muon", "tokens/s", {OURS: (10.0, 20.0, 90.0), THEIRS: (5.0, 20.0, 10.0)})
    assert (figure.median(), figure.median(THEIRS), figure.ratio) == (20.0, 10.0, 2.0)
    made = figure.to_json(Ceilings())
    assert (made["better"], made["ratio"], made["unit"]) == ("higher", 2.0, "tokens/s")
    ours = made["contenders"][OURS]
    assert (ours["lowest"], ours["median"], ours["highest"]) == (10.0, 20.0, 90.0)
    assert ours["samples"] == [10.0, 20.0, 90.0] and ours["share_of_ceiling"] is None
    alone = Figure("start", "", "tinylm --version", "s", {OURS: (0.25,)})
    assert alone.ratio is None and alone.to_json(Ceilings())["better"] == "lower"


def test_bars_are_of_the_rounds_ratios_or_of_our_own_number():
    """2, 1 and 9 times transformers: 2; 1, 0.5 and 3 times llama.cpp: 1. At the bar is enough."""
    samples = {OURS: (10.0, 20.0, 90.0), THEIRS: (5.0, 20.0, 10.0), "llama.cpp Q8_0": (10.0, 40.0, 30.0)}
    bars = Bar(2.0, THEIRS), Bar(2.01, THEIRS), Bar(1.0, "llama.cpp Q8_0"), Bar(1.5, "llama.cpp Q8_0")
    figure = Figure("serve", "", "1 stream", "tokens/s", samples, bars=bars)
    assert figure.others == ["llama.cpp Q8_0"]
    assert [(figure.reached(bar), figure.meets(bar)) for bar in bars] == [
        (2.0, True), (2.0, False), (1.0, True), (1.0, False),
    ]  # fmt: skip
    made = figure.to_json(Ceilings())
    assert made["bars"][3] == {"contender": "llama.cpp Q8_0", "bound": 1.5, "reached": 1.0, "met": False}
    assert made["ratio"] == 2.0 and made["contenders"]["llama.cpp Q8_0"]["ratio"] == 1.0
    first = Figure("serve", "", "first token", "s", {OURS: (0.1, 0.2, 0.4)}, bars=(Bar(0.2), Bar(0.19)))
    assert [first.meets(bar) for bar in first.bars] == [True, False]


def test_a_share_is_of_the_nearer_ceiling():
    """50 tokens/s of 4 operations are a fifth of 1,000 a second; of 3 bytes each they are half of 300."""
    ceilings = Ceilings(bytes_per_second=300.0)
    ceilings.note_flops("float32", 1000.0)
    assert ceilings.share(50.0, Work("float32", flops=4.0)) == 0.2
    assert ceilings.share(50.0, Work("float32", flops=4.0, num_bytes=3.0)) == 0.5
    assert ceilings.share(50.0, Work("bfloat16", flops=4.0)) is None
    assert Ceilings().share(50.0, Work("float32", flops=4.0, num_bytes=3.0)) is None
    figure = Figure(
        "step", "", "AdamW", "tokens/s", {OURS: (40.0, 50.0, 99.0), THEIRS: (1, 25, 30)}, Work("float32", 4)
    )
    assert (figure.share(ceilings), figure.share(ceilings, THEIRS)) == (0.2, 0.1)
    assert figure.to_json(ceilings)["contenders"][THEIRS]["share_of_ceiling"] == 0.1


def test_the_highest_ceiling_counts():
    """One that was measured on a busy machine would flatter."""
    ceilings = Ceilings()
    for value in (70.0, 100.0, 90.0):
        ceilings.note_flops("bfloat16", value)
    assert ceilings.flops == {"bfloat16": 100.0}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_accelerator_is_waited_for(device, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    take_turns({OURS: lambda: 1.0}, 2, Runtime(torch.device(device), torch.float32))
    assert waited == [torch.device("cuda")] * 6 if device == "cuda" else not waited
