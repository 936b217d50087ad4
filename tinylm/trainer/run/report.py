"""The output of a run: its plan, a line per step, its result, the metrics file, and TensorBoard."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from tinylm.commandline.terminal import (
    ShowProgress,
    format_count,
    format_seconds,
    lines_of_words,
    print_facts,
    progress,
)
from tinylm.files.atomic import atomic_write
from tinylm.trainer.core.loop import StepReport
from tinylm.trainer.run.checkpoints import Checkpoints
from tinylm.trainer.run.estimate import Memory, Pace


class RunReport:
    """What a run prints. On a terminal the line of a step is redrawn in place; elsewhere every `log_interval` steps."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.stage, self.learner, self.plan = checkpoints.stage, checkpoints.learner, checkpoints.plan
        model = self.learner.model
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        context = float(self.stage.settings.max_seq_len)
        self.flops_per_token = model.training_flops_per_token(context)
        self.matmul_flops = 1.0
        self.tokens_per_second = 0.0
        self.validation_loss: float | None = None
        self.pace = Pace(self.plan)
        self.started = 0.0
        self.words: list[str] = []
        self.show: ShowProgress = lambda words, done=None, total=None, is_due=False: None

    def print_plan(self, matmul_flops: float, seconds: float, memory: Memory) -> None:
        """Print the plan: sizes, steps, device, estimated time and memory.

        Args:
            matmul_flops: the device's measured speed, in operations per second.
            seconds: what the run is expected to take.
        """
        self.matmul_flops = matmul_flops
        settings, runtime, plan = self.stage.settings, self.stage.runtime, self.plan
        device = f"{runtime.device}, {str(runtime.compute_dtype).removeprefix('torch.')}"
        if runtime.world_size > 1:
            shares = ", each a share of the model" if settings.sharding == "fsdp" else ""
            device += f", {runtime.world_size} processes{shares}"
        device += ", compiled" if plan.compiled else ""
        total, trained = self.num_parameters, self.num_trained
        share = f", of which {trained:,} train ({trained / total:.2%})" if trained < total else ""
        of = f" of {memory.limit / 1e9:,.1f}" if memory.limit else ""
        facts = {
            "parameters": f"{total:,}{share}",
            "data": plan.source.description,
            "steps": self._steps(),
            "optimizer": f"{settings.optimizer}, learning rate up to {settings.peak_learning_rate:.3g}",
            "device": device,
            "estimate": f"about {format_seconds(seconds)}, {memory.needed / 1e9:.1f}{of} GB of memory",
            "output": str(self.checkpoints.last_folder),
        }
        if self.checkpoints.progress.step:
            is_finished = self.checkpoints.progress.step == plan.num_steps
            is_done = is_finished and not self.checkpoints.progress.evaluation_pending
            rest = ", the last: the run is finished, and nothing is left to train" if is_done else ""
            facts["resuming"] = f"from step {self.checkpoints.progress.step:,}{rest}"
        print_facts(self.stage.console, f"{self.stage.name}: what will happen", facts)

    def _steps(self) -> str:
        """Number of steps, epochs, and rows of a step."""
        plan, settings = self.plan, self.stage.settings
        epochs, per_epoch = plan.last_epoch + 1, plan.steps_per_epoch
        rows = min(plan.source.rows_per_step, plan.source.num_rows)
        text = f"{plan.num_steps:,} in {epochs:,} epoch{'s' * (epochs > 1)}, each {rows:,} {plan.source.unit}"
        text += f" x {settings.max_seq_len:,}"
        if settings.max_steps and epochs > settings.epochs:
            text += f" (--max_steps; the data is repeated after every {per_epoch:,} step{'s' * (per_epoch > 1)})"
        elif settings.max_steps and plan.num_steps < settings.epochs * per_epoch:
            text += f" (--max_steps; all data would take {settings.epochs * per_epoch:,})"
        return text

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """Inside the block, steps can be shown."""
        self.started = time.perf_counter()
        with progress(self.stage.console, self.stage.name, clock=False) as self.show:
            start = self.checkpoints.progress.step
            self.show(f"{start}/{self.plan.num_steps}", start, self.plan.num_steps)
            yield

    def show_step(self, report: StepReport) -> dict[str, float]:
        """Show a step: time left, loss, validation loss, metrics, tokens/s; returns its record."""
        speed = report.num_tokens / report.seconds
        keep = 0.9 if self.tokens_per_second else 0.0  # a moving average over about ten steps
        self.tokens_per_second = keep * self.tokens_per_second + (1 - keep) * speed
        self.pace.add_step(report.seconds)
        words = [f"loss {report.loss:.3f}"]
        if self.validation_loss is not None:
            words.append(f"val {self.validation_loss:.3f}")
        words += [f"{name.replace('_', ' ')} {value:.3g}" for name, value in report.metrics.items()]
        self.words = [*words, f"{format_count(self.tokens_per_second)} tok/s"]
        is_due = report.step % self.stage.settings.log_interval == 0 or report.step == report.num_steps
        self._show(report.step, f"{format_seconds(self.pace.seconds_left(report.step))} left", is_due)
        return {
            "loss": report.loss,
            "learning_rate": report.learning_rate,
            "grad_norm": report.grad_norm,
            "tokens_per_second": round(self.tokens_per_second, 1),
            "matmul_share": round(self._flops() / (self.matmul_flops * self.stage.runtime.world_size), 4),
            **report.metrics,
        }

    def _flops(self) -> float:
        """Operations per second of all processes."""
        return self.tokens_per_second * self.flops_per_token

    def _show(self, step: int, what: str, is_due: bool = False) -> None:
        words = [f"{step}/{self.plan.num_steps}", what, *self.words]
        self.show(words, step, self.plan.num_steps, is_due)

    def show_validating(self, step: int, done: int, total: int) -> None:
        """Show that a validation has computed `done` of its `total` batches."""
        self._show(step, f"validating {done} of {total}")

    def show_validation(self, step: int, values: Mapping[str, float], texts: Sequence[str], seconds: float) -> None:
        """Show the result of a validation, and the texts that the model wrote."""
        self.validation_loss = values["validation_loss"]
        self.pace.add_validation(seconds)
        words = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items()]
        for line in lines_of_words([f"{self.stage.name} {step}/{self.plan.num_steps}", *words]):
            self.stage.console.print(line)
        for text in texts:
            self.stage.console.print(f"    {' '.join(text.split())}", style="dim")
        self._show(step, "training")

    def print_result(self) -> None:
        """Print the result: time, speed, best loss, how far the weights moved, and the model's folder."""
        progress, checkpoints = self.checkpoints.progress, self.checkpoints
        facts = {"time": format_seconds(time.perf_counter() - self.started)}
        if self.tokens_per_second:
            facts["speed"] = f"{self.tokens_per_second:,.0f} tokens/s, {self._flops() / 1e9:,.0f} GFLOP/s"
        if progress.best_validation_loss is not None:
            facts["best validation loss"] = f"{progress.best_validation_loss:.4f}"
        if progress.num_skipped:
            steps = f"{progress.num_skipped:,} of {self.plan.num_steps:,} steps"
            facts["skipped"] = f"{steps}, whose loss or gradient was not a number"
        change = checkpoints.movement.measure()
        times = f"{change:.1%} of" if change < 1 else f"{change:.1f} times"
        facts["weights moved"] = f"{times} their size at the start{checkpoints.movement.since}"
        facts["model"] = str(checkpoints.last_folder)
        print_facts(self.stage.console, f"{self.stage.name}: done", facts)
        if change < 1e-5 and progress.step < self.plan.num_steps:
            self.stage.console.print("warning: the weights hardly moved; raise --learning_rate or train for more steps")
        self._print_models()

    def _print_models(self) -> None:
        """Say which epochs' models are kept, if there were several."""
        if not self.stage.runtime.is_main:
            return
        checkpoints, console = self.checkpoints, self.stage.console
        last, kept = self.plan.last_epoch, checkpoints.models()
        if removed := last + 1 - len(kept):
            epochs = ", ".join(map(str, kept))
            console.print(f"kept: epoch {epochs} of 0 to {last}; {removed} removed; --keep_epochs all keeps them")
        best = checkpoints.best_model()
        if best is not None and best[0] != last:
            path = checkpoints.model_folder(best[0])
            console.print(f"lowest validation loss, {best[1]:.4f}: {path}")
            console.print("other commands take the last epoch, unless you name another; fewer --epochs may do better")


