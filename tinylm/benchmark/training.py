"""The training step, and the memory that it takes.

Ours is the step of a run, made by `fit`. Theirs is given its batch on the device and reads nothing back.

Work per token, counted as in PaLM's appendix B (Chowdhery et al., 2022, arXiv:2204.02311) with the causal half of
attention: 6 N + 6 L C T floating-point operations, N weights, L layers, C width, T tokens in a row.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch

from tinylm.benchmark import transformers_peer
from tinylm.benchmark.bench import Bench
from tinylm.benchmark.figures import OURS, THEIRS, Figure, Turns, Work, take_turns
from tinylm.benchmark.settings import words
from tinylm.dataset.batches import Batch
from tinylm.model.model_tinylm import TinyLMConfig, TinyLMForCausalLM
from tinylm.system.runtime import Runtime, seed_everything
from tinylm.trainer.core.gradients import micro_batches_at_once
from tinylm.trainer.core.loop import fit
from tinylm.trainer.core.objectives import next_token_loss
from tinylm.trainer.core.optimizer import make_optimizers

NAMES = {"adamw": "AdamW", "muon": "Muon"}


def make_batch(config: TinyLMConfig, batch_size: int, length: int, documents: int = 1) -> Batch:
    """Random tokens, `documents` of equal length in a row, every position predicted."""
    tokens = torch.randint(3, config.vocab_size, (batch_size, length + 1))
    places = torch.arange(length)
    document = places * documents // length
    starts = torch.searchsorted(document, document)
    return Batch(
        input_ids=tokens[:, :-1].contiguous(),
        targets=tokens[:, 1:].contiguous(),
        position_ids=(places - starts).repeat(batch_size, 1),
        document_ids=document + documents * torch.arange(batch_size)[:, None],
        count=batch_size * length,
    )


def training_turn(
    model: TinyLMForCausalLM, optimizers: list[torch.optim.Optimizer], parts: list[Batch], runtime: Runtime, steps: int
) -> Callable[[], float]:
    """A turn of steps, made by `fit`; on a CPU a step's parts are computed at the same time, a core for each."""

    def turn() -> float:
        fit(model, next_token_loss, optimizers, lambda _: 1e-4, [parts] * steps, runtime, steps, at_once=len(parts))
        return float(steps * sum(part.count for part in parts))

    return turn


def measure_step(bench: Bench) -> Iterator[Figure]:
    """The step as it is without a compiler."""
    for preset in bench.settings.presets("step"):
        for runtime in bench.runtimes:
            yield from _measure_shape(bench, "step", preset, runtime)


def measure_compiled(bench: Bench) -> Iterator[Figure]:
    """The step compiled with torch.compile, and how long compiling takes."""
    for preset in bench.settings.presets("compiled"):
        for runtime in bench.runtimes:
            try:
                yield from _measure_shape(bench, "compiled", preset, runtime)
            except Exception as error:  # no C++ compiler, a broken one, no room for its files: there are many ways
                reason = textwrap.shorten(str(error) or type(error).__name__, 120, placeholder="...")
                bench.remark(f"compiled, {preset}: left out, because torch.compile failed ({reason})")
            finally:
                torch.compiler.reset()  # the compiled graphs hold the models


def _measure_shape(bench: Bench, part: str, preset: str, runtime: Runtime) -> Iterator[Figure]:
    """All contenders in one shape and precision."""
    settings, precision, is_compiled = bench.settings, bench.name_of(runtime), part == "compiled"
    length, rows = settings.shape(preset)
    config = settings.config(preset, length)
    group = f"{preset} {config.hidden_size}x{config.num_hidden_layers}, V={config.vocab_size:,}, T={length:,}, B={rows}"
    group = f"{group}, {precision}"
    bench.say(f"{part}: {group}")
    seed_everything(0)
    ours = TinyLMForCausalLM(config).to(runtime.device)
    contenders = _our_turns(bench, ours, part, preset, runtime)
    if bench.compares:
        theirs = transformers_peer.same_weights(ours)
        forward = torch.compile(theirs, **_compile_options(bench)) if is_compiled else None
        steps = _steps(bench, preset)
        batch = make_batch(config, rows, length)
        contenders[THEIRS] = transformers_peer.training_turn(theirs, batch, runtime, steps, forward)
    turns = take_turns(contenders, settings.rounds, runtime)
    work = Work(precision, flops=ours.training_flops_per_token(length))
    peer = {THEIRS: turns[THEIRS].speeds} if bench.compares else {}
    for name in contenders:
        if name != THEIRS:
            yield Figure(part, group, name, "tokens/s", {OURS: turns[name].speeds, **peer}, work)
    if is_compiled:
        first = {OURS: turns[next(iter(turns))]} | ({THEIRS: turns[THEIRS]} if bench.compares else {})
        seconds = {name: (_seconds_to_compile(value),) for name, value in first.items()}
        yield Figure(part, group, "compiling, once", "s", seconds)


