"""DPO's reference log-probabilities: scored once, shared out over the processes, the same to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from reference_worker import BATCH_SIZE, NUM_PAIRS, score
from trainer_parts import random_documents, reference_log_prob, run_two_ranks, small_model

from tinylm.system.runtime import Runtime


def test_every_answer_is_scored_in_its_place():
    """Held to the model's own probabilities, token by token in float64."""
    log_probs, scored, _ = score(Runtime(torch.device("cpu"), torch.float32))
    assert scored == [BATCH_SIZE] * (NUM_PAIRS // BATCH_SIZE) + [NUM_PAIRS % BATCH_SIZE]
    model = small_model()
    exact = [reference_log_prob(model, ids, is_target) for ids, is_target in random_documents(2 * NUM_PAIRS)]
    torch.testing.assert_close(log_probs, torch.tensor(exact).view(-1, 2), atol=1e-4, rtol=1e-5)


def test_the_reference_is_scored_in_the_precision_of_the_run():
    """Else policy and reference would differ before the first step, by rounding alone."""
    exact, half = (score(Runtime(torch.device("cpu"), dtype))[0] for dtype in (torch.float32, torch.bfloat16))
    assert not torch.equal(exact, half)
    torch.testing.assert_close(exact, half, atol=0.3, rtol=0.03)


@pytest.mark.slow
def test_two_processes_share_the_pairs_and_agree_with_one(tmp_path: Path):
    """Every process once scored every pair: eight GPUs took as long as one, and each did the others' work."""
    alone, scored, _ = score(Runtime(torch.device("cpu"), torch.float32))
    ranks = run_two_ranks("reference_worker.py", tmp_path / "out")
    assert [rank["scored"] for rank in ranks] == [scored[0::2], [*scored[1::2], 0]]
    for rank in ranks:
        assert torch.equal(rank["log_probs"], alone)
        # A sharded model computes the same with all processes, and its optimizers are made over the shards.
        torch.testing.assert_close(rank["of_sharded"], alone, rtol=1e-6, atol=1e-6)  # its head has no blocks
        assert rank["is_sharded"]
