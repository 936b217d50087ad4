"""How far the quickstart is, and how long it will take: estimated from a few training steps, corrected as it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console

from tinylm.commandline.terminal import format_seconds, progress_heard_by
from tinylm.dataset.rows import Batch, build_row, collate_rows
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.system.runtime import Runtime
from tinylm.trainer.core.gradients import micro_batches_at_once
from tinylm.trainer.core.loop import StepReport, fit
from tinylm.trainer.core.objectives import next_token_loss
from tinylm.trainer.train_pretrain import PretrainSettings

SHARES = {"tokenizer": 0.01, "pretrain": 0.39, "full_sft": 0.39, "lora": 0.07, "dpo": 0.07, "scoreboard": 0.07}
"""Share of the time that each step takes, measured on two cores."""
WHOLE_IN_STEPS = 1_880
"""The time of all that grows with the data, in steps of pretraining, measured on two cores."""
FIXED_SECONDS = 16.0
"""What it takes beside, with any amount of data."""
PROBE_SECONDS, NUM_WARMUP = 2.0, 2
"""Time of the training steps that the estimate rests on, and the number of those that are not counted."""
ENOUGH_TO_MEASURE = 0.05
"""Share of the whole from which its speed counts, and no longer the estimate: the tokenizer says little."""
SAY_EVERY = 60.0
"""Seconds from one line on the whole to the next."""


class Journey:
    """How far the whole is: the steps that are done, and the time that the others will take.

    Args:
        seconds: what the whole will take, estimated before the first step.
        is_done: which steps an earlier call has done.
    """

    def __init__(self, console: Console, seconds: float, is_done: dict[str, bool]) -> None:
        self.console = console
        self.seconds = seconds
        self.done = [step for step, done in is_done.items() if done]
        self.timed: dict[str, float] = {}
        self.measured: dict[str, tuple[float, float]] = {}
        """Of each step that this call worked on: (share of the whole, seconds)."""
        self.step, self.part = "", 0.0
        """What is being done, and how much of it is done, from 0 to 1."""
        self.first: tuple[float, float] | None = None
        """The part that was done, and the time, when the step was first heard of: an earlier call may have begun it."""
        self.spoke_at = time.perf_counter()

    @property
    def share_done(self) -> float:
        """Share of the whole."""
        return sum(SHARES[step] for step in self.done) + SHARES.get(self.step, 0.0) * self.part

    @property
    def seconds_left(self) -> float:
        """Time for what is not done, at the speed of what this call did."""
        share = sum(share for share, _ in self.measured.values())
        seconds = sum(seconds for _, seconds in self.measured.values())
        whole = seconds / share if share >= ENOUGH_TO_MEASURE else self.seconds
        return whole * (1 - self.share_done)

    def say_start(self, runtime: Runtime, output_dir: str) -> None:
        """One line: what will happen, and how long it will take."""
        device = f"{runtime.device}, {str(runtime.compute_dtype).removeprefix('torch.')}"
        is_open = len(self.done) < len(SHARES)
        left = f"about {format_seconds(self.seconds_left)}" if is_open else "nothing is left to do"
        self.console.print(f"{', '.join(SHARES)} in {output_dir}: {left} ({device})")
        if is_open:
            self.console.print("Ctrl-C stops it; the same command continues where it stopped")

    def run(self, step: str, function: Callable[[], Any]) -> Any:
        """Do a step, under a heading that says how far the whole is."""
        number = f"{list(SHARES).index(step) + 1}/{len(SHARES)}"
        self.console.rule(f"{number} {step} · {self._how_far()}", align="left")
        self.step, self.part, self.first = step, 0.0, None
        started = self.spoke_at = time.perf_counter()
        with progress_heard_by(self.hear):
            result = function()
        self.timed[step] = time.perf_counter() - started
        begun = self.first[0] if self.first else 0.0
        self.measured[step] = SHARES[step] * (1 - begun), self.timed[step]
        self.step, self.part = "", 0.0
        self.done.append(step)
        return result

    def hear(self, step: str, done: int, total: int) -> str | None:
        """Measure the speed of the step in work; once in a while, say how far the whole is."""
        now = time.perf_counter()
        if step != self.step:
            return None
        self.part = done / total
        self.first = self.first or (self.part, now)
        self.measured[step] = SHARES[step] * (self.part - self.first[0]), now - self.first[1]
        if now - self.spoke_at < SAY_EVERY:
            return None
        self.spoke_at = now
        return self._how_far()

    def _how_far(self) -> str:
        return f"{self.share_done:.0%} of the whole is done, about {format_seconds(self.seconds_left)} left"

    def skip(self, step: str, where: object) -> None:
        """Say that an earlier call has done a step."""
        number = f"{list(SHARES).index(step) + 1}/{len(SHARES)}"
        self.console.print(f"{number} {step}: already done, {where}")


def seconds_per_step(settings: PretrainSettings, vocab_size: int, runtime: Runtime) -> float:
    """Time of a step of pretraining, from steps on random tokens; they take `PROBE_SECONDS`, or a little more.

    Other programs count: the speed of the matrix product alone, at its best, made the estimate 40% too low beside them.
    """
    model = TinyLMForCausalLM(settings.model_config(vocab_size)).to(runtime.device)
    at_once = micro_batches_at_once(settings.batch_size, model, runtime)
    ids = torch.randint(vocab_size, (settings.batch_size // at_once, settings.max_seq_len + 1)).numpy()
    batch = collate_rows([build_row([(row, None)]) for row in ids], settings.max_seq_len, pad_id=0)
    reports: list[StepReport] = []

    def batches() -> Iterator[list[Batch]]:
        deadline = time.perf_counter() + PROBE_SECONDS
        while len(reports) < NUM_WARMUP or time.perf_counter() < deadline:
            yield [batch] * at_once

    fit(
        model,
        next_token_loss,
        settings.make_optimizers(model),
        lambda step: settings.peak_learning_rate,
        batches(),
        runtime,
        num_steps=1_000,
        on_step=(reports.append,),
        at_once=at_once,
    )
    timed = [report.seconds for report in reports[NUM_WARMUP:]] or [reports[-1].seconds]
    return sum(timed) / len(timed)


def expected_seconds(scale: float, pretrain: PretrainSettings, vocab_size: int, runtime: Runtime) -> float:
    """Time for the whole on this machine, from that of a training step.

    Args:
        scale: share of the data.
    """
    return FIXED_SECONDS + scale * WHOLE_IN_STEPS * seconds_per_step(pretrain, vocab_size, runtime)
