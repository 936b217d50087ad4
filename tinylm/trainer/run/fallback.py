"""How a run computes its steps, compiled or not, and what it does when a step cannot be computed as planned.

Such a step is computed again, in smaller micro-batches or without compilation, from the same weights and seeds. So the
run continues, to the bit, as one that was planned like this from that step on.
"""

from __future__ import annotations

from itertools import islice

import torch

from tinylm.system.compile_cache import cpp_compiler
from tinylm.system.memory import free_memory
from tinylm.trainer.core.distributed import is_sharded
from tinylm.trainer.core.failed_steps import StepFailed, first_line
from tinylm.trainer.core.gradients import micro_batches_at_once
from tinylm.trainer.run.checkpoints import Progress
from tinylm.trainer.run.estimate import compiling_saves_time
from tinylm.trainer.run.stage import Learner, Plan, Stage


class Fallback:
    """Changes the plan of a run, in place: before the first step, and after one that could not be computed."""

    def __init__(self, stage: Stage, learner: Learner, plan: Plan, progress: Progress) -> None:
        self.stage, self.learner, self.plan, self.progress = stage, learner, plan, progress
        self._cut_batches(plan.batch_size)

    def resume(self) -> None:
        """Continue with the batch size that the resumed run had after memory ran out."""
        if size := self.progress.lowered_batch_size:
            self._cut_batches(size)
            self._note(f"{size} {self._unit} at a time, because memory did not suffice for more before")

    def decide_to_compile(self, seconds: float) -> None:
        """Decide whether the model runs compiled: as told, or for `auto` where a run of `seconds` gains by it.

        A resumed run computes as it did before. Batches that all have another shape would be compiled each. Several
        processes compile only if told, because one in which that fails would stop them all.
        """
        plan, runtime = self.plan, self.stage.runtime
        is_auto = self.stage.settings.use_compile == "auto"
        if is_auto and not self.progress.step:
            gains = compiling_saves_time(self.learner.model.config, runtime.device, seconds)
            plan.compiled = gains and runtime.world_size == 1
        if plan.compiled and runtime.any_rank(self._shape() is None):
            plan.compiled = False
            if not is_auto:
                self._note("every batch has another shape, which torch.compile would compile each; the run is eager")
        if is_auto and plan.compiled and runtime.device.type == "cpu" and cpp_compiler() is None:
            plan.compiled = False
            self._note("a C++ compiler, such as g++, would make this run faster, but there is none")
        self._cut_batches(plan.batch_size)

    def _shape(self) -> tuple[int, int] | None:
        """Rows and tokens of a micro-batch; None if every batch has another shape."""
        first, *others = (batch.input_ids.shape for step in islice(self.plan.batches(0), 2) for batch in step)
        return (first[0], first[1]) if first in others else None

    def _note(self, words: str) -> None:
        self.stage.console.print(f"note: {words}")

    def compile(self) -> None:
        """Compile the model for the shape of a whole micro-batch.

        Most faults show only when it computes; several processes try that here, together.
        """
        model, runtime, reason = self.learner.model, self.stage.runtime, ""
        if warning := self.stage.cache_warning:
            self.stage.console.print(f"warning: {warning}")
        try:
            model.compile_for_training(not is_sharded(model), self._shape())
            if runtime.world_size > 1:
                self._compute_and_forget()
        except Exception as error:
            reason = first_line(error)
        if runtime.any_rank(bool(reason)):
            self._continue_eagerly(reason or "in another process")

    def after(self, failure: StepFailed, step: int) -> None:
        """Change the plan, so that optimizer step `step` (from 1) may be computed after all.

        Raises:
            RuntimeError: nothing can be changed; the message says what the user can change.
        """
        advice = "continue with --resume"
        if not failure.is_out_of_memory:
            if self.stage.runtime.world_size > 1:  # the others are in the middle of the step, and wait
                raise RuntimeError(f"step {step:,}: torch.compile failed ({failure}); {advice} and --use_compile 0")
            self._continue_eagerly(str(failure))
            return
        rows = self.plan.rows_in_memory
        if rows == 1:
            what = f"out of memory in step {step:,} with a single {self._unit.removesuffix('s')}"
            length = self.stage.settings.max_seq_len
            raise RuntimeError(f"{what}; choose a smaller model, or a --max_seq_len below {length}")
        what = f"out of memory in step {step:,}, which computes {rows:,} {self._unit} at a time"
        if self.stage.runtime.world_size > 1:
            all_rows = self.stage.settings.batch_size * self.stage.settings.accumulation_steps
            size = max(n for n in range(1, rows // 2 + 1) if all_rows % n == 0)
            raise RuntimeError(f"{what}; {advice}, --batch_size {size} and --accumulation_steps {all_rows // size}")
        self.progress.lowered_batch_size = rows // 2
        self._cut_batches(rows // 2)
        kept = f"a step keeps its {self.plan.source.rows_per_step:,} {self._unit}"
        self.stage.console.print(f"warning: {what}; {rows // 2:,} at a time from now on; {kept}")

    @property
    def _unit(self) -> str:
        return self.plan.source.unit

    def _cut_batches(self, size: int) -> None:
        parts = 1 if self.plan.compiled else micro_batches_at_once(size, self.learner.model, self.stage.runtime)
        self.plan.cut_batches(size, parts)

    def _run_eagerly(self) -> None:
        self.plan.compiled = False
        self.learner.model.run_eagerly()
        self._cut_batches(self.plan.batch_size)

    def _continue_eagerly(self, reason: str) -> None:
        self._run_eagerly()
        self.stage.console.print(f"warning: torch.compile failed ({reason}); the run continues eagerly")

    def _compute_and_forget(self) -> None:
        """Compute the gradients of the first micro-batch in this process alone, and drop them."""
        model, runtime = self.learner.model, self.stage.runtime
        batch = next(self.plan.batches(self.progress.step))[0].to(runtime.device)
        devices = [runtime.device.index] if runtime.device.type == "cuda" else []
        model.train()
        try:
            with torch.random.fork_rng(devices), runtime.autocast():
                self.learner.objective(model, batch)[0].backward()
        finally:
            model.zero_grad(set_to_none=True)
            free_memory(runtime.device)
