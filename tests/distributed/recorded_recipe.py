"""A recipe as the command line runs it, with a record of what each process trained on.

    torchrun ... recorded_recipe.py RECORDS STAGE [flags of the stage]

Each process appends a JSON line for every optimizer step it has finished to RECORDS/<time>_<rank>.jsonl: the step, the
rows of the data set whose gradients it added, and where it ran. With the environment variable SECONDS_PER_STEP a step
takes at least as long, so that a test can interfere in mid-run.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinylm.commandline.exit_status import run_main
from tinylm.dataset.batches import BatchSampler
from tinylm.trainer.core.loop import StepReport
from tinylm.trainer.run import run as run_module


def record_steps(folder: Path) -> None:
    """From now on every step of every run of this process is recorded in `folder`."""
    rank = int(os.environ.get("RANK", "0"))
    path = folder / f"{time.time_ns()}_{rank}.jsonl"
    drawn: list[list[int]] = []
    deal, after_step = BatchSampler.steps, run_module.Run._after_step
    seconds = float(os.environ.get("SECONDS_PER_STEP", "0"))

    def steps(sampler: BatchSampler, *place: int) -> Iterator[Any]:
        for micro_batches in deal(sampler, *place):
            drawn.append([int(row) for rows in micro_batches for row in rows])
            yield micro_batches

    def record(run: run_module.Run, report: StepReport) -> None:
        facts = {"step": report.step, "rows": drawn.pop(), "rank": rank, "world_size": run.stage.runtime.world_size}
        facts |= {"loss": report.loss, "time": time.time(), "pid": os.getpid(), "host": os.environ.get("HOST", "")}
        with path.open("a") as file:
            file.write(json.dumps(facts) + "\n")
        time.sleep(seconds)
        after_step(run, report)

    BatchSampler.steps = steps  # type: ignore[assignment, method-assign]
    run_module.Run._after_step = record  # type: ignore[method-assign]
    run_module.measured_matmul_flops = lambda runtime: 1e11  # type: ignore[assignment]


def main(words: list[str]) -> int:
    folder, stage, *argv = words
    record_steps(Path(folder))
    return run_main(importlib.import_module(f"tinylm.trainer.train_{stage}").main, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
