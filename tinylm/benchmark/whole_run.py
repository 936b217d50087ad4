"""A whole short pretraining run on TinyWorld, and how much of the bare step's speed is left in it.

The run validates, writes a sample, saves its state and its model, and logs. The bare step trains on the same rows with
the same optimizer, and does nothing else.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tinylm.benchmark.bench import Bench
from tinylm.benchmark.figures import OURS, Figure, Work, synchronize
from tinylm.benchmark.training import NAMES
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.system.runtime import Runtime
from tinylm.tokenizer.tokenizer import Tokenizer
from tinylm.trainer.core.loop import StepReport, fit
from tinylm.trainer.core.objectives import next_token_loss
from tinylm.trainer.recipe_utils import make_run, sample_texts, with_defaults
from tinylm.trainer.run.run import Run
from tinylm.trainer.run.stage import Learner, start_stage
from tinylm.trainer.stage_data import load_texts
from tinylm.trainer.train_pretrain import PretrainSettings

ROWS_PER_DOCUMENT = 0.4
"""Rows of 256 tokens that a document of TinyWorld fills, at least."""


@dataclass
class Speeds:
    """Tokens per second of one round."""

    bare: float
    fitted: float
    """Of the run, from its plan to its last file."""
    whole: float
    """The same with making the data and the model."""


def measure_run(bench: Bench) -> Iterator[Figure]:
    """The bare step and the run, in turns."""
    settings = bench.settings
    for preset in settings.presets("run"):
        length, rows = settings.shape(preset)
        for runtime in bench.runtimes:
            precision = bench.name_of(runtime)
            group = f"{preset}, T={length:,}, B={rows}, {precision}, {settings.run_steps} steps"
            bench.say(f"run: {group}")
            with tempfile.TemporaryDirectory(prefix="tinylm-bench-") as folder:
                recipe = _recipe(bench, preset, precision, folder)
                flops = _new_run(recipe).learner.model.training_flops_per_token(length)
                speeds = [_one_round(bench, recipe, runtime, number) for number in range(min(2, settings.rounds))]
            work = Work(precision, flops=flops)
            for name, values in (
                (f"bare step, {NAMES[recipe.optimizer]}", [each.bare for each in speeds]),
                ("whole run", [each.fitted for each in speeds]),
                ("whole run and its data", [each.whole for each in speeds]),
            ):
                yield Figure("run", group, name, "tokens/s", {OURS: tuple(values)}, work)
            for name, shares in (
                ("whole run / bare step", [each.fitted / each.bare for each in speeds]),
                ("the same with its data", [each.whole / each.bare for each in speeds]),
            ):
                yield Figure("run", group, name, "%", {OURS: tuple(100 * share for share in shares)})


def _recipe(bench: Bench, preset: str, precision: str, folder: str) -> PretrainSettings:
    """Settings of a run that fills one epoch, with validations and states as often as in a run of 20 minutes."""
    settings = bench.settings
    length, rows = settings.shape(preset)
    documents = max(64, round(settings.run_steps * rows * length / 256 / ROWS_PER_DOCUMENT))
    return PretrainSettings(
        output_dir=folder,
        preset=preset,  # type: ignore[arg-type]
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_hidden_layers,
        tinyworld_documents=documents,
        max_steps=settings.run_steps,
        max_seq_len=length,
        batch_size=rows,
        eval_batches=8,
        device=settings.device,
        dtype=precision,  # type: ignore[arg-type]
    )


def _new_run(settings: PretrainSettings) -> Run:
    """The run of `tinylm pretrain` with these settings, made in the order of its recipe."""
    with contextlib.redirect_stdout(io.StringIO()):
        stage = start_stage("pretrain", settings)
        tokenizer = Tokenizer.default()
        model = TinyLMForCausalLM(settings.model_config(tokenizer.vocab_size)).to(stage.runtime.device)
        stage = with_defaults(stage, model)
        data = load_texts(stage, tokenizer, settings.tinyworld_documents)
        sample = sample_texts(model, tokenizer, "Once upon a time")
        optimizers = stage.settings.make_optimizers(model)
        return make_run(stage, Learner(model, tokenizer, optimizers, next_token_loss, sample), data)


def _one_round(bench: Bench, recipe: PretrainSettings, runtime: Runtime, number: int) -> Speeds:
    """The bare step, then the run, each with a model of its own."""
    bare = _bare_speed(_new_run(_in_folder(recipe, f"bare_{number}")), bench.settings.run_steps // 4 or 1, runtime)
    start = time.perf_counter()
    run = _new_run(_in_folder(recipe, f"run_{number}"))
    made = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        run.fit()
    synchronize(runtime)
    end = time.perf_counter()
    tokens = recipe.max_steps * recipe.batch_size * recipe.max_seq_len
    return Speeds(bare, tokens / (end - made), tokens / (end - start))


def _in_folder(recipe: PretrainSettings, name: str) -> PretrainSettings:
    return replace(recipe, output_dir=str(Path(recipe.output_dir) / name))


def _bare_speed(run: Run, steps: int, runtime: Runtime) -> float:
    """Tokens per second of `fit` on the run's first rows, after a step that warms up."""
    batches = list(itertools.islice(run.plan.batches(0), steps + 1))
    reports: list[StepReport] = []
    start = 0.0

    def note(report: StepReport) -> None:
        nonlocal start
        reports.append(report)
        if report.step == 1:
            start = time.perf_counter()

    learner, plan = run.learner, run.plan
    fit(
        learner.model, learner.objective, learner.optimizers, plan.learning_rate, batches, runtime, len(batches),
        on_step=(note,), at_once=plan.at_once,
    )  # fmt: skip
    synchronize(runtime)
    return sum(report.num_tokens for report in reports[1:]) / (time.perf_counter() - start)
