"""A step's gradient is the same whether its parts are computed one after the other or side by side."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from trainer_parts import Rows, pairs_batch, random_documents, small_model

from tinylm.model.lora import LoRAConfig, apply_lora
from tinylm.system.runtime import Runtime
from tinylm.trainer.core import distributed, gradients
from tinylm.trainer.core.distributed import GradientExchange
from tinylm.trainer.core.gradients import accumulate_gradients, micro_batches_at_once
from tinylm.trainer.core.objectives import make_dpo_objective, next_token_loss

CPU = Runtime(torch.device("cpu"), torch.float32)


def gradient_of(model, objective, micro_batches, dtype=torch.float32, at_once=1):
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = None
    runtime = Runtime(CPU.device, dtype)
    exchange = GradientExchange(model, objective, runtime)
    totals = accumulate_gradients(exchange, micro_batches, trained, None, at_once)
    return [p.grad for p in trained], {name: value.item() for name, value in totals.items()}


def parts_of(stage: str) -> tuple:
    """(objective, four micro-batches with unequal counts)."""
    if stage == "sft":
        rows = Rows(4)
        return next_token_loss, [rows.collate([rows.row(i)]) for i in range(4)]
    pairs = [pairs_batch(random_documents(2 * (i + 1), seed=i), torch.zeros(i + 1, 2)) for i in range(4)]
    return make_dpo_objective(0.5), pairs


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("at_once", [2, 3, 8])
def test_side_by_side_is_one_after_the_other(stage, at_once):
    objective, parts = parts_of(stage)
    model = small_model(num_hidden_layers=2)
    expected, means = gradient_of(model, objective, parts)
    found, found_means = gradient_of(model, objective, parts, at_once=at_once)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert found_means == pytest.approx(means, rel=1e-6) and means["count"] == sum(part.count for part in parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_side_by_side_gives_the_same_bits_every_time(dtype):
    objective, parts = parts_of("sft")
    model = small_model(num_hidden_layers=2)
    first, _ = gradient_of(model, objective, parts, dtype, at_once=3)
    for _ in range(5):
        again, _ = gradient_of(model, objective, parts, dtype, at_once=3)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_side_by_side_adds_in_the_order_of_the_micro_batches():
    """2^25 - 2^25 + 1/4 is 1/4 in float32; from behind it is 0, because 2^25 absorbs so small a number."""
    batch = Rows(1).collate([Rows(1).row(0)])
    counts, factors = (1, 1, 2), (2.0**27, -(2.0**27), 1.0)
    extras = [{"factor": torch.tensor(factor)} for factor in factors]
    parts = [replace(batch, count=count, extras=each) for count, each in zip(counts, extras, strict=True)]
    model = small_model()
    model.requires_grad_(False).model.norm.weight.requires_grad_(True)

    def objective(model, batch):
        return (model.model.norm.weight * torch.ones(16)).sum() * batch.extras["factor"], {}

    for at_once in (1, 3):
        (gradient,), _ = gradient_of(model, objective, parts, at_once=at_once)
        assert (gradient == 0.25).all()


def test_side_by_side_trains_only_the_adapter():
    objective, parts = parts_of("sft")
    model = apply_lora(small_model(), LoRAConfig(rank=2))
    gradient_of(model, objective, parts, at_once=2)
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("cores, batch_size, parts", [(1, 8, 1), (2, 8, 2), (3, 8, 2), (16, 8, 8), (4, 6, 3)])
def test_a_batch_is_cut_into_equal_parts(cores, batch_size, parts, monkeypatch):
    monkeypatch.setattr(gradients, "num_cores", lambda device: cores)
    assert micro_batches_at_once(batch_size, small_model(), CPU) == parts


def test_dropout_keeps_a_batch_whole(monkeypatch):
    monkeypatch.setattr(gradients, "num_cores", lambda device: 2)
    assert micro_batches_at_once(8, small_model(attention_dropout=0.1), CPU) == 1
    assert micro_batches_at_once(8, small_model(hidden_dropout=0.1), CPU) == 1
    assert micro_batches_at_once(8, apply_lora(small_model(), LoRAConfig(rank=2, dropout=0.1)), CPU) == 1
    assert micro_batches_at_once(8, apply_lora(small_model(), LoRAConfig(rank=2)), CPU) == 2
    assert micro_batches_at_once(8, small_model(), Runtime(CPU.device, torch.float32, 0, 2)) == 1


@pytest.mark.parametrize(("processes", "is_needed"), [(1, False), (2, False), (3, True)])
def test_more_than_two_processes_need_an_extra_pass(processes, is_needed, monkeypatch):
    """A sum of two numbers does not depend on the order of the buckets."""
    monkeypatch.setattr(distributed, "DistributedDataParallel", lambda module, **options: module)
    runtime = Runtime(CPU.device, torch.float32, 0, processes)
    assert GradientExchange(small_model(), next_token_loss, runtime).needs_bucket_order == is_needed


def test_the_extra_pass_leaves_no_trace():
    """The first of more than two processes' backward passes only orders the buckets: no gradient, no random number."""
    model = small_model(hidden_dropout=0.3).train()
    exchange, calls = GradientExchange(model, next_token_loss, CPU), []
    plain = exchange.loss
    exchange.loss = lambda batch: calls.append(batch.count) or plain(batch)
    exchange.needs_bucket_order = True
    rows, before = Rows(2), torch.get_rng_state()
    batch = rows.collate(rows.rows)
    for _ in range(2):
        with exchange.micro_batch(batch, is_last=True):
            assert calls == [batch.count]  # once in a run
            assert all(parameter.grad is None for parameter in model.parameters())
            assert torch.equal(torch.get_rng_state(), before)
