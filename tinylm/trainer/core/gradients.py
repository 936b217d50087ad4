"""The gradient of one optimizer step, from its micro-batches: one after the other, or side by side on a CPU's cores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tinylm.dataset.batches import Batch
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.system.cpu_parallel import map_on_cores, num_cores
from tinylm.system.runtime import Runtime
from tinylm.trainer.core.distributed import GradientExchange

Scaler = torch.amp.GradScaler | None


def parts_of_batch(batch_size: int, model: TinyLMForCausalLM, runtime: Runtime) -> int:
    """Into how many equal parts a batch is cut, to be computed side by side on a CPU's cores; 1 elsewhere.

    Dropout keeps a batch whole: parts that run at the same time would draw their random numbers in any order. So do
    several processes, which exchange their gradients in the backward pass of a step's last micro-batch.
    """
    has_dropout = any(getattr(module, "dropout", 0.0) for module in model.modules())
    if has_dropout or runtime.world_size > 1:
        return 1
    return max(n for n in range(1, num_cores(runtime.device) + 1) if batch_size % n == 0)


def accumulate_gradients(
    objective: GradientExchange,
    micro_batches: Sequence[Batch],
    trained: Sequence[Tensor],
    runtime: Runtime,
    scaler: Scaler = None,
    num_workers: int = 1,
) -> dict[str, Tensor]:
    """Add to `.grad` of the parameters `trained` the gradient of the mean loss over all micro-batches and ranks.

    Every micro-batch's loss is divided by the global count, so how a step is cut up does not matter, to rounding.

    Args:
        num_workers: micro-batches computed at a time, each on cores of its own. Their gradients are added in the
            order of the micro-batches, so the sum is the same every time.

    Returns:
        Means over the step's targets, all ranks: "loss" and the objective's metrics; and "count", "num_tokens".
    """
    sum_dtype = torch.float32 if runtime.device.type == "mps" else torch.float64  # MPS has no float64
    sizes = torch.tensor(
        [sum(b.count for b in micro_batches), sum(b.input_ids.numel() for b in micro_batches)], dtype=sum_dtype
    )
    count, num_tokens = runtime.all_reduce_sum(sizes.to(runtime.device)).unbind()
    divisor = count.clamp(min=1)  # a step without a single target learns nothing, instead of 0 / 0

    def forward(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        batch = batch.to(runtime.device)
        with runtime.autocast():
            loss_sum, metrics = objective(batch)
        loss = loss_sum * (runtime.world_size / divisor)
        return scaler.scale(loss) if scaler is not None else loss, {"loss": loss_sum.detach(), **metrics}

    def forward_and_backward(batch: Batch) -> tuple[tuple[Tensor | None, ...], dict[str, Tensor]]:
        loss, values = forward(batch)
        return torch.autograd.grad(loss, trained, allow_unused=True), values

    if objective.needs_rehearsal:
        with torch.random.fork_rng([runtime.device.index] if runtime.device.type == "cuda" else []):
            forward(micro_batches[0])[0].backward()
        for parameter in trained:
            parameter.grad = None
        objective.needs_rehearsal = False
    sums: dict[str, Tensor] = {}
    if num_workers == 1:
        for number, batch in enumerate(micro_batches, start=1):
            with objective.micro_batch(is_last=number == len(micro_batches)):
                loss, values = forward(batch)
                loss.backward()
            _add(sums, values)
    else:
        for gradients, values in map_on_cores(forward_and_backward, micro_batches, num_workers):
            for parameter, gradient in zip(trained, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
            _add(sums, values)
    means = torch.stack([value.to(sum_dtype) for value in sums.values()])
    means = runtime.all_reduce_sum(means) / divisor
    return {**dict(zip(sums, means.unbind(), strict=True)), "count": count, "num_tokens": num_tokens}


def _add(sums: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, torch.zeros_like(value)) + value
