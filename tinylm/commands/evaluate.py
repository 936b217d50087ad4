"""`tinylm eval`: measure a model on files of data, or on TinyWorld's held-out questions."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from tinylm.checkpoint.loading import load_for_use
from tinylm.commandline.settings import parse_settings
from tinylm.commandline.terminal import make_console, progress
from tinylm.dataset import tinyworld
from tinylm.evaluation.preferences import ReferenceModel, as_reference
from tinylm.evaluation.results import Measure, measures_json, measures_table
from tinylm.evaluation.sequence_logprob import TOKENS_PER_BATCH, Progress
from tinylm.evaluation.skills import Scoreboard, score_skills
from tinylm.evaluation.tasks import (
    Evaluator,
    check_task_names,
    data_files,
    first_fields,
    recognise_task,
    run_task,
)
from tinylm.files.atomic import require_file_name, write_json
from tinylm.generation.engine import Engine, SamplingSettings
from tinylm.model.lora import adapters_disabled, has_lora
from tinylm.system.runtime import InferenceDtypeName, Runtime, setup_runtime

DESCRIPTION = "Measure a model on data files (the task is recognised by their fields) or on TinyWorld's questions."


@dataclass(frozen=True)
class EvalSettings:
    """Settings of an evaluation."""

    model_path: str
    """model folder, adapter folder or .pth file to measure"""
    data_path: str | None = None
    """file, folder (each file is a task) or glob; unset measures TinyWorld's skills"""
    tasks: str = "auto"
    """comma-separated choice of skills, bits_per_byte, blimp, multiple_choice, lambada, chat, preferences,
    generate; auto chooses by each file's fields"""
    adapter: str | None = None
    """LoRA adapter to add to the model: its folder, or the output folder of `tinylm lora`"""
    reference_path: str | None = None
    """model that preferences are measured against; by default, with an adapter, the model without it"""
    tokenizer_path: str | None = None
    """tokenizer folder; unset takes the model's own"""
    limit: int | None = None
    """take only the first records of a file, pairs of a minimal-pair set, or items of a skill, this many; unset takes
    all (100 items of each skill)"""
    output: str | None = None
    """JSON file to write the report to"""
    max_new_tokens: int = 128
    """longest reply (tokens) in tasks that generate text; decoding is greedy"""
    batch_size: int = TOKENS_PER_BATCH
    """tokens in one forward pass, in tasks that score text"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps"""
    dtype: InferenceDtypeName = "auto"
    """precision of matrix products; auto is bfloat16 where the hardware has it, else float32; int8 stores
    weights in 8 bits, for a CPU: faster for one text at a time, slower for many"""

    def __post_init__(self) -> None:
        check_task_names(self.task_names)
        for name in ("limit", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value}; expected at least 1; pass --{name} with a positive number")
        if self.output is not None:
            require_file_name(self.output)
        if self.data_path is None and set(self.task_names) - {"skills"}:
            wanted = ", ".join(task for task in self.task_names if task != "skills")
            raise ValueError(f"task {wanted} without data; expected --data_path with a file or folder")

    @property
    def task_names(self) -> tuple[str, ...]:
        """The chosen tasks; empty for auto."""
        return () if self.tasks == "auto" else tuple(name.strip() for name in self.tasks.split(","))


def main(argv: list[str] | None = None) -> int:
    """Run `tinylm eval`; returns the exit status."""
    settings = parse_settings(EvalSettings, sys.argv[1:] if argv is None else argv, "tinylm eval", DESCRIPTION)
    console = make_console()
    start = time.perf_counter()
    plan = plan_tasks(settings)
    runtime = setup_runtime(settings.device, settings.dtype, only_uses=True)
    evaluator = build_evaluator(settings, runtime)
    report: dict[str, Any] = {"settings": asdict(settings), "device": str(runtime.device)}
    report["dtype"] = str(runtime.compute_dtype).removeprefix("torch.")
    if settings.data_path is None:
        console.print("No --data_path given: measuring TinyWorld's skills on held-out items.")
    tables = []
    if "skills" in settings.task_names or settings.data_path is None:
        board = measure_skills(evaluator, settings)
        tables.append(board.to_table())
        report["skills"] = board.to_json()
    measures: list[Measure] = []
    for task, path in plan:
        measures += measure_file(evaluator, runtime, task, path, settings.limit)
    if measures:
        tables.append(measures_table(measures, title=settings.model_path))
        report["measures"] = measures_json(measures)
    report["seconds"] = round(time.perf_counter() - start, 1)
    if settings.output is not None:
        write_json(settings.output, report)  # before anything is printed: a closed pipe must not lose it
    for table in tables:
        console.print(table)
    if settings.output is not None:
        console.print(f"report written to {settings.output}")
    return 0


