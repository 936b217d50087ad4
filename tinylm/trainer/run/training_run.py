"""A training run around `fit`: the plan, the order of the data, evaluation, checkpoints, resume, the report.

Recipes make the parts (data, model, optimizers) and hand them over; what all stages share is here, once.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from tinylm.checkpoint.training_state import StateWriter, discard_latest_state
from tinylm.commandline.exit_status import Stopped, StopRequest
from tinylm.dataset.batches import Batch, Dataset, step_batches
from tinylm.files.atomic import remove_leftovers
from tinylm.files.locks import run_lock
from tinylm.system.runtime import measured_matmul_flops
from tinylm.trainer.core.distributed import is_sharded, whole
from tinylm.trainer.core.loop import StepReport, fit
from tinylm.trainer.run.report import print_plan, print_result
from tinylm.trainer.run.run_state import Run
from tinylm.trainer.run.trainer_utils import (
    MetricsLog,
    ProgressLine,
    SpikeWatch,
    fingerprint_of,
    relative_change,
    snapshot,
    training_flops_per_token,
    write_bad_batch,
)
from tinylm.trainer.run.validation import validate

MOST_SKIPS = 10
"""Steps in a row whose loss or gradient may be no number; then the run has diverged and ends."""


class TrainingRun(Run):
    """A run that trains. Make it, `fit()` it, and read `best_validation_loss`."""

    # --- the run -------------------------------------------------------------------------------------------------

    def fit(self) -> Path:
        """Train, from the start or from where `--resume` finds it; returns the last model folder.

        Raises:
            Stopped: a signal asked for it; the step was finished and the state saved.
            RuntimeError: the run has diverged, or its end could not be saved.
        """
        self.spikes = SpikeWatch()
        with self._owned_folder(), StopRequest() as self.stop_request:
            # The weights as the recipe made them: the run's true start, before anything is loaded over them.
            self.first_weights = snapshot(self.model.parameters())
            self.first_fingerprint = fingerprint_of(self.first_weights)
            if self.goes_on():
                self.restore()
            matmul_flops = measured_matmul_flops(self.runtime)
            context, size = float(self.settings.max_seq_len), sum(p.numel() for p in self.model.parameters())
            flops = training_flops_per_token(self.model.config, size, context)
            print_plan(self, flops, matmul_flops)
            self.note_unfinished()
            self.metrics = (
                MetricsLog(self.output_dir, self.name, self.start_step, self.settings.tensorboard, self.is_pending)
                if self.runtime.is_main
                else None
            )
            self.line = ProgressLine(
                self.console, self.runtime, self.stage, self.num_steps, self.start_step, flops, matmul_flops,
                self.settings.log_interval,
            )  # fmt: skip
            started = time.perf_counter()
            self._train()
            seconds = time.perf_counter() - started
            print_result(self, seconds, relative_change(self.first_weights, self.model.parameters()))
        return self.last_folder

    def _train(self) -> None:
        if self.settings.use_compile:
            self.model.model.compile(dynamic=False)  # in place, so parameter names stay what they are
        flush = self.metrics.flush if self.metrics is not None else None
        self.states = StateWriter(self.state_folder, self.optimizers, is_sharded(self.model), flush)
        try:
            if self.is_pending:
                self._evaluate(self.start_step)
                self._save(self.start_step)
            fit(
                self.model,
                self.objective,
                self.optimizers,
                lambda step: self.settings.learning_rate_at(step, self.num_steps),
                self._step_batches(),
                self.runtime,
                self.num_steps,
                start_step=self.start_step,
                grad_clip=self.settings.grad_clip,
                on_step=(self._after_step,),
                scaler=self.scaler,
                num_workers=self.parts,
            )
        finally:
            self.states.close()
            self.line.close()
            if self.metrics is not None:
                self.metrics.close()

    @contextlib.contextmanager
    def _owned_folder(self) -> Iterator[None]:
        """The stage's files in the run folder belong to this run; what a killed one has left half written goes."""
        # The process that had the folder before may have been lost with its machine: not as long as the others wait.
        patience = self.settings.timeout / 2 if self.is_restarted() else 0.0
        with contextlib.ExitStack() as stack:
            refusal = None
            if self.runtime.is_main:
                try:
                    stack.enter_context(run_lock(self.output_dir / f".{self.stage}.lock", patience))
                    for left in self.output_dir.glob(f".{self.stage}_*"):
                        remove_leftovers(self.output_dir / left.name[1:].rsplit(".", 2)[0])
                except (ValueError, OSError) as error:
                    refusal = error
            if self.runtime.any_rank(refusal is not None):
                raise refusal or ValueError("the main process could not take the run's folder")
            yield

    def _step_batches(self) -> Iterator[list[Batch]]:
        """For each optimizer step from `start_step` on, its micro-batches; a step never spans two epochs.

        Dropout's generator is seeded by (seed, step, rank): a resumed run draws what the unbroken run drew, with no
        generator state to keep.
        """
        settings = self.settings
        step = self.start_step
        for epoch in range(step // self.steps_per_epoch, settings.epochs):
            start = step % self.steps_per_epoch
            for batches in step_batches(self.train_data, self.sampler, epoch, start, settings.num_workers):
                torch.manual_seed((settings.seed * 1_000_003 + step) * 1_009 + self.runtime.rank)
                self.batches = batches
                yield batches
                step += 1

    # --- what happens after a step ---------------------------------------------------------------------------------

    def _after_step(self, report: StepReport) -> None:
        self._log(report)
        self._watch(report)
        if self.runtime.any_rank(bool(self.stop_request.signum)):
            # At once: evaluation and model folder, if they are due, come when the run goes on.
            where = f" after step {report.step:,}, in which nothing was updated; the state before it stays"
            if not self.skips_in_a_row:
                self._save_state(report.step, is_pending=True)
                where = f" after step {report.step:,}, which is saved"
            self._finish_saving()
            raise Stopped(self.stop_request.signum or signal.SIGTERM, where)
        self._evaluate(report.step)
        self._save(report.step)

    def _log(self, report: StepReport) -> None:
        values = self.line.update(report)
        is_due = report.step % self.settings.log_interval == 0 or report.step == 1 or report.skipped
        if self.metrics is not None and is_due:
            self.metrics.write(report.step, values)

    def _watch(self, report: StepReport) -> None:
        """Count the steps that were skipped, and end a run that does nothing else any more."""
        if not report.skipped:
            self.skips_in_a_row = 0
            if warning := self.spikes.warning(report.loss):
                self.console.print(f"warning: step {report.step:,}: {warning}")
            return
        self.num_skipped += 1
        self.skips_in_a_row += 1
        what = f"step {report.step:,}: the loss is {report.loss:.4g} and the gradient norm {report.grad_norm:.4g}"
        self.console.print(f"warning: {what}; nothing was updated", markup=False)
        if self.skips_in_a_row < MOST_SKIPS:
            return
        name = f"{self.name}_bad_batch_rank{self.runtime.rank}.jsonl"
        write_bad_batch(self.output_dir / name, report.step, self.batches, self.decode)
        self.states.wait()
        if self.runtime.is_main:  # what the last update left computes no numbers
            discard_latest_state(self.state_folder, report.step - MOST_SKIPS)
        raise RuntimeError(
            f"{what}, as in {MOST_SKIPS} steps in a row; the last batch is in {self.output_dir / name}, the weights of "
            f"the last good step are in {self.state_folder}, if one was saved: go on from there with --resume and a "
            "lower --learning_rate or a smaller --grad_clip"
        )

    def _evaluate(self, step: int) -> None:
        is_due = self.settings.eval_interval and step % self.settings.eval_interval == 0
        if self.validation_data is None or not (is_due or step == self.num_steps):
            return
        values: dict[str, float | str] = dict(self.validate(self.validation_data))
        loss = float(values["validation_loss"])
        self.line.validation_loss = loss
        if math.isfinite(loss) and (self.best_validation_loss is None or loss < self.best_validation_loss):
            self.best_validation_loss = loss
        # A sharded model computes with all processes, or not at all.
        can_sample = self.sample is not None and (self.runtime.is_main or is_sharded(self.model))
        texts = self._samples() if can_sample else []
        if not self.runtime.is_main:
            return
        shown = " · ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())
        self.console.print(f"{self.stage} {step}/{self.num_steps} · {shown}")
        for index, text in enumerate(texts):
            self.console.print(f"    {' '.join(text.split())}", style="dim", markup=False)
            values[f"sample_{index}"] = text
        if self.metrics is not None:
            self.metrics.write(step, values)

    def _samples(self) -> list[str]:
        assert self.sample is not None
        try:
            return self.sample()
        except ValueError as error:  # weights that a step has just broken: the steps that follow tell more
            self.console.print(f"warning: no sample ({error})", markup=False)
            return []

    def validate(self, data: Dataset) -> dict[str, float]:
        """Mean loss (and the objective's metrics) per target over the held-out data, and bits per byte of text."""
        settings = self.settings
        return validate(self.model, self.objective, data, settings.batch_size, settings.eval_batches, self.runtime)

    # --- state -----------------------------------------------------------------------------------------------------

    def _save(self, step: int) -> None:
        epoch_done = step % self.steps_per_epoch == 0 or step == self.num_steps
        is_due = self.settings.save_interval and step % self.settings.save_interval == 0
        if epoch_done:
            self._save_model(step)
        # After a skipped step the weights may be broken already; two such states would push out the last good one.
        if step == self.num_steps or ((epoch_done or is_due) and not self.skips_in_a_row):
            self._save_state(step)
        if step == self.num_steps:
            self._finish_saving()

    def _save_model(self, step: int) -> None:
        epoch = -(-step // self.steps_per_epoch) - 1
        facts = {
            "epoch": epoch,
            "step": step,
            "finished": step == self.num_steps,
            "best_validation_loss": self.best_validation_loss,
            **({"skipped_steps": self.num_skipped} if self.num_skipped else {}),
            **({"changed_on_resume": self.changes} if self.changes else {}),
        }
        with whole(self.model):
            if self.runtime.is_main:
                self.save(self.model_folder(epoch), {"stage": self.stage, **facts, **self.lineage})

    def _save_state(self, step: int, is_pending: bool = False) -> None:
        """Begin to save the state; one that could not be saved is said and does not end the run, which may save the
        next.
        """
        if self.runtime.is_main or is_sharded(self.model):
            error = self.states.save({**self.state(step), "is_pending": is_pending})
            if error is not None:
                self.console.print(f"warning: the last training state could not be saved ({error})", markup=False)

    def _finish_saving(self) -> None:
        if error := self.states.wait():
            raise RuntimeError(f"the training state could not be saved: {error}") from error
