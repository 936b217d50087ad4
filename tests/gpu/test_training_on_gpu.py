"""A training step on CUDA: the same numbers as on a CPU, no waiting inside a step, the same bits each time."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.distributed as dist

from tests.trainer.trainer_parts import (
    assert_same_bits,
    batch_of,
    pairs_batch,
    random_documents,
    small_model,
    weights_of,
)
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.system.runtime import Runtime, setup_runtime
from tinylm.trainer.core.distributed import GradientExchange, shard
from tinylm.trainer.core.gradients import accumulate_gradients
from tinylm.trainer.core.loop import StepReport, fit
from tinylm.trainer.core.objectives import make_dpo_objective, next_token_loss
from tinylm.trainer.core.optimizer import make_optimizers

CPU = Runtime(torch.device("cpu"), torch.float32)
SHAPES = [{}, {"qk_norm": True, "num_hidden_layers": 2}, {"tie_word_embeddings": False, "num_key_value_heads": 2}]


def precision(cuda: Runtime, dtype: torch.dtype) -> Runtime:
    return dataclasses.replace(cuda, compute_dtype=dtype)


def micro_batches() -> list:
    return [batch_of(random_documents(8, seed)) for seed in (0, 1)]


def gradients(model: TinyLMForCausalLM, runtime: Runtime, objective=next_token_loss, batches=None) -> dict:
    model = copy.deepcopy(model).to(runtime.device).train()
    exchange = GradientExchange(model, objective, runtime)
    batches = [batch.to(runtime.device) for batch in batches or micro_batches()]
    totals = accumulate_gradients(exchange, batches, list(model.parameters()))
    found = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "loss": totals["loss"].cpu().float()}


@pytest.mark.parametrize("changes", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)], ids=str)
def test_gradients_are_those_of_the_cpu(cuda, changes, dtype, tolerance):
    model = small_model(**changes)
    exact, ours = gradients(model, CPU), gradients(model, precision(cuda, dtype))
    assert exact.keys() == ours.keys()
    for name, reference in exact.items():
        assert (ours[name] - reference).norm() <= tolerance * reference.norm() + 1e-7, name


def test_dpo_gradients_are_those_of_the_cpu(cuda):
    model = small_model()
    batches = [pairs_batch(random_documents(8), torch.randn(4, 2))]
    objective = make_dpo_objective(0.3)
    exact = gradients(model, CPU, objective, batches)
    ours = gradients(model, precision(cuda, torch.float32), objective, batches)
    for name, reference in exact.items():
        assert (ours[name] - reference).norm() <= 1e-4 * reference.norm() + 1e-7, name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_waits_for_the_gpu_once(cuda, name, monkeypatch):
    """The totals and the gradient's norm are read together; any other read of a step is an error."""
    model = small_model(num_hidden_layers=2).to(cuda.device)
    optimizers = make_optimizers(model, name)
    reads = []

    def tolist(tensor: torch.Tensor) -> list[float]:
        reads.append(tensor.shape)
        torch.cuda.set_sync_debug_mode("default")
        values = [float(x) for x in tensor.cpu().numpy()]
        torch.cuda.set_sync_debug_mode("error")
        return values

    def train(steps: int) -> None:
        batches = [micro_batches() for _ in range(steps)]
        fit(model, next_token_loss, optimizers, lambda _: 1e-3, batches, cuda, steps)

    train(1)  # allocations and set-up of libraries
    plain = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: tolist(x) if x.is_cuda else plain(x))
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(reads) == 3


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_same_run_twice_has_the_same_bits(cuda, dtype, compiled):
    def run() -> tuple[dict, list[StepReport]]:
        torch.manual_seed(0)
        model = small_model(num_hidden_layers=2, qk_norm=True, hidden_size=64, max_position_embeddings=128).cuda()
        if compiled:
            model.compile_for_training()
        reports: list[StepReport] = []
        batches = [[batch_of(random_documents(60, step), width=128, per_row=10)] for step in range(6)]
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10) if dtype == torch.float16 else None
        optimizers = make_optimizers(model, "muon")
        runtime = precision(cuda, dtype)
        fit(model, next_token_loss, optimizers, lambda _: 5e-3, batches, runtime, 6, on_step=[reports.append],
            scaler=scaler)  # fmt: skip
        return weights_of(model), reports

    (first, reports), (second, again) = run(), run()
    assert_same_bits(first, second)
    assert [r.loss for r in reports] == [r.loss for r in again]
    assert reports[-1].loss < reports[0].loss and not any(r.skipped for r in reports)


