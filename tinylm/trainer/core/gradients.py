"""The gradient of one optimizer step, summed over its micro-batches and the processes of the run.

Micro-batches are computed one after the other, or several at once, each on its own CPU cores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tinylm.dataset.batches import Batch
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.system.cpu_parallel import map_on_cores, num_cores
from tinylm.system.runtime import Runtime, to_device
from tinylm.trainer.core.distributed import GradientExchange

Scaler = torch.amp.GradScaler | None


def micro_batches_at_once(batch_size: int, model: TinyLMForCausalLM, runtime: Runtime) -> int:
    """How many equal parts a batch is cut into, to be computed at the same time: one for each core of a CPU, else 1.

    With dropout a batch is not cut, because parts computed at the same time would draw random numbers in any order.
    Several processes do not cut either: they exchange gradients in the backward pass of a step's last micro-batch.
    """
    has_dropout = any(getattr(module, "dropout", 0.0) for module in model.modules())
    if has_dropout or runtime.world_size > 1:
        return 1
    return max(n for n in range(1, num_cores(runtime.device) + 1) if batch_size % n == 0)


def accumulate_gradients(
    exchange: GradientExchange,
    micro_batches: Sequence[Batch],
    trained: Sequence[Tensor],
    scaler: Scaler = None,
    at_once: int = 1,
) -> dict[str, Tensor]:
    """Add the gradient of the mean loss, over all micro-batches and ranks, to `.grad` of the parameters `trained`.

    Each micro-batch's loss is divided by the global count, so the result does not depend on the split, to rounding.

    Args:
        micro_batches: on the model's device.
        at_once: micro-batches computed at a time, each on its own cores. Their gradients are added in the order of the
            micro-batches, so the sum is always the same.

    Returns:
        "loss" and the objective's metrics, as means over the step's targets of all ranks; "count" and "num_tokens".
    """
    runtime = exchange.runtime
    sum_dtype = torch.float32 if runtime.device.type == "mps" else torch.float64  # MPS has no float64
    sizes = torch.tensor(
        [sum(b.count for b in micro_batches), sum(b.input_ids.numel() for b in micro_batches)], dtype=sum_dtype
    )
    count, num_tokens = runtime.all_reduce_sum(to_device(sizes, runtime.device)).unbind()
    divisor = count.clamp(min=1)  # avoids 0 / 0: a step without targets learns nothing
    sums: dict[str, Tensor] = {}

    def share_of_loss(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with runtime.autocast():
            loss_sum, metrics = exchange.loss(batch)
        loss = loss_sum * (runtime.world_size / divisor)  # the exchange averages; this makes it a sum
        return scaler.scale(loss) if scaler is not None else loss, {"loss": loss_sum.detach(), **metrics}

    def gradients_of(batch: Batch) -> tuple[tuple[Tensor | None, ...], dict[str, Tensor]]:
        loss, values = share_of_loss(batch)
        return torch.autograd.grad(loss, trained, allow_unused=True), values

    if at_once == 1:
        for number, batch in enumerate(micro_batches, start=1):
            with exchange.micro_batch(batch, is_last=number == len(micro_batches)):
                loss, values = share_of_loss(batch)
                loss.backward()
            _add(sums, values)
    else:
        for gradients, values in map_on_cores(gradients_of, micro_batches, at_once):
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
