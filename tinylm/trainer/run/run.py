"""A training run around `fit`: it plans, trains, validates, saves, resumes and reports.

Recipes make the parts (stage, learner, data); this module does what all stages share.
"""

from __future__ import annotations

import functools
import json
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tinylm.commandline.exit_status import Stopped, StopRequest
from tinylm.commandline.terminal import closed_pipe_calls, format_seconds
from tinylm.dataset.batches import Batch, Dataset
from tinylm.files.atomic import atomic_write
from tinylm.system.allocator import give_back_freed_memory
from tinylm.system.memory import free_memory, is_out_of_memory
from tinylm.system.runtime import measured_matmul_flops
from tinylm.trainer.core.distributed import is_sharded
from tinylm.trainer.core.failed_steps import StepFailed, first_line
from tinylm.trainer.core.loop import StepReport, fit
from tinylm.trainer.run.checkpoints import Checkpoints, Progress
from tinylm.trainer.run.estimate import expected_memory, expected_seconds, require_memory
from tinylm.trainer.run.fallback import Fallback
from tinylm.trainer.run.report import MetricsLog, RunReport
from tinylm.trainer.run.stage import Learner, Plan, Stage
from tinylm.trainer.run.validation import validate

MAX_SKIPS = 10
"""After so many steps in a row without a finite loss and gradient, the run has diverged and ends."""


