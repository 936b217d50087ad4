"""What a run shows and records: the plan at the start, a live line, metrics.jsonl, TensorBoard.

On a terminal the line is redrawn in place; into a file or a pipe it becomes plain lines, one per log interval.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from tinylm.dataset.batches import Batch
from tinylm.files.atomic import atomic_write
from tinylm.model.model_tinylm import TinyLMConfig
from tinylm.system.runtime import Runtime
from tinylm.trainer.core.distributed import full
from tinylm.trainer.core.loop import StepReport


def training_flops_per_token(config: TinyLMConfig, num_parameters: int, context_length: float) -> float:
    """Floating-point operations of one training step per token: 6 per weight that multiplies, plus attention.

    A matrix product costs 2 operations per weight forwards and 4 backwards (Kaplan et al. 2020, arXiv:2001.08361,
    section 2.1). Attention's two products cost 12 L H D operations per token and per position it looks at;
    causal, so about half of `context_length`. An untied embedding table multiplies nothing.
    """
    lookup = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_width
    return 6.0 * (num_parameters - lookup) + attention * context_length / 2


def snapshot(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    """A copy of the trainable weights, to tell at the end how far they moved."""
    return [p.detach().clone() for p in parameters if p.requires_grad]


def fingerprint_of(weights: Iterable[torch.Tensor]) -> str:
    """16 hex digits of a SHA-256 over the exact values."""
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(full(weight).cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def relative_change(before: list[torch.Tensor], parameters: Iterable[nn.Parameter]) -> float:
    """|after - before| / |before|, L2 over all trainable weights: near 0 means that training changed nothing."""
    after = [p.detach() for p in parameters if p.requires_grad]
    moved = sum(float(full((a - b).float().pow(2).sum())) for a, b in zip(after, before, strict=True))
    size = sum(float(full(b.float().pow(2).sum())) for b in before)
    return (moved / size) ** 0.5 if size else float("inf") if moved else 0.0


def format_seconds(seconds: float) -> str:
    """12s, 3m05s, 2h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def format_count(number: float) -> str:
    """950, 12.3k, 4.56M, 1.20B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def make_console(is_main: bool = True) -> Console:
    """Where a run reports: standard output, lines unwrapped, nothing coloured by guess; silent on other ranks."""
    return Console(highlight=False, soft_wrap=True, markup=True, quiet=not is_main)


@contextlib.contextmanager
def status(console: Console, title: str) -> Iterator[Callable[[str], None]]:
    """Show how far some preparation has come: call what is yielded with a few words; on a terminal only."""
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status(title) as live:
        yield lambda text: live.update(f"{title}: {text}")


def print_facts(console: Console, title: str, facts: dict[str, str]) -> None:
    """Two columns: what will happen, or what happened. Lines are never wrapped, so that paths can be copied."""
    width = max(len(name) for name in facts)
    console.print(f"[bold]{title}[/bold]")
    for name, value in facts.items():
        console.print(f"  [dim]{name:<{width}}[/dim]  {escape(value)}")


class MetricsLog:
    """metrics.jsonl, one JSON object a line, and TensorBoard on request; written by the main process only.

    A resumed run drops the lines past the step it resumes from, and what a full disk has cut, so every step stands
    there once.

    Args:
        name: of the run among those of its folder: stage and width, such as pretrain_512.
        is_pending: the evaluation of `start_step` is still to come; a line of it is one of a run killed behind it.
    """

    def __init__(
        self, folder: Path, name: str, start_step: int, tensorboard: bool = False, is_pending: bool = False
    ) -> None:
        self.path = folder / f"{name}_metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if start_step > 0 and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _is_kept(line, start_step, is_pending)]
        with atomic_write(self.path) as file:
            file.writelines(f"{line}\n".encode() for line in kept)
        self.file: IO[str] = self.path.open("a", encoding="utf-8", buffering=1)
        self.writer: Any = _tensorboard_writer(folder / "tensorboard" / name, start_step) if tensorboard else None

    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        """Record the values of one step; what is no number becomes null, since JSON has no NaN."""
        self.file.write(
            json.dumps({"step": step, **{name: _json_value(value) for name, value in values.items()}}) + "\n"
        )
        if self.writer is not None:
            for name, value in values.items():
                if isinstance(value, str):
                    self.writer.add_text(name, value, step)
                else:
                    self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Put the lines on the disk: before a state is saved, so that a machine that dies leaves no gap."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()
        if self.writer is not None:
            self.writer.close()


def _is_kept(line: str, start_step: int, is_pending: bool) -> bool:
    try:
        record = json.loads(line)
        step = int(record["step"])
    except (ValueError, KeyError, TypeError):  # cut
        return False
    return step < start_step or (step == start_step and not (is_pending and "validation_loss" in record))


def _json_value(value: float | str) -> float | str | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tensorboard_writer(folder: Path, start_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard needs the package; install it with: pip install 'tinylm[track]'") from error
    return SummaryWriter(str(folder), purge_step=start_step + 1)


class ProgressLine:
    """The live line of a stage: loss, validation loss, tokens/s, share of the matmul ceiling, time left."""

    def __init__(
        self,
        console: Console,
        runtime: Runtime,
        stage: str,
        num_steps: int,
        start_step: int,
        flops_per_token: float,
        matmul_flops: float,
        log_interval: int,
    ) -> None:
        self.console = console
        self.runtime = runtime
        self.stage = stage
        self.flops_per_token = flops_per_token
        self.matmul_flops = matmul_flops
        self.log_interval = log_interval
        self.validation_loss: float | None = None
        self.tokens_per_second = 0.0
        self.start_step = start_step
        self.started = time.perf_counter()
        self.bar: Progress | None = None
        if runtime.is_main and console.is_terminal:
            self.bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[line]}"),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )
            self.task = self.bar.add_task(stage, total=num_steps, completed=start_step, line="")
            self.bar.start()

    def update(self, report: StepReport) -> dict[str, float]:
        """Show a step; returns the record for metrics.jsonl."""
        speed = report.num_tokens / report.seconds
        keep = 0.9 if self.tokens_per_second else 0.0  # a moving average over about ten steps
        self.tokens_per_second = keep * self.tokens_per_second + (1 - keep) * speed
        share = self.tokens_per_second * self.flops_per_token / (self.matmul_flops * self.runtime.world_size)
        elapsed = time.perf_counter() - self.started
        remaining = elapsed / (report.step - self.start_step) * (report.num_steps - report.step)
        parts = [f"loss {report.loss:.3f}"]
        if self.validation_loss is not None:
            parts.append(f"val {self.validation_loss:.3f}")
        parts += [f"{name.replace('_', ' ')} {value:.3g}" for name, value in report.metrics.items()]
        parts += [f"{format_count(self.tokens_per_second)} tok/s", f"{share:.0%} of matmul"]
        line = " · ".join([*parts, f"{format_seconds(remaining)} left"])
        if self.bar is not None:
            self.bar.update(self.task, completed=report.step, line=line)
        elif self.runtime.is_main and (report.step % self.log_interval == 0 or report.step == report.num_steps):
            self.console.print(
                f"{self.stage} {report.step}/{report.num_steps} · {line}", highlight=False, soft_wrap=True
            )
        return {
            "loss": report.loss,
            "learning_rate": report.learning_rate,
            "grad_norm": report.grad_norm,
            "tokens_per_second": round(self.tokens_per_second, 1),
            "matmul_share": round(share, 4),
            **report.metrics,
        }

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


class SpikeWatch:
    """Tells when a loss stands far out from those before it; it only says so, since a spike may mend itself."""

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


def write_bad_batch(path: Path, step: int, batches: Iterable[Batch], decode: Callable[[list[int]], str] | None) -> None:
    """Write the rows of a step that had no number for a loss, for inspection: a JSON object a line."""
    with atomic_write(path) as file:
        for number, batch in enumerate(batches):
            for ids, targets in zip(batch.input_ids.tolist(), batch.targets.tolist(), strict=True):
                text = {"text": decode(ids)} if decode is not None else {}
                row = {"step": step, "micro_batch": number, **text, "input_ids": ids, "targets": targets}
                file.write(json.dumps(row).encode() + b"\n")
