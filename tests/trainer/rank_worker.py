"""One process of a training run over several: `python rank_worker.py OUTPUT`, ranks from torchrun's environment.

Two steps over an epoch of 9 rows; in the second one rank 1 has none.
"""

from __future__ import annotations

import sys

import torch
from trainer_parts import Rows, small_model, weights_of

from tinylm.dataset.batches import BatchSampler, step_batches
from tinylm.system.runtime import setup_runtime
from tinylm.trainer.core.loop import fit
from tinylm.trainer.core.objectives import next_token_loss


def main(output: str) -> None:
    runtime = setup_runtime("cpu", "float32")
    model = small_model()
    sampler = BatchSampler(9, 8 // runtime.world_size, 8, 5, runtime.rank, runtime.world_size)
    reports: list = []
    fit(
        model,
        next_token_loss,
        [torch.optim.SGD(model.parameters())],
        lambda step: 0.5,
        step_batches(Rows(9), sampler),
        runtime,
        num_steps=2,
        on_step=(reports.append,),
    )
    facts = [(r.loss, r.grad_norm, r.num_tokens, r.num_targets) for r in reports]
    torch.save({"weights": weights_of(model), "facts": facts}, f"{output}.{runtime.rank}")


if __name__ == "__main__":
    main(sys.argv[1])
