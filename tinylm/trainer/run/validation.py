"""The loss on held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from tinylm.dataset.batches import Batch, Dataset, load_batch
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.system.runtime import Runtime
from tinylm.trainer.core.objectives import Objective


def num_batches_of(data: Dataset, batch_size: int, max_batches: int = 0) -> int:
    """Batches of all processes together."""
    return min(-(-len(data) // batch_size), max_batches or len(data))


def batches_of_rank(
    data: Dataset, batch_size: int, runtime: Runtime, max_batches: int = 0
) -> Iterator[tuple[int, Batch]]:
    """(first row, batch) of every `world_size`-th batch, in the order of the data, on the model's device.

    All processes get the same number of batches, because a sharded model needs all processes to compute. If a process
    has no batch left, it gets one without targets.

    Args:
        max_batches: batches of `batch_size` rows in all processes together; 0 means all.
    """
    num_batches = num_batches_of(data, batch_size, max_batches)
    for number in range(runtime.rank, num_batches + -num_batches % runtime.world_size, runtime.world_size):
        start = number * batch_size
        rows = range(start, min(start + batch_size, len(data))) if number < num_batches else range(0)
        yield start, load_batch(data, rows).to(runtime.device)


@torch.no_grad()
def validate(
    model: TinyLMForCausalLM,
    objective: Objective,
    data: Dataset,
    batch_size: int,
    max_batches: int,
    runtime: Runtime,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Mean loss (and the objective's metrics) per target over the held-out data, and bits per byte of text.

    Args:
        max_batches: batches of `batch_size` rows to use, in the order of the data; 0 means all.
        progress: called with the number of batches that are done, of how many.

    Returns:
        "validation_loss" in nats, "validation_<metric>" for each metric, "bits_per_byte" if the data knows its bytes.
    """
    model.eval()
    sums: dict[str, float] = {}
    num_batches = num_batches_of(data, batch_size, max_batches)
    for start, batch in batches_of_rank(data, batch_size, runtime, max_batches):
        progress(min(start // batch_size, num_batches), num_batches)
        with runtime.autocast(), runtime.deterministic():
            loss, metrics = objective(model, batch)
        for name, value in {"count": torch.tensor(batch.count), "loss": loss, **metrics}.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    progress(num_batches, num_batches)
    model.train()
    dtype = torch.float32 if runtime.device.type == "mps" else torch.float64  # MPS has no float64
    totals = runtime.all_reduce_sum(torch.tensor(list(sums.values()), dtype=dtype, device=runtime.device)).tolist()
    count, *rest = totals
    means = {f"validation_{name}": value / count for name, value in zip(list(sums)[1:], rest, strict=True)}
    bytes_per_target = getattr(data, "bytes_per_target", None)
    if bytes_per_target:
        means["bits_per_byte"] = means["validation_loss"] / math.log(2) / bytes_per_target
    return means
