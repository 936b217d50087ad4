"""Where a step's tensors are, and what it waits for, proved on the meta device: it has shapes, and no numbers to read.

There, each operation that would let a step wait for an accelerator is an error: `item`, `bool`, `nonzero`, a mask as
index.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trainer_parts import batch_of, pairs_batch, random_documents, small_model

from tinylm.dataset.rows import Batch
from tinylm.model import model_tinylm
from tinylm.model.lora import PROJECTIONS, TABLES, LoRAConfig, apply_lora
from tinylm.system.runtime import Runtime
from tinylm.trainer.core.loop import StepReport, fit
from tinylm.trainer.core.objectives import make_dpo_objective, next_token_loss
from tinylm.trainer.core.optimizer import make_optimizers

META = torch.device("meta")
COPIES = {"aten._to_copy.default", "aten.copy_.default"}


class Devices(TorchDispatchMode):
    """Notes the operations whose tensors are on several devices; numbers from the CPU are free for an accelerator."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed: list[tuple[str, list[torch.Size]]] = []
        self.num_on_meta = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors if x.dim() > 0 or x.device.type != "cpu"}
        self.num_on_meta += devices == {"meta"}
        if len(devices) > 1:
            self.mixed.append((str(function), [x.shape for x in tensors]))
        return result


@pytest.fixture
def reads(monkeypatch) -> list[torch.Size]:
    """The shapes that `tolist` has read from the meta device, which then holds ones."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # torch knows no autocast for meta
    found: list[torch.Size] = []
    tolist = torch.Tensor.tolist

    def read(tensor: torch.Tensor) -> list:
        if tensor.is_meta:
            found.append(tensor.shape)
            return [1.0] * len(tensor)
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", read)
    return found


def optimizers_for_meta(model: torch.nn.Module, name: str = "adamw") -> list[torch.optim.Optimizer]:
    """The optimizers of a run, but AdamW not in one kernel, which the meta device lacks."""
    optimizers = make_optimizers(model, name)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group.update({"fused": False, "foreach": True} if "fused" in group else {})
    return optimizers


def steps_of(stage: str, num_steps: int) -> tuple[Callable, list[list[Batch]]]:
    """(objective, the micro-batches of each step), two to a step, of unequal counts."""
    seeds = [(2 * step, 2 * step + 1) for step in range(num_steps)]
    if stage == "dpo":
        pairs = [
            [pairs_batch(random_documents(6 + 2 * (s % 2), s), torch.randn(3 + s % 2, 2)) for s in two] for two in seeds
        ]
        return make_dpo_objective(0.3), pairs
    return next_token_loss, [[batch_of(random_documents(8 + s % 2, s)) for s in two] for two in seeds]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("shape", [{}, {"qk_norm": True, "hidden_dropout": 0.1, "tie_word_embeddings": False}], ids=str)
@pytest.mark.parametrize("stage", ["sft", "dpo", "lora", "lora on tables"])
def test_a_step_reads_the_device_once_and_mixes_no_devices(reads, stage, shape, optimizer):
    model = small_model(num_hidden_layers=2, **shape)
    if stage.startswith("lora"):
        apply_lora(model, LoRAConfig(rank=2, target_modules=PROJECTIONS if stage == "lora" else TABLES))
    model.to(META)
    objective, steps = steps_of(stage, 3)
    reports: list[StepReport] = []
    with Devices() as devices:
        optimizers = optimizers_for_meta(model, optimizer)
        fit(
            model,
            objective,
            optimizers,
            lambda _: 1e-3,
            steps,
            Runtime(META, torch.float32),
            3,
            on_step=[reports.append],
        )
    assert len(reads) == len(reports) == 3 and not any(report.skipped for report in reports)
    assert {name for name, _ in devices.mixed} <= COPIES, devices.mixed
    largest = max(shape.numel() for name, shapes in devices.mixed for shape in shapes)
    assert largest <= 5 * 24, "only batches go to the device, no weights or activations"
    assert devices.num_on_meta > 1000
    states = [x for each in optimizers for state in each.state.values() for x in state.values()]
    assert all(x.device == META or x.dim() == 0 for x in states if isinstance(x, torch.Tensor))


def test_packed_documents_are_counted_before_the_device_starts(reads, monkeypatch):
    """The variable-length kernel needs to know where documents start, how many there are decides its shapes."""
    starts = []

    def kernel(q, k, v, plan):
        starts.append(plan.cu_seqlens.device)
        return q * k.sum() * v.sum()

    monkeypatch.setattr(model_tinylm, "can_use_varlen", lambda *_: True)
    monkeypatch.setattr("tinylm.model.attention._varlen_attention", kernel)
    model = small_model(num_hidden_layers=2).to(META)
    objective, steps = steps_of("sft", 2)
    with Devices() as devices:
        fit(model, objective, optimizers_for_meta(model), lambda _: 1e-3, steps, Runtime(META, torch.float32), 2)
    assert starts == [META] * 8 and len(reads) == 2
    assert {name for name, _ in devices.mixed} <= COPIES, devices.mixed


WAITS = {
    "item": lambda x: x.item(), "bool": bool, "float": float, "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0], "cpu": lambda x: x.cpu(),
}  # fmt: skip


@pytest.mark.parametrize("name", WAITS)
def test_a_step_that_waits_is_found(reads, name):
    """What makes the tests above sharp."""
    model = small_model().to(META)

    def objective(model, batch):
        loss, metrics = next_token_loss(model, batch)
        WAITS[name](loss.detach())
        return loss, metrics

    batches = [[batch_of(random_documents(8))]]
    with pytest.raises((RuntimeError, NotImplementedError)):
        fit(model, objective, optimizers_for_meta(model), lambda _: 1e-3, batches, Runtime(META, torch.float32), 1)
