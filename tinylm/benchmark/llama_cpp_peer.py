"""llama.cpp as a contender: the same weights in GGUF files of our own export, the same work.

xllamacpp is llama.cpp and its server as one Python package. It has a process of its own: in one process with torch,
OpenMP counts the threads of both, and with more threads than cores it lets all of them sleep between two operations.
Both were half as fast.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

FORMATS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.int8: "q8_0"}
"""Our precision of the weights -> the format of GGUF that is nearest."""
NAMES = {dtype: f"llama.cpp {kind.upper()}" for dtype, kind in FORMATS.items()}
"""Our precision -> the contender's name."""


class LlamaCpp:
    """A GGUF file, loaded by a process of its own, which ends with this object (see `llama_cpp_worker`)."""

    def __init__(self, model: Path, slots: int, context: int, reuses_prompts: bool = False) -> None:
        numbers = (slots, context, torch.get_num_threads(), int(reuses_prompts))
        words = [sys.executable, "-m", "tinylm.benchmark.llama_cpp_worker", str(model), *map(str, numbers)]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
        )

    def complete(self, prompts: Sequence[list[int]], num_tokens: int) -> int:
        """Continue prompts together, each greedily by `num_tokens`; returns how many tokens there were in all.

        Raises:
            RuntimeError: the process failed.
        """
        process = self._process
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        try:
            process.stdin.write(json.dumps([list(prompts), num_tokens]) + "\n")
            process.stdin.flush()
        except BrokenPipeError:  # what it said is read below
            pass
        line = process.stdout.readline()
        if not line.strip().isdecimal():
            process.kill()
            said = process.stderr.read().strip().splitlines()
            raise RuntimeError(f"llama.cpp: the process failed: {said[-1] if said else 'it said nothing'}")
        return int(line)

    def turn(self, prompts: Callable[[], Sequence[list[int]]], num_tokens: int) -> Callable[[], float]:
        """A turn's work: new prompts, and so many tokens for each."""
        return lambda: float(self.complete(prompts(), num_tokens))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
