"""Gradients travel once per optimizer step, and while the backward pass still computes: seen by torch's profiler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import exchange_worker
import pytest

from tests.processes import run_ranks


def traced_step(where: Path, sharding: str) -> dict[str, Any]:
    """One step of three micro-batches of the `small` model, as rank 0 of two saw it; events in the order of time."""
    run_ranks(exchange_worker.main, [[str(where / "trace"), sharding]] * 2, where)
    facts = json.loads((where / "trace.0").read_text())
    facts["events"].sort(key=lambda event: event["start"])
    return facts


def named(facts: dict[str, Any], *words: str) -> list[dict[str, Any]]:
    return [event for event in facts["events"] if any(event["name"].startswith(word) for word in words)]


@pytest.mark.slow
def test_buckets_are_sent_in_the_last_backward_pass_only_and_while_it_computes(tmp_path):
    facts = traced_step(tmp_path, "none")
    # The first and the last all-reduce are the number of targets before the step, and the means after it.
    _, *launched, _ = named(facts, "c10d::allreduce_")
    assert facts["micro_batches"] == 3
    assert 4 <= len(launched) <= 6, "103 MB in buckets of 25 MB, once; without no_sync() there would be thrice as many"
    *_, last_loss = named(facts, "DistributedDataParallel.forward")
    assert all(bucket["start"] > last_loss["end"] for bucket in launched)
    backward = [event["start"] for event in named(facts, "autograd::engine") if event["start"] > last_loss["end"]]
    early = [bucket for bucket in launched if bucket["start"] < max(backward)]
    assert len(early) >= len(launched) - 1, "only the last bucket may wait for the end of the backward pass"
    computed_after_the_first = [start for start in backward if start > launched[0]["end"]]
    assert len(computed_after_the_first) > len(backward) / 2


@pytest.mark.long
def test_a_sharded_model_reduces_once_a_step_and_gathers_in_every_pass(tmp_path):
    facts = traced_step(tmp_path, "fsdp")
    # 8 blocks, the final norm, and the embedding at both ends, where its tied weight is used.
    assert len(named(facts, "c10d::_reduce_scatter_base_")) == 8 + 1 + 2
    gathers = len(named(facts, "c10d::_allgather_base_"))
    assert gathers == 3 * 2 * (8 + 1 + 1), "3 micro-batches, forward and backward, each unit"
