"""Greedy decoding beside transformers' `generate`: one stream and a batch, same weights, same prompts.

    python -m benchmarks.decode [--batch_sizes 1,16] [--precision float32,bfloat16] [--rounds 3]

Tokens per second count generated tokens and the time of the prompt too. Work per token is counted as 2 N
floating-point operations, N weights. One stream reads every weight for each token, so memory bounds it and
its share of the matmul ceiling is small by nature.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from benchmarks.side_by_side import (
    OURS,
    THEIRS,
    Result,
    announce,
    equal_models,
    matmul_ceiling,
    results_of,
    runtime_synchronize,
    show,
    time_in_turns,
)
from tinylm.commandline.settings import parse_settings
from tinylm.generation.engine import Engine, SamplingSettings
from tinylm.model.model_tinylm import PRESETS, TinyLMConfig
from tinylm.system.runtime import seed_everything, setup_runtime


@dataclass(frozen=True)
class DecodeSettings:
    """Settings of the benchmark."""

    preset: str = "small"
    """comma-separated presets to measure: tiny, small, large"""
    precision: str = "bfloat16,float32"
    """comma-separated precisions of weights and computation: bfloat16, float32"""
    batch_sizes: str = "1,16"
    """comma-separated numbers of streams decoded together"""
    prompt_tokens: int = 32
    """tokens in each prompt"""
    max_new_tokens: int = 128
    """tokens to generate for each prompt"""
    rounds: int = 3
    """turns of each system; the median is reported"""
    steps: int = 1
    """generations in a turn"""
    hidden_size: int | None = None
    """width, in place of the preset's"""
    num_hidden_layers: int | None = None
    """layers, in place of the preset's"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    output: str | None = None
    """JSON file to write the numbers to"""

    def __post_init__(self) -> None:
        for name in ("rounds", "steps", "prompt_tokens", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}; expected at least 1; pass --{name} 1")
        for preset in self.preset.split(","):
            if preset not in PRESETS:
                raise ValueError(f"preset {preset!r}; expected {', '.join(PRESETS)}; correct --preset")
        for size in self.batch_sizes.split(","):
            if not size.isdigit() or int(size) < 1:
                raise ValueError(f"batch size {size!r}; expected a positive number; correct --batch_sizes")


def our_generation(engine: Engine, prompts: list[list[int]], max_new_tokens: int) -> Callable[[], int]:
    """Greedy generation of exactly `max_new_tokens` tokens: no token stops it."""
    sampling = SamplingSettings(max_new_tokens=max_new_tokens, temperature=0.0)

    def generate() -> int:
        if len(prompts) == 1:
            return sum(1 for _ in engine.generate(prompts[0], sampling, stop_ids=()))
        return sum(len(answer) for answer in engine.generate_batch(prompts, sampling, stop_ids=()))

    return generate


def their_generation(model: Any, prompts: list[list[int]], max_new_tokens: int) -> Callable[[], int]:
    """The same with transformers."""
    input_ids = torch.tensor(prompts, device=model.device)
    mask = torch.ones_like(input_ids)
    options = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens, min_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0
    )

    def generate() -> int:
        with torch.inference_mode():
            output = model.generate(input_ids, attention_mask=mask, generation_config=options)
        return int(output.shape[0] * (output.shape[1] - input_ids.shape[1]))

    return generate


def measure(settings: DecodeSettings, preset: str, precision: str, batch_size: int) -> list[Result]:
    """Both systems in one shape, precision and number of streams."""
    runtime = setup_runtime(settings.device, precision)
    seed_everything(0)
    wanted = {"hidden_size": settings.hidden_size, "num_hidden_layers": settings.num_hidden_layers}
    config = TinyLMConfig.preset(preset, **{key: value for key, value in wanted.items() if value is not None})
    ours, theirs = (model.to(runtime.device).eval() for model in equal_models(config))
    theirs = theirs.to(runtime.compute_dtype)
    shape = (batch_size, settings.prompt_tokens)
    prompts = torch.randint(3, config.vocab_size, shape).tolist()
    generations = {
        OURS: our_generation(Engine(ours, dtype=runtime.compute_dtype), prompts, settings.max_new_tokens),
        THEIRS: their_generation(theirs, prompts, settings.max_new_tokens),
    }

    def turn_of(generate: Callable[[], int]) -> Callable[[], int]:
        return lambda: sum(generate() for _ in range(settings.steps))

    turns = {name: turn_of(generate) for name, generate in generations.items()}
    speeds = time_in_turns(turns, settings.rounds, runtime_synchronize(runtime))
    streams = "one stream" if batch_size == 1 else f"{batch_size} streams"
    name = f"{preset} {config.hidden_size}x{config.num_hidden_layers}, {streams}, {precision}"
    return results_of(name, precision, speeds, 2 * config.num_parameters(), matmul_ceiling(runtime))


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    description = "Greedy decoding beside transformers' generate, same shape and weights."
    arguments = sys.argv[1:] if argv is None else argv
    settings = parse_settings(DecodeSettings, arguments, "python -m benchmarks.decode", description)
    transformers.logging.set_verbosity_error()
    results = []
    for preset in settings.preset.split(","):
        for precision in settings.precision.split(","):
            for size in settings.batch_sizes.split(","):
                results += measure(settings, preset, precision, int(size))
                announce(results[-2:])
    show("Greedy decoding", results, settings.output)
    return 0


if __name__ == "__main__":
    from tinylm.commandline.exit_status import run_main

    sys.exit(run_main(main, advice=""))
