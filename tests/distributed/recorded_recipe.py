"""A recipe as the command line runs it, with a record of what each process trained on.

    torchrun ... recorded_recipe.py RECORDS STAGE [flags of the stage]

Each process appends a JSON line for every optimizer step it has finished to RECORDS/<time>_<rank>.jsonl: the step, the
rows of the data set whose gradients it added, and where it ran. The environment variables, both for tests that
interfere in mid-run: SECONDS_PER_STEP, which a step takes at least, and LOST_AT="RANK STEP", where a process kills
itself behind a step, as if its machine were lost.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tinylm.commandline.exit_status import run_main
from tinylm.dataset.batches import BatchSampler
from tinylm.system import runtime
from tinylm.trainer.core import loop


def record_steps(folder: Path) -> None:
    """From now on every step of every run of this process is recorded in `folder`.

    Call it before the recipes are imported: they take `fit` by its name.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    path = folder / f"{time.time_ns()}_{rank}.jsonl"
    drawn: list[list[int]] = []
    deal, train = BatchSampler.steps, loop.fit
    seconds, lost_at = float(os.environ.get("SECONDS_PER_STEP", "0")), os.environ.get("LOST_AT", "")

    def steps(sampler: BatchSampler, *place: int) -> Iterator[Any]:
        for micro_batches in deal(sampler, *place):
            drawn.append([int(row) for rows in micro_batches for row in rows])
            yield micro_batches

    def record(report: loop.StepReport) -> None:
        facts = {"step": report.step, "rows": drawn.pop(0), "rank": rank, "world_size": world_size}
        facts |= {"loss": report.loss, "time": time.time(), "pid": os.getpid(), "host": os.environ.get("HOST", "")}
        with path.open("a") as file:
            file.write(json.dumps(facts) + "\n")
        time.sleep(seconds)

    def get_lost(report: loop.StepReport) -> None:
        if lost_at == f"{rank} {report.step}":
            os.kill(os.getpid(), signal.SIGKILL)

    def fit(*arguments: Any, on_step: Sequence[Callable[[loop.StepReport], None]], **options: Any) -> None:
        drawn.clear()  # the plan has drawn a row, to measure its memory
        train(*arguments, on_step=(record, *on_step, get_lost), **options)

    BatchSampler.steps = steps  # type: ignore[assignment, method-assign]
    loop.fit = fit  # type: ignore[assignment]
    runtime.measured_matmul_flops = lambda runtime: 1e11  # type: ignore[assignment]


def main(words: list[str]) -> int:
    folder, stage, *argv = words
    record_steps(Path(folder))
    return run_main(importlib.import_module(f"tinylm.trainer.train_{stage}").main, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
