"""The state of a run: its parts and its plan, everything it takes to go on to the bit, and going on from it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tinylm.checkpoint.training_state import TrainingState, load_training_state, read_training_values
from tinylm.dataset.batches import BatchSampler, Dataset
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.system.runtime import Runtime
from tinylm.trainer.core.distributed import is_sharded, reshard
from tinylm.trainer.core.gradients import parts_of_batch
from tinylm.trainer.core.objectives import Objective
from tinylm.trainer.run.resume import check_same_run, load_optimizer_states, optimizer_states, place_like
from tinylm.trainer.run.train_settings import TrainSettings
from tinylm.trainer.run.trainer_utils import make_console, snapshot


@dataclass
class Run:
    """One stage's run: its parts, its plan, its files, and its state."""

    stage: str
    """pretrain, full_sft, lora or dpo: the prefix of every file name."""
    settings: TrainSettings
    runtime: Runtime
    model: TinyLMForCausalLM
    optimizers: Sequence[torch.optim.Optimizer]
    objective: Objective
    train_data: Dataset
    validation_data: Dataset | None
    save: Callable[[Path, dict[str, Any]], None]
    """(folder, lineage) -> writes the model folder (or the adapter folder)."""
    lineage: dict[str, Any] = field(default_factory=dict)
    """Where the model comes from: parent, data, tokenizer."""
    sample: Callable[[], list[str]] | None = None
    """Texts to look at after each validation; shown and recorded."""
    console: Console = field(default_factory=make_console)
    decode: Callable[[list[int]], str] | None = None
    """Token ids to text, to show the batch of a run that has diverged."""
    best_validation_loss: float | None = None

    def __post_init__(self) -> None:
        settings, runtime = self.settings, self.runtime
        self.parts = 1 if settings.use_compile else parts_of_batch(settings.batch_size, self.model, runtime)
        self.deal_rows(settings.batch_size * settings.accumulation_steps * runtime.world_size)
        self.output_dir = Path(settings.output_dir)
        self.start_step = 0
        self.is_pending = False
        self.num_skipped = self.skips_in_a_row = 0
        self.moved_since = ""
        self.changes: list[dict[str, Any]] = []
        self.first_weights: list[torch.Tensor] = []
        self.first_fingerprint: str | None = None
        fp16 = runtime.compute_dtype == torch.float16
        self.scaler = torch.amp.GradScaler(runtime.device.type) if fp16 else None

    def deal_rows(self, rows_per_step: int) -> None:
        """Plan the steps: `rows_per_step` rows each, shared out among the processes."""
        settings, runtime = self.settings, self.runtime
        self.sampler = BatchSampler(
            len(self.train_data), settings.batch_size // self.parts, rows_per_step, settings.seed, runtime.rank,
            runtime.world_size,
        )  # fmt: skip
        self.steps_per_epoch = self.sampler.steps_per_epoch
        self.num_steps = settings.epochs * self.steps_per_epoch
        if settings.max_steps:
            self.num_steps = min(self.num_steps, settings.max_steps)

    # --- files ---------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """What the names of all its files begin with, as the original project's do: stage and width."""
        return f"{self.stage}_{self.model.config.hidden_size}"

    @property
    def state_folder(self) -> Path:
        """Training state lives beside the model folders, never inside one."""
        return self.output_dir / f"{self.name}_state"

    def model_folder(self, epoch: int) -> Path:
        """Folder of the model after `epoch` (from 0), named as the original project names its files."""
        return self.output_dir / f"{self.name}_epoch{epoch}"

    @property
    def last_folder(self) -> Path:
        """Folder of the model that the whole run ends with."""
        return self.model_folder(-(-self.num_steps // self.steps_per_epoch) - 1)

    # --- state -----------------------------------------------------------------------------------------------------

    def description(self) -> dict[str, Any]:
        """What tells this run from others; `check_same_run` says how far it must agree for a resume."""
        settings, parent = self.settings, self.lineage.get("parent") or {}
        return {
            "identity": {
                "stage": self.stage,
                "data": self.train_data.fingerprint,
                "parent": parent.get("weights"),
                "num_steps": self.num_steps,
                "rows_per_optimizer_step": self.sampler.rows_per_step,
                "trained parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
                **dataclasses.asdict(self.model.config),
            },
            "settings": json.loads(json.dumps(dataclasses.asdict(settings))),  # a tuple is a list, as from a YAML file
            "sources": {"data": settings.data_path or "TinyWorld", "parent": parent.get("path")},
        }

    def state(self, step: int) -> dict[str, Any]:
        """Everything it takes to go on after `step`. Random generators need nothing: each step seeds them anew."""
        reshard(self.model)
        # Only what trains: a frozen base under an adapter is in its own folder.
        trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        return {
            "step": step,
            **self.description(),
            "launch": self.runtime.launch_id,
            "num_skipped": self.num_skipped,
            "changed_on_resume": self.changes,
            "best_validation_loss": self.best_validation_loss,
            "first_weights": self.first_fingerprint,
            "weights": trained,
            "optimizers": optimizer_states(self.model, self.optimizers),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
        }

    def goes_on(self) -> bool:
        """With --resume, or when torchrun has started the processes anew."""
        return self.settings.resume or self.is_restarted()

    def is_restarted(self) -> bool:
        """Whether torchrun has started the processes anew because one was lost or came back; all must ask."""
        if self.runtime.any_rank(self.runtime.is_restart):
            return True
        if not self.runtime.launch_id:
            return False
        try:
            return bool(read_training_values(self.state_folder).get("launch") == self.runtime.launch_id)
        except FileNotFoundError:
            return False

    def restore(self) -> None:
        """Go on from the newest whole state, or start from the beginning where there is none.

        Raises:
            ValueError: it is a state of another run, all states are damaged, or the processes see different ones.
        """
        found = self._newest_state()
        step = int(found.values["step"]) if found is not None else 0
        if self.runtime.any_rank(self.runtime.max_over_ranks(step) != step):
            raise ValueError(
                f"the processes find states of different steps in {self.state_folder}; output_dir must lie on a disk "
                "that all machines share"
            )
        if found is None:
            self.console.print(f"nothing to resume in {self.output_dir}: starting from the beginning", markup=False)
            return
        for line in found.damaged:
            self.console.print(f"warning: {line}; going on from {found.folder.name} instead", markup=False)
        state = found.values
        self._keep_rows_per_step(state)
        changes = check_same_run(self.state_folder, state, self.description())
        self.changes = [*state.get("changed_on_resume", []), *changes]
        for change in changes:
            self.console.print("note: {setting} is {now} from step {step} on; it was {was}".format(**change))
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, weight in state["weights"].items():
                parameters[name].copy_(weight)
        load_optimizer_states(self.model, self.optimizers, state["optimizers"])
        if self.scaler is not None and state["scaler"] is not None:  # None: computed in another dtype until now
            self.scaler.load_state_dict(state["scaler"])
        self.start_step = step
        self.is_pending = state["is_pending"]
        self.num_skipped = state["num_skipped"]
        self.best_validation_loss = state["best_validation_loss"]
        if state.get("first_weights") != self.first_fingerprint:  # another torch or device may draw other numbers
            self.first_weights = snapshot(self.model.parameters())
            self.moved_since = ", since step " + format(self.start_step, ",")
        self.first_fingerprint = state.get("first_weights")

    def _newest_state(self) -> TrainingState | None:
        place_for = place_like(self.model) if is_sharded(self.model) else None
        with contextlib.suppress(FileNotFoundError):
            return load_training_state(self.state_folder, place_for)
        return None

    def _keep_rows_per_step(self, state: dict[str, Any]) -> None:
        """On another number of processes, a run keeps the rows of its steps and shares them out anew."""
        rows, saved = int(state["identity"]["rows_per_optimizer_step"]), state.get("settings", {})
        asked = {name: getattr(self.settings, name) for name in ("batch_size", "accumulation_steps")}
        if rows != self.sampler.rows_per_step and all(saved.get(name) == value for name, value in asked.items()):
            self.console.print(f"note: {self.runtime.world_size} process(es) share the {rows} rows of a step now")
            self.deal_rows(rows)

    def note_unfinished(self) -> None:
        """Say it when a run is about to be replaced by a new one."""
        if self.start_step or not self.runtime.is_main:
            return
        with contextlib.suppress(FileNotFoundError):
            state = read_training_values(self.state_folder)
            is_finished = state["step"] >= state["identity"]["num_steps"]
            what = "a finished" if is_finished else "an unfinished"
            hint = "" if is_finished else " (--resume goes on)"
            self.console.print(
                f"note: {self.output_dir} holds {what} {self.stage} run; starting over{hint}", markup=False
            )