class Run:
    """One stage's run. Make it, `fit()` it, and read `progress`.

    Args:
        stage: the stage, its settings and the machine.
        learner: the model, its optimizers and its objective.
        plan: the steps to do.
        validation_data: held-out rows, or None.
        lineage: where the model comes from: parent, data, tokenizer.
    """

    def __init__(
        self, stage: Stage, learner: Learner, plan: Plan, validation_data: Dataset | None, lineage: dict[str, Any]
    ) -> None:
        self.stage, self.learner, self.plan, self.validation_data = stage, learner, plan, validation_data
        self.progress = Progress()
        self.checkpoints = Checkpoints(stage, learner, plan, self.progress, lineage, lambda: self.metrics.flush())
        settings, is_main = stage.settings, stage.runtime.is_main
        self.metrics = MetricsLog(self.checkpoints.folder, self.checkpoints.name, settings.tensorboard, is_main)
        self.report = RunReport(self.checkpoints)
        self.fallback = Fallback(stage, learner, plan, self.progress)
        self.validation_rows = stage.settings.batch_size
        """Rows of a validation batch; lower than asked for after memory ran out."""
        self.spikes = SpikeWatch()
        self.rise = RiseWatch(plan.num_steps, self.progress.first_losses)
        self.skips_in_a_row = 0
        self.steps_done = 0
        self.stop_request = StopRequest(self._acknowledge_stop)

    def fit(self) -> Path:
        """Train from the start, or from the saved state with `--resume`; returns the last model folder.

        Raises:
            Stopped: a signal asked to stop; the step was finished and the state saved.
            RuntimeError: the run has diverged, or its last state could not be saved.
        """
        learner, plan = self.learner, self.plan
        closed_pipe = closed_pipe_calls(self.stage.console, self.stop_request.ask_because_of_closed_pipe)
        with self.checkpoints.owned_folder(), self.stop_request, closed_pipe:
            if self.checkpoints.should_resume():
                self.checkpoints.restore()
                self.fallback.resume()
            else:
                self.checkpoints.require_free()
            matmul_flops = measured_matmul_flops(self.stage.runtime)
            seconds = expected_seconds(plan, matmul_flops, self.report.flops_per_token, self.validation_data)
            self.fallback.decide_to_compile(seconds)
            memory = expected_memory(learner, plan)
            require_memory(memory, plan)
            self.rise = RiseWatch(plan.num_steps, self.progress.first_losses)
            self.report.print_plan(matmul_flops, seconds, memory)
            if not self.checkpoints.should_resume():
                self.checkpoints.clear()
            start = self.progress.step
            if start == 0:
                self.checkpoints.save_snapshot(0)
            if plan.compiled:
                self.fallback.compile()
            with (
                self.metrics.opened(start, self.progress.evaluation_pending),
                self.report.live(),
                self.checkpoints.writing(),
            ):
                if self.progress.evaluation_pending:
                    self._evaluate(start)
                    self._save(start)
                self.steps_done = start
                while not self._fit():
                    free_memory(self.stage.runtime.device)
            self.report.print_result()
            if warning := self.rise.warning():
                self.stage.console.print(f"warning: {warning}; {self._advice_against_a_rise()}")
            if self.stage.runtime.any_rank(bool(self.stop_request.signum)):  # it came after the last step
                raise Stopped(self.stop_request.signum or signal.SIGTERM, " after the last step; the run is finished")
        return self.checkpoints.last_folder

    def _fit(self) -> bool:
        """Train to the end, or to a step that cannot be computed; then change the plan, and return False."""
        learner, plan = self.learner, self.plan
        try:
            fit(
                learner.model,
                learner.objective,
                learner.optimizers,
                plan.learning_rate,
                plan.batches(self.steps_done),
                self.stage.runtime,
                plan.num_steps,
                start_step=self.steps_done,
                grad_clip=self.stage.settings.grad_clip,
                on_step=(self._after_step,),
                scaler=self.checkpoints.scaler,
                at_once=plan.at_once,
            )
        except StepFailed as failure:
            self.fallback.after(failure, self.steps_done + 1)
            return False
        except Exception as error:  # not in a step's gradients, so a part of the step may be done
            if not is_out_of_memory(error):
                raise
            what = f"out of memory after {self.steps_done:,} steps ({first_line(error)})"
            raise RuntimeError(f"{what}; continue with --resume and a smaller --batch_size") from error
        return True

    def validate(self, data: Dataset, step: int = 0) -> dict[str, float]:
        """Mean loss (and the objective's metrics) per target over held-out data, and bits per byte of text.

        If memory runs out, the rows are the same, fewer of them at a time.
        """
        settings, learner, runtime = self.stage.settings, self.learner, self.stage.runtime
        show = functools.partial(self.report.show_validating, step)
        while True:
            rows = self.validation_rows
            sizes = rows, settings.eval_batches * (settings.batch_size // rows)
            try:
                return validate(learner.model, learner.objective, data, *sizes, runtime, show)
            except Exception as error:
                if not is_out_of_memory(error) or rows == 1 or runtime.world_size > 1:
                    raise
            self.validation_rows = max(n for n in range(1, rows // 2 + 1) if settings.batch_size % n == 0)
            what = f"out of memory in a validation of {rows:,} {data.unit} at a time"
            self.stage.console.print(f"warning: {what}; {self.validation_rows:,} at a time from now on")
            free_memory(runtime.device)

    # --- after a step --------------------------------------------------------------------------------------------

    def _after_step(self, report: StepReport) -> None:
        self.steps_done = report.step
        self._log(report)
        self._watch(report)
        self.checkpoints.save_snapshot(report.step)
        if self.stage.runtime.any_rank(bool(self.stop_request.signum)):
            self._stop(report)
        self._evaluate(report.step)
        self._save(report.step)

    def _log(self, report: StepReport) -> None:
        if self.plan.compiled and report.step == self.progress.step + 1:
            self.stage.console.print(f"compiled in the first step, which took {format_seconds(report.seconds)}")
        record = self.report.show_step(report)
        is_first_or_last = report.step in (1, report.num_steps)
        if report.step % self.stage.settings.log_interval == 0 or is_first_or_last or report.skipped:
            self.metrics.write(report.step, record)

    def _acknowledge_stop(self) -> None:
        advice = "finishing the step and saving it; a second Ctrl-C ends the run at once"
        self.stage.console.print(f"stopping: {advice}")

    def _stop(self, report: StepReport) -> None:
        """Save the state and end the run. If an evaluation or a model folder is due, a resume makes it."""
        where = f" after step {report.step:,}, in which nothing was updated; the state before it is kept"
        if not self.skips_in_a_row:
            self.checkpoints.save_state(report.step, evaluation_pending=True)
            where = f" after step {report.step:,}, which is saved"
        self.checkpoints.finish_saving()
        raise Stopped(self.stop_request.signum or signal.SIGTERM, where)

    def _watch(self, report: StepReport) -> None:
        """Count skipped steps, and end the run after `MAX_SKIPS` of them in a row."""
        console, checkpoints = self.stage.console, self.checkpoints
        if not report.skipped:
            self.skips_in_a_row = 0
            self.rise.add(report.loss)
            if warning := self.spikes.warning(report.loss):
                console.print(f"warning: step {report.step:,}: {warning}")
            return
        self.progress.num_skipped += 1
        self.skips_in_a_row += 1
        what = f"step {report.step:,}: the loss is {report.loss:.4g} and the gradient norm {report.grad_norm:.4g}"
        console.print(f"warning: {what}; nothing was updated")
        if self.skips_in_a_row < MAX_SKIPS:
            return
        path = checkpoints.folder / f"{checkpoints.name}_bad_batch_rank{self.stage.runtime.rank}.jsonl"
        tokenizer = self.learner.tokenizer
        write_bad_batch(path, report.step, report.micro_batches, tokenizer.decode if tokenizer is not None else None)
        checkpoints.discard_state(report.step - MAX_SKIPS)  # that step's update may have broken the weights
        raise RuntimeError(
            f"{what}, as in {MAX_SKIPS} steps in a row; the last batch is in {path}, the weights of the last good step "
            f"are in {checkpoints.state_folder}, if one was saved: continue from there with --resume and a lower "
            "--learning_rate or a smaller --grad_clip"
        )

    def _advice_against_a_rise(self) -> str:
        rate = self.stage.settings.peak_learning_rate
        return f"run it again with a lower --learning_rate, such as {rate / 10:g} (now {rate:g}), and --overwrite"

    def _evaluate(self, step: int) -> None:
        if self.validation_data is None or not self.plan.validates_after(step):
            return
        started = time.perf_counter()
        values = self.validate(self.validation_data, step)
        self.progress.note_validation(step, values["validation_loss"])
        interval = self.stage.settings.eval_interval
        is_epoch_only = step != self.plan.num_steps and not (interval and step % interval == 0)
        texts = [] if is_epoch_only else self._sample()
        self.report.show_validation(step, values, texts, time.perf_counter() - started)
        self.metrics.write(step, {**values, **{f"sample_{number}": text for number, text in enumerate(texts)}})

    def _sample(self) -> list[str]:
        # A sharded model needs all processes to compute.
        if self.learner.sample is None or not (self.stage.runtime.is_main or is_sharded(self.learner.model)):
            return []
        give_back_freed_memory()
        try:
            return self.learner.sample()
        except Exception as error:  # ValueError: a step has broken the weights, which `_watch` handles later
            if not (isinstance(error, ValueError) or is_out_of_memory(error)):
                raise
            self.stage.console.print(f"warning: no sample ({error})")
            return []
        finally:
            give_back_freed_memory()

    def _save(self, step: int) -> None:
        interval = self.stage.settings.save_interval
        is_last, is_due = step == self.plan.num_steps, interval and step % interval == 0
        if self.plan.ends_epoch(step):
            self.checkpoints.save_model(step)
        # After a skipped step the weights may be broken; two such states would replace the last good one.
        if is_last or ((self.plan.ends_epoch(step) or is_due) and not self.skips_in_a_row):
            self.checkpoints.save_state(step)
        if is_last:
            self.checkpoints.finish_saving()


class SpikeWatch:
    """Warns if a loss is far above the losses before it. It only warns, because the loss may recover by itself."""

    def __init__(self, num_steps: int = 50, factor: float = 6.0) -> None:
        self.losses: deque[float] = deque(maxlen=num_steps)
        self.factor = factor

    def warning(self, loss: float) -> str | None:
        """A warning if `loss` is more than `factor` standard deviations above the mean of the last `num_steps`."""
        losses, text = self.losses, None
        if len(losses) == losses.maxlen:
            mean = sum(losses) / len(losses)
            deviation = (sum((x - mean) ** 2 for x in losses) / len(losses)) ** 0.5
            if loss > mean + self.factor * deviation:
                text = f"the loss jumped to {loss:.4g}, after {mean:.4g} on average; look at the data of this step"
        losses.append(loss)
        return text


class RiseWatch:
    """Notices a run that ends well above the loss it began with: the model has forgotten more than it has learned.

    Args:
        num_steps: of the whole run.
        first_losses: losses of its first steps, those from before a resume included; it is filled up.
    """

    def __init__(self, num_steps: int, first_losses: list[float]) -> None:
        self.num_compared = max(1, min(10, num_steps // 10))
        self.first = first_losses
        self.last: deque[float] = deque(maxlen=self.num_compared)

    def add(self, loss: float) -> None:
        """Count a step."""
        if len(self.first) < self.num_compared:
            self.first.append(loss)
        self.last.append(loss)

    def warning(self) -> str | None:
        """A warning if the last steps' mean is more than a fifth, and 0.1 nats, above that of the first steps."""
        if len(self.first) < self.num_compared or len(self.last) < self.num_compared:
            return None
        before, after = (sum(losses) / len(losses) for losses in (self.first, self.last))
        if after <= 1.2 * before + 0.1:
            return None
        return f"the loss rose from {before:.2f} in the first steps to {after:.2f} in the last"


def write_bad_batch(path: Path, step: int, batches: Iterable[Batch], decode: Callable[[list[int]], str] | None) -> None:
    """Write the rows of a step whose loss was not a number, for inspection; one JSON object per line."""
    with atomic_write(path) as file:
        for number, batch in enumerate(batches):
            for ids, targets in zip(batch.input_ids.tolist(), batch.targets.tolist(), strict=True):
                text = {"text": decode(ids)} if decode is not None else {}
                row = {"step": step, "micro_batch": number, **text, "input_ids": ids, "targets": targets}
                file.write(json.dumps(row).encode() + b"\n")
