"""One process of DPO's reference scoring over several: `python reference_worker.py OUTPUT`, ranks as torchrun's."""

from __future__ import annotations

import sys

import torch
from torch.distributed.tensor import DTensor
from trainer_parts import random_documents, small_model

from tinylm.commandline.terminal import make_console
from tinylm.dataset.documents import Documents
from tinylm.dataset.dpo_dataset import DPODataset
from tinylm.dataset.sft_dataset import Outcomes
from tinylm.system.runtime import Runtime, setup_runtime
from tinylm.trainer import train_dpo
from tinylm.trainer.core.distributed import shard
from tinylm.trainer.run.stage import Stage

NUM_PAIRS, BATCH_SIZE = 9, 2  # five batches: the second of two processes has one less to score


def score(runtime: Runtime, sharding: str = "none") -> tuple[torch.Tensor, list[int], bool]:
    """([pairs, 2] log-probabilities of the reference, the pairs in each batch that this process scored, and whether
    every parameter is sharded afterwards)."""
    documents = random_documents(2 * NUM_PAIRS)
    data = DPODataset(Documents.join(documents), 24, Outcomes(NUM_PAIRS, 0, 0))
    settings = train_dpo.DPOSettings(model_path="none", batch_size=BATCH_SIZE)
    scored: list[int] = []
    plain_scorer = train_dpo.sequence_log_probs

    def count(model, batch, num_sequences):
        scored.append(batch.count)
        return plain_scorer(model, batch, num_sequences)

    train_dpo.sequence_log_probs = count
    try:
        model = small_model(hidden_dropout=0.3).train()  # the reference must not drop anything
        shard(model, sharding, runtime)
        train_dpo.attach_reference(model, data, Stage("dpo", settings, runtime, make_console(False)))
    finally:
        train_dpo.sequence_log_probs = plain_scorer
    assert data.reference_log_probs is not None
    is_sharded = all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return torch.from_numpy(data.reference_log_probs), scored, is_sharded


def main(output: str) -> None:
    runtime = setup_runtime("cpu", "float32")
    log_probs, scored, _ = score(runtime)
    of_sharded, _, is_sharded = score(runtime, "fsdp")
    found = {"log_probs": log_probs, "scored": scored, "of_sharded": of_sharded, "is_sharded": is_sharded}
    torch.save(found, f"{output}.{runtime.rank}")


if __name__ == "__main__":
    main(sys.argv[1])