def test_compiled_training_is_close_to_eager_and_compiles_few_graphs(cuda):
    """The number of documents differs from batch to batch; each number must not be a new compilation."""
    from torch._dynamo.utils import counters

    losses = {}
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        model = small_model(num_hidden_layers=2, max_position_embeddings=128).cuda()
        if compiled:
            model.compile_for_training()
        reports: list[StepReport] = []
        batches = [[batch_of(random_documents(40 + 2 * step, step), width=128, per_row=10)] for step in range(10)]
        sizes = {batch[0].input_ids.shape for batch in batches}
        fit(model, next_token_loss, make_optimizers(model), lambda _: 1e-3, batches, cuda, 10, on_step=[reports.append])
        losses[compiled] = torch.tensor([report.loss for report in reports])
    assert (losses[True] - losses[False]).abs().max() < 0.02
    assert counters["stats"]["unique_graphs"] <= 2 * len(sizes) + 2, (dict(counters["stats"]), sizes)


def test_fp16_scaler_skips_what_overflows_and_goes_back(cuda):
    model = small_model().cuda()
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    runtime = precision(cuda, torch.float16)
    before = weights_of(model)
    batches = [micro_batches() for _ in range(40)]
    fit(model, next_token_loss, make_optimizers(model), lambda _: 1e-3, batches[:1], runtime, 1, scaler=scaler)
    assert_same_bits(before, weights_of(model))
    fit(model, next_token_loss, make_optimizers(model), lambda _: 1e-3, batches, runtime, 40, scaler=scaler)
    assert scaler.get_scale() < 2.0**30 and not torch.equal(before["model.norm.weight"], model.model.norm.weight)


def test_the_fused_optimizers_follow_the_cpu(cuda):
    for name in ("adamw", "muon"):
        models = {device: small_model(num_hidden_layers=2).to(device) for device in ("cpu", "cuda")}
        for device, model in models.items():
            runtime = CPU if device == "cpu" else precision(cuda, torch.float32)
            fit(model, next_token_loss, make_optimizers(model, name), lambda _: 1e-3, [micro_batches()] * 5, runtime, 5)
        for (key, left), right in zip(weights_of(models["cpu"]).items(), models["cuda"].parameters(), strict=True):
            # Muon's products are in bfloat16 on a GPU.
            assert (left - right.detach().cpu()).norm() < (1e-4 if name == "adamw" else 1e-2) * left.norm(), (name, key)


@pytest.fixture
def nccl(cuda):
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield cuda
    dist.destroy_process_group()


def test_ddp_and_fsdp_over_nccl_on_one_rank(nccl, monkeypatch):
    """The collectives of both, with nobody else there: the gradients are those of a plain model."""
    model = small_model(num_hidden_layers=2)
    plain = gradients(model, nccl)
    many = dataclasses.replace(nccl, world_size=2)  # only so that the exchange is set up; the group has one rank
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **_: tensor)
    half = gradients(model, many)
    for name, reference in plain.items():
        ratio = 1 if name == "loss" else 2  # the loss is multiplied by the number of ranks, which DDP divides by
        assert (half[name] - ratio * reference).norm() <= 0.05 * reference.norm() + 1e-6, name
    sharded = copy.deepcopy(model).cuda()
    monkeypatch.setattr("tinylm.trainer.core.distributed.init_device_mesh", lambda kind, _: _mesh(kind))
    shard(sharded, "fsdp", many)
    sharded.train()
    exchange = GradientExchange(sharded, next_token_loss, nccl)
    batches = [batch.to(nccl.device) for batch in micro_batches()]
    totals = accumulate_gradients(exchange, batches, list(sharded.parameters()))
    assert abs(float(totals["loss"]) - float(plain["loss"])) < 0.02 * float(plain["loss"])
    for name, parameter in sharded.named_parameters():
        reference = plain[name]
        assert (parameter.grad.full_tensor().cpu() - reference).norm() <= 0.05 * reference.norm() + 1e-6, name


def _mesh(kind: str):
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh(kind, [0])


def test_auto_chooses_the_gpu_and_bfloat16():
    runtime = setup_runtime()
    assert runtime.device == torch.device("cuda", 0) and runtime.compute_dtype == torch.bfloat16
