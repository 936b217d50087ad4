"""The training loop of all stages. It needs batches, an objective and a schedule, and does not know the stage.

Gradients are normalised by the *global* number of targets of an optimizer step, over micro-batches and ranks. So every
target has the same weight, however a batch is split: 8x1, 1x8 accumulated, and 2 ranks x 4 agree to rounding.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tinylm.dataset.batches import Batch
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.system.runtime import Runtime
from tinylm.trainer.core.distributed import GradientExchange, full_tensor
from tinylm.trainer.core.failed_steps import whole_or_undone
from tinylm.trainer.core.gradients import Scaler, accumulate_gradients
from tinylm.trainer.core.objectives import Objective

Optimizers = Sequence[torch.optim.Optimizer]


@dataclass
class StepReport:
    """The result of one optimizer step; `on_step` callables receive it."""

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
    """Wall-clock time of the step, in which the next step's batches are drawn (and the first's own)."""
    micro_batches: Sequence[Batch] = ()
    """What this rank computed."""
    skipped: bool = False
    """The loss or the gradient was not a finite number, so the weights did not change."""
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
    at_once: int = 1,
) -> None:
    """Train in place, from `start_step` to `num_steps` or to the end of `step_batches`, whichever comes first.

    Args:
        step_batches: for each optimizer step, the micro-batches that this rank accumulates; drawn one step ahead.
        learning_rate: optimizer step (from 0) -> learning rate.
        grad_clip: largest global gradient norm; 0 turns clipping off.
        on_step: called in this order after every step; logging, evaluation and saving are passed in here.
        scaler: the gradient scaler for fp16; bf16 and fp32 need none.
        at_once: micro-batches computed at a time, each on its own CPU cores.

    A step whose loss or gradient is not a finite number changes no weights, and its report says so.
    """
    trained = [p for group in _groups(optimizers) for p in group["params"]]
    exchange = GradientExchange(model, objective, runtime)
    model.train()
    start = time.perf_counter()
    step, steps = start_step, itertools.islice(step_batches, num_steps - start_step)
    upcoming = _draw(steps, runtime)
    while (micro_batches := upcoming) is not None:
        rate = learning_rate(step)
        for group in _groups(optimizers):
            group["lr"] = rate
        runtime.seed_step(step)
        with runtime.deterministic(), whole_or_undone(model, trained):
            totals = accumulate_gradients(exchange, micro_batches, trained, scaler, at_once)
        upcoming = _draw(steps, runtime)  # while a GPU still computes; the next line waits for it
        values, grad_norm, skipped = _update_weights(optimizers, trained, totals, grad_clip, scaler)
        step += 1
        report = StepReport(
            step=step,
            num_steps=num_steps,
            loss=values.pop("loss"),
            learning_rate=rate,
            grad_norm=grad_norm,
            num_tokens=int(values.pop("num_tokens")),
            num_targets=int(values.pop("count")),
            seconds=time.perf_counter() - start,
            micro_batches=micro_batches,
            skipped=skipped,
            metrics=values,
        )
        for callback in on_step:
            callback(report)
        model.train()
        start = time.perf_counter()


def _draw(steps: Iterator[list[Batch]], runtime: Runtime) -> list[Batch] | None:
    """The next step's micro-batches, on their way to the device; None after the last."""
    micro_batches = next(steps, None)
    return None if micro_batches is None else [batch.to(runtime.device) for batch in micro_batches]


def _groups(optimizers: Optimizers) -> Iterator[dict]:
    return (group for optimizer in optimizers for group in optimizer.param_groups)


def _update_weights(
    optimizers: Optimizers, trained: list[Tensor], totals: dict[str, Tensor], grad_clip: float, scaler: Scaler
) -> tuple[dict[str, float], float, bool]:
    """Clip, step, clear the gradients. Returns `totals` as numbers, the norm before clipping, whether it was skipped.

    Totals and norm are global, so all ranks decide alike. They are read together, the one time a step waits for a GPU.
    """
    for optimizer in optimizers if scaler is not None else ():
        scaler.unscale_(optimizer)  # type: ignore[union-attr]
    gradients = [p.grad for p in trained if p.grad is not None]
    norm = full_tensor(torch.nn.utils.get_total_norm(gradients))
    *numbers, grad_norm = torch.stack([*totals.values(), norm.to(totals["loss"].dtype)]).tolist()
    values = dict(zip(totals, numbers, strict=True))
    # fp16's scaler skips steps by itself until its scale fits, which is not an error.
    skipped = not (math.isfinite(values["loss"]) and (scaler is not None or math.isfinite(grad_norm)))
    if grad_clip > 0 and not skipped:
        torch.nn.utils.clip_grads_with_norm_(trained, grad_clip, norm)
    for optimizer in optimizers:
        if not skipped:
            scaler.step(optimizer) if scaler is not None else optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if scaler is not None:
        scaler.update()
    return values, grad_norm, skipped
