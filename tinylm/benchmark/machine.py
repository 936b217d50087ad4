"""The machine: its name, and its ceilings, with which each figure is compared."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tinylm.benchmark.bench import Bench
from tinylm.benchmark.figures import OURS, Figure, synchronize
from tinylm.system.code_version import code_version
from tinylm.system.memory import memory_limit
from tinylm.system.runtime import Runtime, device_has_bf16, measured_matmul_flops, setup_runtime


def machine_facts(runtime: Runtime) -> dict[str, Any]:
    """CPU, cores, threads that torch uses, memory (GB), GPU, and the system."""
    cpu = torch.device("cpu")
    limit, gpu = memory_limit(cpu), None
    if runtime.device.type == "cuda":
        gpu = torch.cuda.get_device_name(runtime.device)
    elif runtime.device.type != "cpu":
        gpu = runtime.device.type
    return {
        "cpu": _cpu_name(),
        "bfloat16": device_has_bf16(runtime.device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": None if limit is None else round(limit / 1e9, 1),
        "gpu": gpu,
        "system": platform.platform(),
    }


def machine_line(facts: dict[str, Any]) -> str:
    """The facts in a line."""
    memory = f", {facts['memory_gb']:.0f} GB" if facts["memory_gb"] else ""
    bf16 = "bfloat16 in hardware" if facts["bfloat16"] else "no bfloat16 in hardware"
    gpu = f"{facts['gpu']}, " if facts["gpu"] else ""
    return f"{gpu}{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads{memory}, {bf16}"


def versions() -> dict[str, str | None]:
    """Of Python, of this code and of the packages that decide the speed; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "tokenizers", "transformers", "xllamacpp"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return {**found, "tinylm": code_version()["version"], "code": code_version()["code"]}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measure_ceilings(bench: Bench) -> Iterator[Figure]:
    """Matrix products in each precision that the hardware has, and reading memory."""
    precisions = ["float32"] + ["bfloat16"] * device_has_bf16(bench.device)
    for precision in precisions:
        runtime = setup_runtime(bench.settings.device, precision)
        rates = tuple(measured_matmul_flops(runtime) for _ in range(bench.settings.rounds))
        bench.ceilings.note_flops(precision, max(rates))
        yield Figure("ceilings", "", f"matmul, {precision}", "GFLOP/s", {OURS: tuple(rate / 1e9 for rate in rates)})
    rates = tuple(read_speed(bench.runtimes[0], bench.settings.memory_mb) for _ in range(bench.settings.rounds))
    bench.ceilings.bytes_per_second = max(bench.ceilings.bytes_per_second, *rates)
    yield Figure("ceilings", "", "memory, reading", "GB/s", {OURS: tuple(rate / 1e9 for rate in rates)})


def measure_matmul_again(bench: Bench) -> None:
    """After a part: a ceiling may have been measured while the machine was busy."""
    for runtime in bench.runtimes:
        bench.ceilings.note_flops(bench.name_of(runtime), measured_matmul_flops(runtime))


def read_speed(runtime: Runtime, megabytes: int, num_reads: int = 5) -> float:
    """Bytes per second of adding up numbers too many for any cache: the best of `num_reads`."""
    numbers = torch.ones(megabytes * 250_000, device=runtime.device)
    best = float("inf")
    for _ in range(num_reads):
        synchronize(runtime)
        start = time.perf_counter()
        numbers.sum()
        synchronize(runtime)
        best = min(best, time.perf_counter() - start)
    return numbers.nbytes / best
