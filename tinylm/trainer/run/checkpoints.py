"""The checkpoints of a run: its folder, its models there, and the states that it resumes from."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinylm.checkpoint.snapshots import snapshot_folder, snapshot_steps, write_snapshot
from tinylm.checkpoint.training_state import (
    StateWriter,
    TrainingState,
    discard_latest_state,
    load_training_state,
)
from tinylm.trainer.core.distributed import full_tensor, is_sharded, reshard, unsharded
from tinylm.trainer.core.failed_steps import first_line
from tinylm.trainer.core.gradients import Scaler
from tinylm.trainer.run.resume import check_same_run, load_optimizer_states, optimizer_states, place_like
from tinylm.trainer.run.run_folder import RunFolder
from tinylm.trainer.run.stage import Learner, Plan, Stage


@dataclass
class Progress:
    """The progress of a run; a training state holds all of it."""

    step: int = 0
    """Optimizer steps done when this process started or resumed the run."""
    evaluation_pending: bool = False
    """Whether the evaluation and the model folder of `step` are still to be made."""
    num_skipped: int = 0
    """Steps of the run whose loss or gradient was not a finite number."""
    best_validation_loss: float | None = None
    last_validation: tuple[int, float] | None = None
    """Step and loss of the last validation in this process."""
    first_losses: list[float] = field(default_factory=list)
    """Losses of the run's first steps."""
    changes: list[dict[str, Any]] = field(default_factory=list)
    """Settings that were changed on a resume: step, setting, was, now."""
    lowered_batch_size: int | None = None
    """The batch size that the run continues with after memory ran out; None if it never did."""

    def validation_loss_of(self, step: int) -> float | None:
        """The validation loss of the weights after `step`, if it was measured."""
        return self.last_validation[1] if self.last_validation and self.last_validation[0] == step else None

    def note_validation(self, step: int, loss: float) -> None:
        """Keep the result of a validation after `step`, and the best so far."""
        self.last_validation = step, loss
        if math.isfinite(loss) and (self.best_validation_loss is None or loss < self.best_validation_loss):
            self.best_validation_loss = loss


