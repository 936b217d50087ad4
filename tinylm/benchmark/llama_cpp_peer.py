"""llama.cpp as a contender, in this process: the same weights in GGUF files of our own export, the same work.

xllamacpp is llama.cpp and its server as one Python package. It is imported only when it is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

FORMATS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.int8: "q8_0"}
"""Our precision of the weights -> the format of GGUF that is nearest."""
NAMES = {dtype: f"llama.cpp {kind.upper()}" for dtype, kind in FORMATS.items()}
"""Our precision -> the contender's name."""


class LlamaCpp:
    """A GGUF file, loaded, with llama.cpp's usual settings.

    Args:
        slots: texts that it answers at the same time.
        context: tokens that each of them has room for.
    """

    def __init__(self, model: Path, slots: int, context: int, reuses_prompts: bool = False) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_parallel, params.n_ctx, params.n_gpu_layers = slots, slots * context, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        params.cache_ram_mib, params.verbosity = 0, -1
        self.reuses_prompts = reuses_prompts
        self.slots = slots
        self._server = xllamacpp.Server(params)
        # A server that is destroyed before its loop runs waits for ever; one that has answered is past that.
        self.complete([0], 1)

    def complete(self, prompt: list[int], num_tokens: int) -> int:
        """Continue token ids greedily by exactly so many tokens; returns how many there were."""
        answer: Any = self._server.handle_completions({
            "prompt": prompt, "max_tokens": num_tokens, "temperature": 0.0, "ignore_eos": True,
            "cache_prompt": self.reuses_prompts,
        })  # fmt: skip
        return int(answer["usage"]["completion_tokens"])

    def turn(self, prompts: Callable[[], Sequence[list[int]]], num_tokens: int) -> Callable[[], float]:
        """Continue the prompts together, each by `num_tokens`; returns how many tokens there were in all."""

        def turn() -> float:
            with ThreadPoolExecutor(self.slots) as pool:
                return float(sum(pool.map(lambda prompt: self.complete(prompt, num_tokens), prompts())))

        return turn
