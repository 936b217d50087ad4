"""Tokenising text, and the time until a command answers."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from tinylm.benchmark.bench import Bench
from tinylm.benchmark.figures import OURS, Figure, take_turns
from tinylm.benchmark.using import held_out_texts
from tinylm.tokenizer.tokenizer import Tokenizer

LEARNT_ENTRIES = 1024
"""Of the tokenizer that is trained: as many as in the quickstart."""
COMMANDS = ("--version", "chat --help")


def measure_tokenize(bench: Bench) -> Iterator[Figure]:
    """Megabytes of TinyWorld's text per second: to token ids, and to a new tokenizer."""
    texts = held_out_texts(bench.settings.text_kb * 1000)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    group = f"{megabytes:.2f} MB of TinyWorld"
    bench.say(f"tokenize: {group}")
    tokenizer = Tokenizer.default()

    def encode() -> float:
        tokenizer.encode_batch(texts)
        return megabytes

    def train() -> float:
        Tokenizer.train(texts, LEARNT_ENTRIES)
        return megabytes

    works: dict[str, Callable[[], float]] = {"text to tokens": encode, f"training, {LEARNT_ENTRIES:,} entries": train}
    for name, work in works.items():
        turns = take_turns({OURS: work}, bench.settings.rounds, bench.runtimes[0])[OURS]
        yield Figure("tokenize", group, name, "MB/s", {OURS: turns.speeds})


def measure_start(bench: Bench) -> Iterator[Figure]:
    """Seconds until a command has answered, in a process of its own."""
    for command in COMMANDS:
        samples = [_seconds_of(command) for _ in range(bench.settings.rounds + 1)][1:]  # the first fills the disk cache
        yield Figure("start", "", f"tinylm {command}", "s", {OURS: tuple(samples)})


def _seconds_of(command: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "tinylm", *command.split()], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start
