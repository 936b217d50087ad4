"""The one training loop. It knows batches, an objective and a schedule; it does not know which stage it runs.

Gradients are normalised by the *global* number of targets of an optimizer step, over micro-batches and ranks.
A row with few targets therefore weighs as little as it should, and how a batch is cut up does not matter:
batch 8x1, 1x8 accumulated, and 2 ranks x 4 agree to rounding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tinylm.dataset.batches import Batch
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.runtime import Runtime
from tinylm.trainer.gradients import Scaler, accumulate_gradients
from tinylm.trainer.objectives import Objective

Optimizers = Sequence[torch.optim.Optimizer]


@dataclass
class StepReport:
    """What one optimizer step did; handed to the `on_step` callables."""

    step: int
    """Optimizer steps done so far, this one included."""
    num_steps: int
    """Optimizer steps of the whole run."""
    loss: float
    """Mean over the step's targets, all ranks."""
    learning_rate: float
    grad_norm: float
    """Global L2 norm before clipping."""
    num_tokens: int
    """Positions the model processed in this step, all ranks, filler included."""
    num_targets: int
    """Targets (or preference pairs) that the loss averages over, all ranks."""
    seconds: float
    """Wall-clock time of the step, data loading included."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The objective's metrics, means over the step's targets."""


def fit(
    model: TinyLMForCausalLM,
    objective: Objective,
    optimizers: Optimizers,
    learning_rate: Callable[[int], float],
    step_batches: Iterable[list[Batch]],
    runtime: Runtime,
    num_steps: int,
    start_step: int = 0,
    grad_clip: float = 1.0,
    on_step: Sequence[Callable[[StepReport], None]] = (),
    scaler: Scaler = None,
    num_workers: int = 1,
) -> None:
    """Train in place, from `start_step` to `num_steps` or to the end of `step_batches`, whichever comes first.

    Args:
        step_batches: for each optimizer step the micro-batches this rank accumulates.
        learning_rate: optimizer step (from 0) -> learning rate.
        grad_clip: largest global gradient norm; 0 turns clipping off.
        on_step: called after every step, in order: logging, evaluation, saving are the recipe's.
        scaler: fp16's gradient scaler; bf16 and fp32 need none.
        num_workers: micro-batches computed side by side, each on CPU cores of its own.

    Raises:
        RuntimeError: the loss or the gradient is not a number. The weights are still those of the step before.
    """
    trained = [p for group in _groups(optimizers) for p in group["params"]]
    model.train()
    start = time.perf_counter()
    for step, micro_batches in zip(range(start_step, num_steps), step_batches, strict=False):
        rate = learning_rate(step)
        for group in _groups(optimizers):
            group["lr"] = rate
        totals = accumulate_gradients(model, objective, micro_batches, trained, runtime, scaler, num_workers)
        runtime.all_reduce_gradients(trained)
        grad_norm = _update_weights(optimizers, trained, totals["loss"], grad_clip, scaler, step)
        values = {name: value.item() for name, value in totals.items()}
        report = StepReport(
            step=step + 1,
            num_steps=num_steps,
            loss=values.pop("loss"),
            learning_rate=rate,
            grad_norm=grad_norm,
            num_tokens=int(values.pop("num_tokens")),
            num_targets=int(values.pop("count")),
            seconds=time.perf_counter() - start,
            metrics=values,
        )
        for callback in on_step:
            callback(report)
        model.train()
        start = time.perf_counter()  # before the next step's batches are drawn


def _groups(optimizers: Optimizers) -> Iterator[dict]:
    return (group for optimizer in optimizers for group in optimizer.param_groups)


def _update_weights(
    optimizers: Optimizers, trained: list[Tensor], loss: Tensor, grad_clip: float, scaler: Scaler, step: int
) -> float:
    """Clip, step and forget the gradients; returns their global norm before clipping."""
    for optimizer in optimizers if scaler is not None else ():
        scaler.unscale_(optimizer)  # type: ignore[union-attr]
    norm = torch.nn.utils.clip_grad_norm_(trained, grad_clip if grad_clip > 0 else math.inf).item()
    if not math.isfinite(loss.item()) or (scaler is None and not math.isfinite(norm)):
        raise RuntimeError(
            f"step {step + 1}: the loss is {loss.item()} and the gradient norm {norm}; nothing was updated; "
            "go on from the last saved state with --resume, or start again if none was saved, with a lower "
            "--learning_rate or a smaller --grad_clip"
        )
    for optimizer in optimizers:
        scaler.step(optimizer) if scaler is not None else optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if scaler is not None:
        scaler.update()
    return norm