def plan_tasks(settings: EvalSettings) -> list[tuple[str, str]]:
    """(task, file) for each data file. Runs before the model is loaded, so that a wrong path is reported at once.

    Raises:
        ValueError: a file whose fields fit no task, or none of the files fits the chosen tasks.
    """
    if settings.data_path is None:
        return []
    chosen = set(settings.task_names) - {"skills"}
    plan = []
    for path in data_files(settings.data_path):
        fields, where = first_fields(path)
        task = recognise_task(fields, where)
        if task == "chat" and "generate" in chosen:
            task = "generate"  # a conversation also has a question and an answer
        if not settings.task_names or task in chosen:
            plan.append((task, path))
    if chosen and not plan:
        raise ValueError(
            f"{settings.data_path}: no data for {', '.join(sorted(chosen))}; expected a file with the fields "
            "of that task; leave out --tasks to choose by the fields"
        )
    return plan


def build_evaluator(settings: EvalSettings, runtime: Runtime) -> Evaluator:
    """Load the model, its adapter, its tokenizer and the reference."""
    loaded = load_for_use(settings.model_path, settings.adapter, settings.tokenizer_path, runtime.device, merge=False)
    if loaded.notice:
        make_console(stderr=True).print(loaded.notice)
    reference: ReferenceModel | None = None
    if settings.reference_path is not None:
        other = load_for_use(settings.reference_path, device=runtime.device)
        if other.tokenizer != loaded.tokenizer:
            raise ValueError(
                f"{other.path} has another tokenizer than {loaded.path}; a reference must read the same tokens; "
                "give the model that training started from"
            )
        reference = as_reference(other.model)
    elif has_lora(loaded.model):
        reference = _without_adapters(loaded.model)
    engine = Engine(loaded.model, loaded.tokenizer, runtime.compute_dtype)
    return Evaluator(
        model=engine.compute_model if runtime.compute_dtype == torch.int8 else loaded.model,
        tokenizer=loaded.tokenizer,
        engine=engine,
        sampling=SamplingSettings(max_new_tokens=settings.max_new_tokens, temperature=0.0),
        tokens_per_batch=settings.batch_size,
        document_start=loaded.document_start,
        reference=reference,
    )


def _without_adapters(model: Any) -> ReferenceModel:
    @contextlib.contextmanager
    def switched_off() -> Iterator[Any]:
        with adapters_disabled(model):
            yield model

    return switched_off


def measure_skills(evaluator: Evaluator, settings: EvalSettings) -> Scoreboard:
    """TinyWorld's scoreboard, with one column for the model."""
    with task_progress("skills") as report:
        column = score_skills(
            evaluator.engine,
            tinyworld,
            evaluator.sampling,
            num_items=settings.limit or 100,
            reference=evaluator.reference,
            progress=report,
        )
    return Scoreboard({settings.model_path: column})


def measure_file(evaluator: Evaluator, runtime: Runtime, task: str, path: str, limit: int | None) -> list[Measure]:
    """Run one task on one file, with a progress bar. Autocast is for scoring only: the engine casts by itself."""
    precision = contextlib.nullcontext() if task == "generate" else runtime.autocast()
    with task_progress(f"{task}: {path}") as report, precision:
        return run_task(replace(evaluator, progress=report), task, path, limit)


@contextlib.contextmanager
def task_progress(title: str) -> Iterator[Progress]:
    """A progress bar on stderr, as a function that tasks call with (done, total)."""
    with progress(make_console(stderr=True), title) as show:
        yield lambda done, total: show(f"{done:,} of {total:,}", done, total)