class MetricsLog:
    """The metrics file of a run, and TensorBoard; only the main process writes them.

    A resumed run drops the lines after the step that it resumes from, and lines that a full disk has cut, so every step
    is there once.

    Args:
        folder: of the run.
        name: of the run in its folder: stage and width, such as pretrain_512.
        is_main: whether this process writes.
    """

    def __init__(self, folder: Path, name: str, tensorboard: bool = False, is_main: bool = True) -> None:
        self.folder, self.name = folder, name
        self.path = folder / f"{name}_metrics.jsonl"
        self.tensorboard, self.is_main = tensorboard, is_main
        self.file: IO[str] | None = None
        self.writer: Any = None

    @contextlib.contextmanager
    def opened(self, start_step: int, evaluation_pending: bool = False) -> Iterator[None]:
        """Open the files for the block.

        Args:
            evaluation_pending: the evaluation of `start_step` is still to be made, so a line of it is dropped: a run
                that was killed later wrote it.
        """
        if not self.is_main:
            yield
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if start_step > 0 and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _is_kept(line, start_step, evaluation_pending)]
        with atomic_write(self.path) as file:
            file.writelines(f"{line}\n".encode() for line in kept)
        if self.tensorboard:
            self.writer = _tensorboard_writer(self.folder / "tensorboard" / self.name, start_step)
        try:
            with self.path.open("a", encoding="utf-8", buffering=1) as self.file:
                yield
        finally:
            if self.writer is not None:
                self.writer.close()
            self.file = self.writer = None

    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        """Record the values of one step; NaN and infinite numbers become null, because JSON has neither."""
        if self.file is None:
            return
        record = {"step": step, **{name: _json_value(value) for name, value in values.items()}}
        self.file.write(json.dumps(record) + "\n")
        if self.writer is not None:
            for name, value in values.items():
                if isinstance(value, str):
                    self.writer.add_text(name, value, step)
                else:
                    self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Flush the lines to the disk; called before a state is saved, so that no step is missing after a power cut."""
        if self.file is not None:
            os.fsync(self.file.fileno())


def _is_kept(line: str, start_step: int, evaluation_pending: bool) -> bool:
    try:
        record = json.loads(line)
        step = int(record["step"])
    except (ValueError, KeyError, TypeError):  # the line was cut
        return False
    return step < start_step or (step == start_step and not (evaluation_pending and "validation_loss" in record))


def _json_value(value: float | str) -> float | str | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tensorboard_writer(folder: Path, start_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "--tensorboard needs the package tensorboard; install it with: pip install 'tinylm[track]'"
        ) from error
    return SummaryWriter(str(folder), purge_step=start_step + 1)
