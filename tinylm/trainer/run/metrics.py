"""What a run records: metrics.jsonl, one JSON object a line, and TensorBoard on request."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from tinylm.files.atomic import atomic_write


class MetricsLog:
    """The metrics file of a run, and TensorBoard; the main process writes them, in the others nothing happens.

    A resumed run drops the lines past the step it resumes from, and what a full disk has cut, so every step stands
    there once.

    Args:
        folder: of the run.
        name: of the run among those of its folder: stage and width, such as pretrain_512.
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
            evaluation_pending: the evaluation of `start_step` is still to come; a line of it was written by a run that
                was killed behind it.
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
        """Record the values of one step; what is not a finite number becomes null, since JSON has no NaN."""
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
        """Put the lines on the disk: before a state is saved, so that a machine that dies leaves no gap."""
        if self.file is not None:
            os.fsync(self.file.fileno())


def _is_kept(line: str, start_step: int, evaluation_pending: bool) -> bool:
    try:
        record = json.loads(line)
        step = int(record["step"])
    except (ValueError, KeyError, TypeError):  # cut
        return False
    return step < start_step or (step == start_step and not (evaluation_pending and "validation_loss" in record))


def _json_value(value: float | str) -> float | str | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tensorboard_writer(folder: Path, start_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard needs the package; install it with: pip install 'tinylm[track]'") from error
    return SummaryWriter(str(folder), purge_step=start_step + 1)
