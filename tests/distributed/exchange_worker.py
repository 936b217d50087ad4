"""One process of two: when do gradients travel in a step of three micro-batches? Run by
`test_gradient_exchange.py`.

Writes the events of the profiler that matter, a JSON line for each: name, start and end in microseconds, thread.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tinylm.dataset.batches import BatchSampler, step_batches
from tinylm.dataset.rows import Batch, build_row, collate_rows
from tinylm.model.model_tinylm import TinyLMConfig, TinyLMForCausalLM
from tinylm.system.runtime import setup_runtime
from tinylm.trainer.core.distributed import GradientExchange, shard
from tinylm.trainer.core.gradients import accumulate_gradients
from tinylm.trainer.core.objectives import next_token_loss

MICRO_BATCHES = 3


class Rows:
    """Rows of 32 random tokens."""

    num_targets, fingerprint, unit = 31 * 6, "random rows", "rows"

    def __len__(self) -> int:
        return 2 * MICRO_BATCHES

    def row(self, index: int):
        ids = torch.randint(1, 6400, (32,), generator=torch.Generator().manual_seed(index)).numpy()
        return build_row([(ids.astype("int32"), ids > 0)])

    def collate(self, rows) -> Batch:
        return collate_rows(rows, 32, pad_id=0)


def main(output: str, sharding: str) -> None:
    runtime = setup_runtime("cpu", "float32")
    torch.manual_seed(0)
    model = TinyLMForCausalLM(TinyLMConfig.preset("small", vocab_size=6400))
    shard(model, sharding, runtime)
    exchange = GradientExchange(model, next_token_loss, runtime)
    sampler = BatchSampler(len(Rows()), 1, len(Rows()), 0, runtime.rank, runtime.world_size)
    trained = list(model.parameters())
    for _ in range(2):  # DistributedDataParallel orders its buckets in the first step
        (batches,) = step_batches(Rows(), sampler)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            accumulate_gradients(exchange, batches, trained)
        model.zero_grad()
    events = [
        {"name": event.name, "start": event.time_range.start, "end": event.time_range.end, "thread": event.thread}
        for event in profile.events()
    ]
    size = sum(p.numel() for p in model.parameters()) * 4
    facts = {"bytes": size, "micro_batches": len(batches), "events": events}
    Path(f"{output}.{runtime.rank}").write_text(json.dumps(facts))
