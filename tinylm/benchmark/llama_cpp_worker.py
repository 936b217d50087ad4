"""llama.cpp in a process of its own: answers the lines of `llama_cpp_peer.LlamaCpp` until they end.

    python -m tinylm.benchmark.llama_cpp_worker model.gguf SLOTS CONTEXT THREADS REUSES_PROMPTS

A line is JSON, [prompts, number of tokens]; the answer is how many tokens were made in all.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TextIO


def start(model: str, slots: int, context: int, threads: int) -> Any:
    """A GGUF file, loaded, with llama.cpp's usual settings.

    Args:
        slots: texts that it answers at the same time.
        context: tokens that each of them has room for.
    """
    import xllamacpp  # only where it is measured

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_parallel, params.n_ctx, params.n_gpu_layers = slots, slots * context, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_ram_mib, params.verbosity = 0, -1
    return xllamacpp.Server(params)


def complete(server: Any, prompt: list[int], num_tokens: int, reuses_prompts: bool) -> int:
    """Continue token ids greedily by exactly so many tokens; returns how many there were."""
    answer = server.handle_completions({
        "prompt": prompt, "max_tokens": num_tokens, "temperature": 0.0, "ignore_eos": True,
        "cache_prompt": reuses_prompts,
    })  # fmt: skip
    return int(answer["usage"]["completion_tokens"])


def answer_lines(server: Any, slots: int, reuses_prompts: bool, lines: TextIO, answers: TextIO) -> None:
    """Answer until the lines end."""
    with ThreadPoolExecutor(slots) as pool:
        for line in lines:
            prompts, num_tokens = json.loads(line)
            counts = pool.map(lambda ids, count=num_tokens: complete(server, ids, count, reuses_prompts), prompts)
            answers.write(f"{sum(counts)}\n")
            answers.flush()


if __name__ == "__main__":
    model, *numbers = sys.argv[1:]
    slots, context, threads, reuses_prompts = map(int, numbers)
    answer_lines(start(model, slots, context, threads), slots, bool(reuses_prompts), sys.stdin, sys.stdout)
