"""The suite: its parts in order, each figure handed on as soon as it is ready."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tinylm.benchmark.bench import Bench
from tinylm.benchmark.figures import Figure
from tinylm.benchmark.machine import measure_ceilings, measure_matmul_again
from tinylm.benchmark.serving import measure_serve
from tinylm.benchmark.settings import PARTS
from tinylm.benchmark.text_and_start import measure_start, measure_tokenize
from tinylm.benchmark.training import measure_compiled, measure_memory, measure_step
from tinylm.benchmark.using import measure_decode, measure_evaluate, measure_prefill
from tinylm.benchmark.whole_run import measure_run

MEASURES: dict[str, Callable[[Bench], Iterator[Figure]]] = {
    "ceilings": measure_ceilings,
    "step": measure_step,
    "compiled": measure_compiled,
    "memory": measure_memory,
    "run": measure_run,
    "decode": measure_decode,
    "prefill": measure_prefill,
    "serve": measure_serve,
    "evaluate": measure_evaluate,
    "tokenize": measure_tokenize,
    "start": measure_start,
}
assert tuple(MEASURES) == PARTS
COMPARED = ("step", "compiled", "run", "decode", "prefill", "serve", "evaluate")
"""Parts whose figures are shown as shares of a ceiling."""


def measure_all(bench: Bench) -> Iterator[Figure]:
    """The figures of the chosen parts. The ceilings come first, also where other parts only are chosen."""
    parts = bench.settings.parts
    if "ceilings" not in parts and not set(parts).isdisjoint(COMPARED):
        parts = ("ceilings", *parts)
    for part in parts:
        yield from MEASURES[part](bench)
        if part in COMPARED:
            measure_matmul_again(bench)
