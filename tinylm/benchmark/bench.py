"""What the parts of the suite share."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from tinylm.benchmark.figures import Ceilings
from tinylm.benchmark.settings import BenchSettings, words
from tinylm.system.runtime import Runtime, setup_runtime


@dataclass
class Bench:
    """One run of the suite."""

    settings: BenchSettings
    runtimes: list[Runtime]
    """One for each precision."""
    compares: bool
    """Whether transformers is measured, too."""
    compares_llama_cpp: bool
    """Whether llama.cpp is: it computes on the CPU only, and serves only."""
    say: Callable[[str], None]
    """Shows a line at once."""
    ceilings: Ceilings = field(default_factory=Ceilings)
    remarks: list[str] = field(default_factory=list)
    """What was left out, and why."""

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.runtimes[0].device

    def remark(self, line: str) -> None:
        """Say at once, and again below the table, what the figures do not hold."""
        self.remarks.append(line)
        self.say(line)

    def name_of(self, runtime: Runtime) -> str:
        """The precision, such as `bfloat16`."""
        return str(runtime.compute_dtype).removeprefix("torch.")


def start_bench(settings: BenchSettings, say: Callable[[str], None]) -> Bench:
    """Choose the device, the precisions and the contenders."""
    settings = settings.filled()
    runtimes = {r.compute_dtype: r for r in (setup_runtime(settings.device, p) for p in words(settings.precision))}
    is_there = {name: importlib.util.find_spec(name) is not None for name in ("transformers", "xllamacpp")}
    serves = "serve" in settings.parts and next(iter(runtimes.values())).device.type == "cpu"
    compares = settings.compare and is_there["transformers"]
    compares_llama_cpp = settings.compare and serves and is_there["xllamacpp"]
    bench = Bench(settings, list(runtimes.values()), compares, compares_llama_cpp, say)
    if settings.compare and not is_there["transformers"]:
        bench.remark("transformers is not installed, so it is not measured; pip install transformers")
    if settings.compare and serves and not is_there["xllamacpp"]:
        bench.remark("xllamacpp is not installed, so llama.cpp is not measured; pip install xllamacpp")
    if settings.quick:
        bench.remark("--quick: a rehearsal; its figures say nothing about the machine")
    return bench
