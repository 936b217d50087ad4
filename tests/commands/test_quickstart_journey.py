"""How far the quickstart is, on a clock of its own; and the estimate, on this machine's."""

from __future__ import annotations

import io

import pytest

from tinylm.commandline.terminal import make_console, progress
from tinylm.commands import quickstart_journey
from tinylm.commands.quickstart import QuickstartSettings, make_plan
from tinylm.commands.quickstart_journey import SHARES, Journey, expected_seconds, seconds_per_step
from tinylm.system.runtime import setup_runtime


class Clock:
    """Time passes when somebody says so."""

    def __init__(self, monkeypatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(quickstart_journey.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def journey_of(*done: str, console=None) -> Journey:
    return Journey(console or make_console(), 100.0, {step: step in done for step in SHARES})


def test_the_shares_are_of_one_whole():
    assert sum(SHARES.values()) == pytest.approx(1)


def test_the_time_left_follows_the_speed_of_the_steps_that_were_done(clock):
    journey = journey_of()
    assert journey.seconds_left == pytest.approx(100.0)

    def take(seconds):
        clock.now += seconds

    journey.run("tokenizer", lambda: take(50.0))
    assert journey.seconds_left == pytest.approx(99.0), "the tokenizer is too short to measure by"
    journey.run("pretrain", lambda: take(330.0))
    assert journey.seconds_left == pytest.approx(570.0), "380 seconds for 40%"
    assert journey.timed == {"tokenizer": 50.0, "pretrain": 330.0}
    assert journey_of(*SHARES).seconds_left == pytest.approx(0.0)


def test_the_time_left_follows_the_speed_within_a_step(clock):
    """Half of pretraining took 390 seconds, so the whole would take 2,000; 20 of preparation are not training."""
    heard = io.StringIO()
    journey, said = journey_of("tokenizer", console=make_console(file=heard)), []

    def train():
        clock.now += 20
        with progress(make_console(file=heard), "pretrain") as show:
            show("0/800", 0, 800)
            for step in range(1, 401):
                clock.now += 390 / 400
                show(f"{step}/800", step, 800)
        said.append(journey.seconds_left)
        with progress(make_console(file=heard), "tokenising") as show:
            clock.now += 1000
            show("all", 7, 7)
        said.append(journey.share_done)

    journey.run("pretrain", train)
    assert said == pytest.approx([2000 * (0.99 - 0.195), 0.205])
    lines = [line for line in heard.getvalue().splitlines() if "of the whole is done" in line]
    assert len(lines) == 1 + 6, "the heading, and a line a minute of the 410 seconds"
    assert lines[0].startswith("2/6 pretrain · 1% of the whole is done, about 1m39s left")
    assert lines[-1] == "18% of the whole is done, about 27m17s left"


def test_a_step_that_an_earlier_call_began_counts_for_what_this_call_does(clock):
    """The last quarter took 100 seconds: by all of pretraining's share, the whole would seem to take 256."""
    journey = journey_of("tokenizer")

    def train():
        journey.hear("pretrain", 600, 800)
        assert journey.share_done == pytest.approx(0.01 + 0.39 * 0.75)
        clock.now += 100
        journey.hear("pretrain", 800, 800)

    journey.run("pretrain", train)
    assert journey.seconds_left == pytest.approx(0.60 * 100 / (0.39 / 4))


def test_an_estimate_is_the_time_of_real_steps(monkeypatch):
    """More of the data and more of the model take longer; the probe itself ends soon."""
    monkeypatch.setattr(quickstart_journey, "PROBE_SECONDS", 0.05)
    plan, runtime = make_plan(QuickstartSettings()), setup_runtime("cpu")
    step = seconds_per_step(plan.pretrain, 512, runtime)
    assert 0.01 < step < 30
    monkeypatch.setattr(quickstart_journey, "seconds_per_step", lambda settings, vocab_size, runtime: 0.25)
    whole, half = (expected_seconds(scale, plan.pretrain, 1024, runtime) for scale in (1.0, 0.5))
    assert whole - half == pytest.approx(0.5 * quickstart_journey.WHOLE_IN_STEPS * 0.25)
    assert half > 0.5 * whole, "some of it does not shrink with the data"
