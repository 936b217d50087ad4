"""A training run around `fit`: the plan, the order of the data, evaluation, checkpoints, resume, the report.

Recipes make the parts (data, model, optimizers) and hand them over; what all stages share is here, once.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tinylm.checkpoint import load_training_state, read_training_values, save_training_state
from tinylm.dataset.batches import Batch, BatchSampler, Dataset, batches
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.runtime import Runtime, measured_matmul_flops
from tinylm.trainer.gradients import parts_of_batch
from tinylm.trainer.loop import StepReport, fit
from tinylm.trainer.objectives import Objective
from tinylm.trainer.resume import check_same_run
from tinylm.trainer.train_settings import TrainSettings
from tinylm.trainer.trainer_utils import (
    MetricsLog,
    ProgressLine,
    fingerprint_of,
    format_seconds,
    make_console,
    print_facts,
    relative_change,
    snapshot,
    training_flops_per_token,
)

EXPECTED_MATMUL_SHARE = 0.4
"""Share of the measured matmul speed assumed for the estimate before the first step; the live line then measures."""


@dataclass
class TrainingRun:
    """One stage's run. Make it, `fit()` it, and read `best_validation_loss`."""

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
    best_validation_loss: float | None = None

    def __post_init__(self) -> None:
        settings, runtime = self.settings, self.runtime
        self.sampler = BatchSampler(
            len(self.train_data), settings.batch_size, settings.seed, runtime.rank, runtime.world_size
        )
        self.parts = 1 if settings.use_compile else parts_of_batch(settings.batch_size, self.model, runtime.device)
        self.steps_per_epoch = -(-self.sampler.num_batches // settings.accumulation_steps)
        self.num_steps = settings.epochs * self.steps_per_epoch
        if settings.max_steps:
            self.num_steps = min(self.num_steps, settings.max_steps)
        self.output_dir = Path(settings.output_dir)
        self.start_step = 0
        self.moved_since = ""
        self.changes: list[dict[str, Any]] = []
        fp16 = runtime.compute_dtype == torch.float16
        self.scaler = torch.amp.GradScaler(runtime.device.type) if fp16 else None

    # --- files ---------------------------------------------------------------------------------------------------

    @property
    def state_folder(self) -> Path:
        """Training state lives beside the model folders, never inside one."""
        return self.output_dir / f"{self.stage}_{self.model.config.hidden_size}_state"

    def model_folder(self, epoch: int) -> Path:
        """Folder of the model after `epoch` (from 0), named as the original project names its files."""
        return self.output_dir / f"{self.stage}_{self.model.config.hidden_size}_epoch{epoch}"

    @property
    def last_folder(self) -> Path:
        """Folder of the model that the whole run ends with."""
        return self.model_folder(-(-self.num_steps // self.steps_per_epoch) - 1)

    # --- the run -------------------------------------------------------------------------------------------------

    def fit(self) -> Path:
        """Train, from the start or from where `--resume` finds it; returns the last model folder."""
        # The weights as the recipe made them: the run's true start, before anything is loaded over them.
        self.first_weights = snapshot(self.model.parameters())
        self.first_fingerprint: str | None = fingerprint_of(self.first_weights)
        if self.settings.resume:
            self._load_state()
        matmul_flops = measured_matmul_flops(self.runtime)
        context = float(self.settings.max_seq_len)
        flops = training_flops_per_token(self.model.config, sum(p.numel() for p in self.model.parameters()), context)
        self._print_plan(flops, matmul_flops)
        self._note_unfinished()
        self.metrics = (
            MetricsLog(self.output_dir, self.stage, self.start_step, self.settings.tensorboard)
            if self.runtime.is_main
            else None
        )
        self.line = ProgressLine(
            self.console, self.runtime, self.stage, self.num_steps, self.start_step, flops, matmul_flops,
            self.settings.log_interval,
        )  # fmt: skip
        if self.settings.use_compile:
            self.model.model.compile(dynamic=False)  # in place, so parameter names stay what they are
        started = time.perf_counter()
        try:
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
                on_step=(self._log, self._evaluate, self._save),
                scaler=self.scaler,
                num_workers=self.parts,
            )
        finally:
            self.line.close()
            if self.metrics is not None:
                self.metrics.close()
        seconds = time.perf_counter() - started
        self._print_result(self.last_folder, seconds, relative_change(self.first_weights, self.model.parameters()))
        return self.last_folder

    def _step_batches(self) -> Iterator[list[Batch]]:
        """For each optimizer step from `start_step` on, its micro-batches; a step never spans two epochs.

        Dropout's generator is seeded by (seed, step, rank): a resumed run draws what the unbroken run drew, on
        any number of ranks, with no generator state to keep.
        """
        settings, runtime = self.settings, self.runtime
        per_step = settings.accumulation_steps * self.parts
        step = self.start_step
        for epoch in range(step // self.steps_per_epoch, settings.epochs):
            position = (step % self.steps_per_epoch) * settings.accumulation_steps * self.sampler.rows_per_step
            stream = batches(
                self.train_data, settings.batch_size // self.parts, settings.seed, epoch, position,
                runtime.rank, runtime.world_size, num_workers=settings.num_workers,
            )  # fmt: skip
            while micro_batches := list(itertools.islice(stream, per_step)):
                torch.manual_seed((settings.seed * 1_000_003 + step) * 1_009 + runtime.rank)
                yield micro_batches
                step += 1

    # --- what happens after a step ---------------------------------------------------------------------------------

    def _log(self, report: StepReport) -> None:
        values = self.line.update(report)
        if self.metrics is not None and (report.step % self.settings.log_interval == 0 or report.step == 1):
            self.metrics.write(report.step, values)

    def _evaluate(self, report: StepReport) -> None:
        due = self.settings.eval_interval and report.step % self.settings.eval_interval == 0
        if self.validation_data is None or not (due or report.step == self.num_steps):
            return
        values: dict[str, float | str] = dict(self.validate(self.validation_data))
        loss = float(values["validation_loss"])
        self.line.validation_loss = loss
        if self.best_validation_loss is None or loss < self.best_validation_loss:
            self.best_validation_loss = loss
        if not self.runtime.is_main:
            return
        shown = " · ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())
        self.console.print(f"{self.stage} {report.step}/{report.num_steps} · {shown}")
        for index, text in enumerate(self.sample() if self.sample is not None else []):
            self.console.print(f"    {' '.join(text.split())}", style="dim", markup=False)
            values[f"sample_{index}"] = text
        if self.metrics is not None:
            self.metrics.write(report.step, values)

    @torch.no_grad()
    def validate(self, data: Dataset) -> dict[str, float]:
        """Mean loss (and the objective's metrics) per target over the held-out data, and bits per byte of text."""
        self.model.eval()
        sums: dict[str, float] = {}
        count = 0
        num_batches = self.settings.eval_batches or None
        stream = batches(data, self.settings.batch_size, shuffle=False)
        # Every rank walks the same few batches: simpler than sharding, and the sums need no exchange.
        for batch in itertools.islice(stream, num_batches):
            with self.runtime.autocast():
                loss, metrics = self.objective(self.model, batch.to(self.runtime.device))
            for name, value in {"loss": loss, **metrics}.items():
                sums[name] = sums.get(name, 0.0) + float(value)
            count += batch.count
        self.model.train()
        means = {f"validation_{name}": value / count for name, value in sums.items()}
        bytes_per_target = getattr(data, "bytes_per_target", None)
        if bytes_per_target:
            means["bits_per_byte"] = means["validation_loss"] / math.log(2) / bytes_per_target
        return means

    def _save(self, report: StepReport) -> None:
        epoch_done = report.step % self.steps_per_epoch == 0 or report.step == self.num_steps
        due = self.settings.save_interval and report.step % self.settings.save_interval == 0
        if not (epoch_done or due):
            return
        if self.runtime.is_main:
            if epoch_done:
                epoch = -(-report.step // self.steps_per_epoch) - 1
                facts = {
                    "epoch": epoch,
                    "step": report.step,
                    "finished": report.step == self.num_steps,
                    "best_validation_loss": self.best_validation_loss,
                    **({"changed_on_resume": self.changes} if self.changes else {}),
                }
                self.save(self.model_folder(epoch), {"stage": self.stage, **facts, **self.lineage})
            save_training_state(self.state_folder, self._state(report.step))
        self.runtime.barrier()

    # --- state -----------------------------------------------------------------------------------------------------

    def _description(self) -> dict[str, Any]:
        """What tells this run from others; `check_same_run` says how far it must agree for a resume."""
        settings, parent = self.settings, self.lineage.get("parent") or {}
        return {
            "identity": {
                "stage": self.stage,
                "data": self.train_data.fingerprint,
                "parent": parent.get("weights"),
                "num_steps": self.num_steps,
                "rows_per_optimizer_step": self.sampler.rows_per_step * settings.accumulation_steps,
                "trained parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
                **dataclasses.asdict(self.model.config),
            },
            "settings": json.loads(json.dumps(dataclasses.asdict(settings))),  # a tuple is a list, as from a YAML file
            "sources": {"data": settings.data_path or "TinyWorld", "parent": parent.get("path")},
        }

    def _state(self, step: int) -> dict[str, Any]:
        # Only what trains: a frozen base under an adapter is in its own folder.
        trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        return {
            "step": step,
            **self._description(),
            "changed_on_resume": self.changes,
            "best_validation_loss": self.best_validation_loss,
            "first_weights": self.first_fingerprint,
            "weights": trained,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
        }

    def _load_state(self) -> None:
        try:  # it also finds what a crash between two renames has left, when the folder itself is not there
            state = load_training_state(self.state_folder)
        except FileNotFoundError:
            self.console.print(f"nothing to resume in {self.output_dir}: starting from the beginning", markup=False)
            return
        changes = check_same_run(self.state_folder, state, self._description())
        self.changes = [*state.get("changed_on_resume", []), *changes]
        for change in changes:
            self.console.print("note: {setting} is {now} from step {step} on; it was {was}".format(**change))
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, weight in state["weights"].items():
                parameters[name].copy_(weight)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.scaler is not None and state["scaler"] is not None:  # None: computed in another dtype until now
            self.scaler.load_state_dict(state["scaler"])
        self.start_step = int(state["step"])
        self.best_validation_loss = state["best_validation_loss"]
        if state.get("first_weights") != self.first_fingerprint:  # another torch or device may draw other numbers
            self.first_weights = snapshot(self.model.parameters())
            self.moved_since = ", since step " + format(self.start_step, ",")
        self.first_fingerprint = state.get("first_weights")

    def _note_unfinished(self) -> None:
        """Say it when an unfinished run is about to be replaced by a new one."""
        if self.start_step or not self.runtime.is_main or not self.state_folder.exists():
            return
        state = read_training_values(self.state_folder)
        if state["step"] < state["identity"]["num_steps"]:
            self.console.print(
                f"note: {self.output_dir} holds an unfinished {self.stage} run; starting over (--resume goes on)",
                markup=False,
            )

    # --- what the user reads ---------------------------------------------------------------------------------------

    def _print_plan(self, flops: float, matmul_flops: float) -> None:
        settings, model = self.settings, self.model
        total = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rows = self.sampler.rows_per_step * settings.accumulation_steps
        tokens = self.num_steps * rows * settings.max_seq_len
        seconds = tokens * flops / (EXPECTED_MATMUL_SHARE * matmul_flops * self.runtime.world_size)
        # Activations per token: about 20 C numbers of 2 bytes for each block, and logits, 3 V of 4 bytes. fp32
        # weights; for those that train also a gradient and two moments.
        config = model.config
        activations = settings.batch_size * settings.max_seq_len * (
            20 * config.hidden_size * config.num_hidden_layers * 2 + 3 * config.vocab_size * 4
        )  # fmt: skip
        memory = 4 * total + 12 * trained + activations
        unit = "pairs" if self.stage == "dpo" else "rows"
        device = f"{self.runtime.device}, {str(self.runtime.compute_dtype).removeprefix('torch.')}"
        if self.runtime.world_size > 1:
            device += f", {self.runtime.world_size} processes"
        facts = {
            "parameters": f"{total:,}"
            + (f", of which {trained:,} train ({trained / total:.2%})" if trained < total else ""),
            "data": f"{len(self.train_data):,} {unit}, {self.train_data.num_targets:,} target tokens",
            "steps": f"{self.num_steps:,} in {settings.epochs} epoch(s), each {rows} {unit} x {settings.max_seq_len}",
            "device": device,
            "estimate": f"about {format_seconds(seconds)}, {memory / 1e9:.1f} GB of memory",
            "output": str(self.last_folder),
        }
        if self.start_step:
            facts["resuming"] = f"from step {self.start_step:,}"
        print_facts(self.console, f"{self.stage}: what will happen", facts)

    def _print_result(self, folder: Path, seconds: float, change: float) -> None:
        facts = {"time": format_seconds(seconds)}
        if self.best_validation_loss is not None:
            facts["best validation loss"] = f"{self.best_validation_loss:.4f}"
        facts["weights moved"] = f"{change:.2%} of their size{self.moved_since}"
        facts["model"] = str(folder)
        print_facts(self.console, f"{self.stage}: done", facts)
        if change < 1e-5 and self.start_step < self.num_steps:
            self.console.print("warning: the weights hardly moved; raise --learning_rate or train for more steps")