def _our_turns(
    bench: Bench, ours: TinyLMForCausalLM, part: str, preset: str, runtime: Runtime
) -> dict[str, Callable[[], float]]:
    """A contender for each optimizer on whole rows, and one for the last on rows of several documents.

    They share the model, so it is compiled once; the weights have no influence on the speed.
    """
    settings, is_compiled = bench.settings, part == "compiled"
    documents, (length, rows) = settings.documents_in(part), settings.shape(preset)
    if is_compiled:
        ours.compile_for_training(**_compile_options(bench))
    at_once = 1 if is_compiled else micro_batches_at_once(rows, ours, runtime)
    whole, packed = (
        [make_batch(ours.config, rows // at_once, length, number) for _ in range(at_once)] for number in (1, documents)
    )
    contenders, steps = {}, _steps(bench, preset)
    for optimizer in words(settings.optimizer):
        optimizers, name = make_optimizers(ours, optimizer, learning_rate=1e-4), NAMES[optimizer]
        contenders[name] = training_turn(ours, optimizers, whole, runtime, steps)
    if documents > 1:
        name = f"{name}, {documents} texts a row"
        contenders[name] = training_turn(ours, optimizers, packed, runtime, steps)
    return contenders


def _compile_options(bench: Bench) -> dict[str, Any]:
    """A rehearsal builds no kernels, which would take a minute."""
    return {"backend": "eager"} if bench.settings.quick else {}


def _steps(bench: Bench, preset: str) -> int:
    on_gpu = bench.device.type != "cpu"
    return bench.settings.steps or (10 if on_gpu else 4 if preset == "tiny" else 1)


def _seconds_to_compile(turns: Turns) -> float:
    """By how much the first turn was longer than the fastest of the others."""
    return max(0.0, turns.first_seconds - min(turns.seconds))


# --- memory -----------------------------------------------------------------------------------------------------------


def measure_memory(bench: Bench) -> Iterator[Figure]:
    """Peak memory of training steps with AdamW, each contender in processes of its own."""
    settings = bench.settings
    for preset in settings.presets("memory"):
        length, rows = settings.shape(preset)
        config = settings.config(preset, length)
        for runtime in bench.runtimes:
            precision = bench.name_of(runtime)
            group = f"{preset} {config.hidden_size}x{config.num_hidden_layers}, T={length:,}, B={rows}, {precision}"
            bench.say(f"memory: {group}")
            task = {"config": asdict(config), "length": length, "rows": rows, "dtype": precision}
            task["device"] = str(runtime.device)
            contenders = (OURS, THEIRS) if bench.compares else (OURS,)
            rounds = [{name: peak_of(name, task) for name in contenders} for _ in range(min(2, settings.rounds))]
            samples = {name: tuple(found[name] / 1e9 for found in rounds) for name in contenders}
            yield Figure("memory", group, "peak of a step, AdamW", "GB", samples)


def peak_of(contender: str, task: dict[str, Any]) -> int:
    """Peak memory in bytes of a process that does the task; of the GPU, where it runs on one.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", "tinylm.benchmark.step_memory", contender, json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode != 0:
        raise RuntimeError(f"memory, {contender}: the process failed: {(done.stderr.splitlines() or ['?'])[-1]}")
    return int(done.stdout.split()[-1])