def snapshot(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """A copy of the trainable weights."""
    return [p.detach().clone() for p in parameters if p.requires_grad]


def values_fingerprint(weights: Iterable[Tensor]) -> str:
    """16 hex digits of a SHA-256 over the exact values."""
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(full_tensor(weight).cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def relative_change(before: list[Tensor], parameters: Iterable[nn.Parameter]) -> float:
    """|after - before| / |before|, L2 over all trainable weights."""
    after = [p.detach() for p in parameters if p.requires_grad]
    moved = sum(float(full_tensor((a - b).float().pow(2).sum())) for a, b in zip(after, before, strict=True))
    size = sum(float(full_tensor(b.float().pow(2).sum())) for b in before)
    return (moved / size) ** 0.5 if size else float("inf") if moved else 0.0


class Movement:
    """How far a model's weights have moved since the start of its run, across all resumes.

    A training state holds only a fingerprint of the first weights: a recipe makes the same weights again from the seed.
    If another torch or device draws other numbers, the movement is measured from the resume, and the report says so.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.first_weights = snapshot(model.parameters())
        self.known_fingerprint: str | None = None
        """Fingerprint of the run's first weights, from the state that it resumed from."""
        self.since = ""
        """Empty, or the step from which the movement is measured: ", since step 1,200"."""

    @cached_property
    def own_fingerprint(self) -> str:
        """Fingerprint of the weights that the recipe made; all processes must call it."""
        return values_fingerprint(self.first_weights)

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of the run's first weights, for its training state."""
        return self.known_fingerprint if self.since else self.own_fingerprint

    def resume(self, fingerprint: str | None, step: int) -> None:
        """Continue a run whose first weights had this fingerprint; the model already has the weights of `step`."""
        if fingerprint != self.own_fingerprint:
            self.first_weights = snapshot(self.model.parameters())
            self.known_fingerprint, self.since = fingerprint, f", since step {step:,}"

    def measure(self) -> float:
        """The L2 norm of the change, divided by that of the first weights."""
        return relative_change(self.first_weights, self.model.parameters())


class Checkpoints(RunFolder):
    """Saves and restores a run: weights, optimizers, plan and progress.

    Args:
        lineage: where the model comes from; it is written into each model folder.
        before_saving: called in the writing thread before a state is written.
    """

    def __init__(
        self,
        stage: Stage,
        learner: Learner,
        plan: Plan,
        progress: Progress,
        lineage: dict[str, Any],
        before_saving: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(stage, learner.model.config.hidden_size)
        self.learner, self.plan, self.progress = learner, plan, progress
        self.lineage, self.before_saving = lineage, before_saving
        self.movement = Movement(learner.model)
        fp16 = stage.runtime.compute_dtype == torch.float16
        self.scaler: Scaler = torch.amp.GradScaler(stage.runtime.device.type) if fp16 else None
        self.writer: StateWriter | None = None

    @property
    def last_folder(self) -> Path:
        """Folder of the run's final model."""
        return self.model_folder(self.plan.last_epoch)

    # --- saving --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Inside the block, states can be saved while training continues."""
        model, optimizers = self.learner.model, self.learner.optimizers
        self.writer = StateWriter(self.state_folder, optimizers, is_sharded(model), self.before_saving)
        try:
            yield
        finally:
            self.writer.close()

    def save_model(self, step: int) -> None:
        """Write the model folder of the epoch that ends with `step`, and delete those that `keep_epochs` gives up."""
        progress, epoch = self.progress, self.plan.epoch_of(step)
        facts = {
            "epoch": epoch,
            "step": step,
            "finished": step == self.plan.num_steps,
            "validation_loss": progress.validation_loss_of(step),
            "best_validation_loss": progress.best_validation_loss,
            **({"skipped_steps": progress.num_skipped} if progress.num_skipped else {}),
            **({"changed_on_resume": progress.changes} if progress.changes else {}),
            **({"lowered_batch_size": progress.lowered_batch_size} if progress.lowered_batch_size else {}),
            **({"compiled": True} if self.plan.compiled else {}),
        }
        with unsharded(self.learner.model):
            if self.stage.runtime.is_main:
                self.learner.save(self.model_folder(epoch), {"stage": self.stage.name, **facts, **self.lineage})
                self.remove_other_models(epoch)

    def save_snapshot(self, step: int) -> None:
        """Keep the trained weights after `step`, if this is one of the steps. If that fails, only print a warning."""
        if step not in snapshot_steps(self.plan.num_steps, self.stage.settings.snapshots):
            return
        with unsharded(self.learner.model):
            if not self.stage.runtime.is_main:
                return
            trained = {name: p for name, p in self.learner.model.named_parameters() if p.requires_grad}
            try:
                write_snapshot(snapshot_folder(self.last_folder), step, trained)
            except OSError as error:
                self.stage.console.print(f"warning: no snapshot of step {step:,} ({first_line(error)})")

    def save_state(self, step: int, evaluation_pending: bool = False) -> None:
        """Begin to save the state after `step`. If the save before failed, print a warning: the next may succeed."""
        assert self.writer is not None
        if self.stage.runtime.is_main or is_sharded(self.learner.model):
            error = self.writer.save(self.state(step, evaluation_pending))
            if error is not None:
                message = f"warning: the last training state could not be saved ({error})"
                self.stage.console.print(message)

    def finish_saving(self) -> None:
        """Wait until the last state is on the disk.

        Raises:
            RuntimeError: the state could not be saved.
        """
        assert self.writer is not None
        if error := self.writer.wait():
            raise RuntimeError(f"the training state could not be saved: {error}") from error

    def discard_state(self, step: int) -> None:
        """Let a resume start from the state before that of `step`, because the weights of `step` are broken."""
        assert self.writer is not None
        self.writer.wait()
        if self.stage.runtime.is_main:
            discard_latest_state(self.state_folder, step)

    def description(self) -> dict[str, Any]:
        """What identifies this run. `check_same_run` compares it with that of a state before a resume."""
        settings, model = self.stage.settings, self.learner.model
        parent = self.lineage.get("parent") or {}
        return {
            "identity": {
                "stage": self.stage.name,
                "data": self.plan.source.fingerprint,
                "parent": parent.get("weights"),
                "num_steps": self.plan.num_steps,
                "rows_per_optimizer_step": self.plan.source.rows_per_step,
                "trained parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
                **dataclasses.asdict(model.config),
            },
            "settings": json.loads(json.dumps(dataclasses.asdict(settings))),  # a tuple is a list, as from a YAML file
            "sources": {"data": settings.data_path or "TinyWorld", "parent": parent.get("path")},
        }

    def state(self, step: int, evaluation_pending: bool = False) -> dict[str, Any]:
        """All that a resume after `step` needs, without the random generators: each step seeds them."""
        model, progress = self.learner.model, self.progress
        reshard(model)
        return {
            "step": step,
            "is_pending": evaluation_pending,
            **self.description(),
            "launch": self.stage.runtime.launch_id,
            "num_skipped": progress.num_skipped,
            "changed_on_resume": progress.changes,
            "lowered_batch_size": progress.lowered_batch_size,
            "compiled": self.plan.compiled,
            "best_validation_loss": progress.best_validation_loss,
            "first_losses": progress.first_losses,
            "first_weights": self.movement.fingerprint,
            # Only trained weights: the frozen base of an adapter is in its own folder.
            "weights": {name: p.detach() for name, p in model.named_parameters() if p.requires_grad},
            "optimizers": optimizer_states(model, self.learner.optimizers),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
        }

    # --- resuming ------------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Resume from the newest undamaged state, or start from the beginning if there is no state.

        Raises:
            ValueError: the state is of another run, all states are damaged, or the processes find different states.
        """
        runtime, console = self.stage.runtime, self.stage.console
        found = self._newest_state()
        step = int(found.values["step"]) if found is not None else 0
        if runtime.any_rank(runtime.max_over_ranks(step) != step):
            raise ValueError(
                f"the processes find states of different steps in {self.state_folder}; output_dir must lie on a disk "
                "that all machines share"
            )
        if found is None:
            self.require_unfinished()
            console.print(f"nothing to resume in {self.folder}: starting from the beginning")
            return
        for line in found.damaged:
            console.print(f"warning: {line}; resuming from {found.folder.name} instead")
        state = found.values
        self._keep_sizes(state)
        changes = check_same_run(self.state_folder, state, self.description())
        for change in changes:
            console.print("note: {setting} is {now} from step {step} on; it was {was}".format(**change))
        self._load_tensors(state)
        self.movement.resume(state.get("first_weights"), step)
        self.progress.step = step
        self.progress.evaluation_pending = state["is_pending"]
        self.progress.num_skipped = state["num_skipped"]
        self.progress.best_validation_loss = state["best_validation_loss"]
        self.progress.first_losses = state.get("first_losses", [])
        if self.stage.settings.use_compile == "auto":
            self.plan.compiled = state.get("compiled", False)
        self.progress.changes = [*state.get("changed_on_resume", []), *changes]

    def _newest_state(self) -> TrainingState | None:
        place_for = place_like(self.learner.model) if is_sharded(self.learner.model) else None
        with contextlib.suppress(FileNotFoundError):
            return load_training_state(self.state_folder, place_for)
        return None

    def _load_tensors(self, state: dict[str, Any]) -> None:
        parameters = dict(self.learner.model.named_parameters())
        with torch.no_grad():
            for name, weight in state["weights"].items():
                parameters[name].copy_(weight)
        load_optimizer_states(self.learner.model, self.learner.optimizers, state["optimizers"])
        if self.scaler is not None and state["scaler"] is not None:  # None: the run has used another dtype until now
            self.scaler.load_state_dict(state["scaler"])

    def _keep_sizes(self, state: dict[str, Any]) -> None:
        """If the sizes asked for are the same, keep those of the run: rows per step with another number of processes,
        which share them, and the batch size that memory sufficed for.
        """
        rows, saved = int(state["identity"]["rows_per_optimizer_step"]), state.get("settings", {})
        asked = {name: getattr(self.stage.settings, name) for name in ("batch_size", "accumulation_steps")}
        if any(saved.get(name) != value for name, value in asked.items()):
            return
        self.progress.lowered_batch_size = state.get("lowered_batch_size")
        if rows != self.plan.source.rows_per_step:
            processes = self.stage.runtime.world_size
            self.stage.console.print(f"note: {processes} process(es) now share the {rows} rows of a step")
            self.plan.keep_rows_per_step(rows)
