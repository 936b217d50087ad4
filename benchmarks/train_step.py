"""Training step beside transformers' Llama: forward, loss, backward, clipping, fused AdamW; same weights and tokens.

    python -m benchmarks.train_step [--preset small,tiny] [--precision float32,bfloat16] [--compile] [--rounds 3]

Ours is the step of a run, made by `fit`. Theirs is given its batch on the device and reads nothing back.

Work per token, counted as in PaLM's appendix B (Chowdhery et al., 2022, arXiv:2204.02311) with the causal half of
attention: 6 N + 6 L C T floating-point operations, N weights, L layers, C width, T tokens in a row.
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
from tinylm.dataset.batches import Batch
from tinylm.model.model_tinylm import TinyLMConfig
from tinylm.system.runtime import Runtime, seed_everything, setup_runtime
from tinylm.trainer.core.gradients import micro_batches_at_once
from tinylm.trainer.core.loop import fit
from tinylm.trainer.core.objectives import next_token_loss
from tinylm.trainer.core.optimizer import OPTIMIZERS, make_optimizers

SHAPES = {"tiny": (256, 16), "small": (512, 8), "large": (512, 8)}
"""Preset -> (tokens in a row, rows in a batch) unless given."""


@dataclass(frozen=True)
class TrainStepSettings:
    """Settings of the benchmark."""

    preset: str = "small,tiny"
    """comma-separated presets to measure: tiny, small, large"""
    precision: str = "bfloat16,float32"
    """comma-separated precisions of matrix products: bfloat16, float32"""
    rounds: int = 3
    """turns of each system; the median is reported"""
    steps: int = 1
    """training steps in a turn"""
    max_seq_len: int | None = None
    """tokens in a row; unset takes 256 for tiny, else 512"""
    batch_size: int | None = None
    """rows in a batch; unset takes 16 for tiny, else 8"""
    documents: int = 1
    """documents packed into a row of ours; theirs is plain causal text always"""
    optimizer: str = "adamw"
    """ours: adamw or muon; theirs is AdamW always"""
    hidden_size: int | None = None
    """width, in place of the preset's"""
    num_hidden_layers: int | None = None
    """layers, in place of the preset's"""
    compile: bool = False
    """compile both models with torch.compile first"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    output: str | None = None
    """JSON file to write the numbers to"""

    def __post_init__(self) -> None:
        for name in ("rounds", "steps", "documents"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}; expected at least 1; pass --{name} 1")
        for preset in self.preset.split(","):
            if preset not in SHAPES:
                raise ValueError(f"preset {preset!r}; expected {', '.join(SHAPES)}; correct --preset")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer {self.optimizer!r}; expected {' or '.join(OPTIMIZERS)}; correct --optimizer")


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


def our_turn(model: Any, parts: list[Batch], runtime: Runtime, settings: TrainStepSettings) -> Callable[[], int]:
    """A turn of steps, made by `fit`; on a CPU a step's parts are computed at the same time, a core for each."""
    optimizers = make_optimizers(model, settings.optimizer, learning_rate=1e-4)

    def turn() -> int:
        steps = [parts] * settings.steps
        fit(model, next_token_loss, optimizers, lambda _: 1e-4, steps, runtime, settings.steps, at_once=len(parts))
        return settings.steps * sum(part.count for part in parts)

    return turn


def their_turn(
    model: Any, batch: Batch, runtime: Runtime, forward: Any, settings: TrainStepSettings
) -> Callable[[], int]:
    """The same with transformers' model and loss, at its best: SDPA attention, fused AdamW, no padding mask.

    Its loss shifts inside, so it is given the inputs as labels; that is one target fewer in a row.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    input_ids = batch.input_ids.to(runtime.device)
    model.train()

    def turn() -> int:
        for _ in range(settings.steps):
            with runtime.autocast():
                loss = forward(input_ids=input_ids, labels=input_ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return settings.steps * batch.count

    return turn


def measure(settings: TrainStepSettings, preset: str, precision: str) -> list[Result]:
    """Both systems in one shape and precision."""
    runtime = setup_runtime(settings.device, precision)
    seed_everything(0)
    wanted = {"hidden_size": settings.hidden_size, "num_hidden_layers": settings.num_hidden_layers}
    config = TinyLMConfig.preset(preset, **{key: value for key, value in wanted.items() if value is not None})
    length = settings.max_seq_len or SHAPES[preset][0]
    batch_size = settings.batch_size or SHAPES[preset][1]
    ours, theirs = (model.to(runtime.device) for model in equal_models(config))
    forward = torch.compile(theirs) if settings.compile else theirs
    if settings.compile:
        ours.compile_for_training()
    at_once = 1 if settings.compile else micro_batches_at_once(batch_size, ours, runtime)
    parts = [make_batch(config, batch_size // at_once, length, settings.documents) for _ in range(at_once)]
    whole = make_batch(config, batch_size, length)
    turns = {
        OURS: our_turn(ours, parts, runtime, settings),
        THEIRS: their_turn(theirs, whole, runtime, forward, settings),
    }
    speeds = time_in_turns(turns, settings.rounds, runtime_synchronize(runtime))
    compiled = ", compiled" if settings.compile else ""
    packed = f", {settings.documents} documents a row" if settings.documents > 1 else ""
    shape = f"{preset} {config.hidden_size}x{config.num_hidden_layers}, T={length}, B={batch_size}"
    setting = f"{shape}, {precision}, {settings.optimizer}{compiled}{packed}"
    flops_per_token = ours.training_flops_per_token(length)
    return results_of(setting, precision, speeds, flops_per_token, matmul_ceiling(runtime))


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    description = "Training step beside transformers' Llama of the same shape and weights."
    arguments = sys.argv[1:] if argv is None else argv
    settings = parse_settings(TrainStepSettings, arguments, "python -m benchmarks.train_step", description)
    transformers.logging.set_verbosity_error()
    results = []
    for preset in settings.preset.split(","):
        for precision in settings.precision.split(","):
            results += measure(settings, preset, precision)
            announce(results[-2:])
    show("Training step", results, settings.output)
    return 0


if __name__ == "__main__":
    from tinylm.commandline.exit_status import run_main

    sys.exit(run_main(main, advice=""))
