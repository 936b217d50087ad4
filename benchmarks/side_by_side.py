"""What both benchmarks share: two contestants of equal weights, timed in turns, and the table of results.

Turns are interleaved (A B A B ...), so that a machine that slows down slows down both, and medians are taken,
so that one disturbed turn does not count.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from tinylm.files.atomic import write_json
from tinylm.model.hf_config import config_to_hf
from tinylm.model.model_tinylm import TinyLMConfig, TinyLMForCausalLM
from tinylm.system.runtime import Runtime, measured_matmul_flops

OURS, THEIRS = "tinylm", "transformers"


@dataclass(frozen=True)
class Result:
    """One contestant in one setting."""

    setting: str
    """Shape and precision, in words."""
    precision: str
    """Of the matrix products, such as `bfloat16`."""
    system: str
    tokens_per_second: float
    """Median over the rounds."""
    ratio: float
    """Over transformers in the same setting: the median of the rounds' own ratios."""
    flops: float
    """Floating-point operations per second (FLOP/s), from the formula that the benchmark states."""
    ceiling: float
    """FLOP/s of a large matrix product in the same precision, measured in the same run."""
    rounds: tuple[float, ...]
    """Tokens per second of each round."""


def equal_models(config: TinyLMConfig) -> tuple[TinyLMForCausalLM, Any]:
    """Our model and transformers' Llama with the same shape and the same weights."""
    ours = TinyLMForCausalLM(config)
    named = ("architectures", "model_type", "dtype")
    fields = {key: value for key, value in config_to_hf(config).items() if key not in named}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert sum(p.numel() for p in theirs.parameters()) == ours.num_parameters()
    return ours, theirs


def time_in_turns(
    contestants: Mapping[str, Callable[[], int]], rounds: int, synchronize: Callable[[], None]
) -> dict[str, list[float]]:
    """Tokens per second of each contestant in each round; one round before them warms up and is not counted.

    Args:
        contestants: name -> a function that does a turn's work and returns how many tokens it was.
        synchronize: waits until the device has finished.
    """
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, work in contestants.items():
            synchronize()
            start = time.perf_counter()
            num_tokens = work()
            synchronize()
            if turn > 0:
                speeds[name].append(num_tokens / (time.perf_counter() - start))
    return speeds


def results_of(
    setting: str, precision: str, speeds: Mapping[str, Sequence[float]], flops_per_token: float, ceiling: float
) -> list[Result]:
    """Medians and ratios of one setting."""
    results = []
    for name, values in speeds.items():
        ratios = [mine / theirs for mine, theirs in zip(values, speeds[THEIRS], strict=True)]
        median = statistics.median(values)
        results.append(
            Result(
                setting,
                precision,
                name,
                median,
                statistics.median(ratios),
                median * flops_per_token,
                ceiling,
                tuple(values),
            )
        )
    return results


def runtime_synchronize(runtime: Runtime) -> Callable[[], None]:
    """Waits for the run's device."""
    if runtime.device.type == "cuda":
        return lambda: torch.cuda.synchronize(runtime.device)
    return lambda: None


def matmul_ceiling(runtime: Runtime) -> float:
    """The best of three measurements: a ceiling is what the machine can do when nothing else runs."""
    return max(measured_matmul_flops(runtime) for _ in range(3))


def with_best_ceilings(results: Sequence[Result]) -> list[Result]:
    """Give all results of one precision the highest ceiling of the run.

    A ceiling is measured after each setting; one taken while other work ran on the machine would flatter.
    """
    best: dict[str, float] = {}
    for result in results:
        best[result.precision] = max(best.get(result.precision, 0.0), result.ceiling)
    return [replace(result, ceiling=best[result.precision]) for result in results]


def machine_name() -> str:
    """CPU (or GPU) model and number of cores that torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def announce(results: Sequence[Result]) -> None:
    """One line on stderr as soon as a setting is measured, so that a run that is stopped has said something."""
    speeds = ", ".join(f"{result.system} {result.tokens_per_second:,.0f} tokens/s" for result in results)
    print(f"{results[0].setting}: {speeds} ({results[0].ratio:.2f}x)", file=sys.stderr, flush=True)


def show(title: str, results: Sequence[Result], output: str | None) -> None:
    """Print the table; write the numbers as JSON where `output` names a file."""
    machine = machine_name()
    results = with_best_ceilings(results)
    table = Table(title=f"{title}\n{machine}", title_justify="left")
    table.add_column("setting", min_width=max(len(result.setting) for result in results), no_wrap=True)
    table.add_column("system")
    for heading in ("tokens/s", "ratio", "GFLOP/s", "of ceiling"):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, result in enumerate(results):
        last = index + 1 == len(results) or results[index + 1].setting != result.setting
        table.add_row(
            result.setting if index == 0 or results[index - 1].setting != result.setting else "",
            result.system,
            f"{result.tokens_per_second:,.0f}",
            f"{result.ratio:.2f}",
            f"{result.flops / 1e9:,.1f}",
            f"{result.flops / result.ceiling:.0%}",
            end_section=last,
        )
    Console(width=max(100, shutil.get_terminal_size().columns)).print(table)
    if output is not None:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        report = {"machine": machine, "versions": versions, "results": [asdict(r) for r in results]}
        write_json(output, report)
