"""Train one model in several processes: what each process holds, and how the gradients are summed.

- `--sharding none`: every process holds the whole model. PyTorch's DistributedDataParallel sends gradients in buckets
  while the backward pass still computes the gradients of earlier layers (Li et al. 2020, arXiv:2006.15704).
- `--sharding fsdp`: every process holds its share of each weight, of its gradient and of the optimizer's state. The
  weights of a block are gathered just before it computes. PyTorch's FSDP2 (Zhao et al. 2023, arXiv:2304.11277), for
  models that do not fit on one device.

Both *average* gradients over the processes. We need their sum, because each process already divides its loss by the
global count; so the loss is multiplied by the number of processes.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from tinylm.dataset.batches import Batch
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.system.runtime import Runtime
from tinylm.trainer.core.objectives import Objective

SHARDINGS = ("none", "fsdp")
# The buffers are position tables, equal in all processes: do not send them. torch 2.13 has renamed the setting.
_BUFFERS = "forward_sync_buffers"
if _BUFFERS not in inspect.signature(DistributedDataParallel).parameters:
    _BUFFERS = "broadcast_buffers"


def shard(model: TinyLMForCausalLM, sharding: str, runtime: Runtime) -> None:
    """Give each process its share of the weights of `model`, in place; "none" leaves the model as it is.

    Call it before the optimizers are made: they update only their process's share.

    Raises:
        ValueError: fsdp with a single process, or with float16.
    """
    if sharding == "none":
        return
    if runtime.world_size == 1:
        raise ValueError("sharding is fsdp in a single process; start several with torchrun, or pass --sharding none")
    if runtime.compute_dtype == torch.float16:
        raise ValueError(
            "sharding is fsdp with dtype float16, whose scaler cannot see all shards; use --dtype bfloat16"
        )
    mesh = init_device_mesh(runtime.device.type, (runtime.world_size,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    # One unit, because tied embeddings are a single weight, used at both ends of the forward pass.
    fully_shard([model.model.embed_tokens, model.lm_head], mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "run_backbone")  # objectives call it instead of `forward`


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds only its share of this model."""
    return isinstance(model, FSDPModule)


@contextlib.contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Inside the block, every process has all weights as plain tensors, to save or read, not to compute with."""
    for module in _sharded_modules(model):
        module.unshard()
    try:
        yield
    finally:
        reshard(model)


def reshard(model: nn.Module) -> None:
    """Reduce each process to its share again: a forward pass without a backward pass keeps some weights gathered."""
    for module in _sharded_modules(model):
        module.reshard()


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor, of one that may be sharded; every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, full_value: Tensor) -> Tensor:
    """`full_value` sharded as `tensor` is; every process passes all of `full_value`."""
    if not isinstance(tensor, DTensor):
        return full_value
    return distribute_tensor(full_value, tensor.device_mesh, tensor.placements, src_data_rank=None)


class _LossModule(nn.Module):
    """`objective(model, batch)` as the forward pass of a module, because DistributedDataParallel wraps a module."""

    def __init__(self, model: TinyLMForCausalLM, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch) -> Any:
        return self.objective(self.model, batch)


class GradientExchange:
    """Sums the gradients of all processes, once per step: in the backward pass of its last micro-batch.

    `loss(batch)` computes the objective, `(loss_sum, metrics)`; call it inside `micro_batch`.
    """

    def __init__(self, model: TinyLMForCausalLM, objective: Objective, runtime: Runtime) -> None:
        self.model, self.runtime = model, runtime
        self.ddp: DistributedDataParallel | None = None
        if runtime.world_size > 1 and not is_sharded(model):
            buffers: dict[str, Any] = {_BUFFERS: False}
            self.ddp = DistributedDataParallel(_LossModule(model, objective), gradient_as_bucket_view=True, **buffers)
        self.loss = self.ddp or (lambda batch: objective(model, batch))
        self.needs_bucket_order = self.ddp is not None and runtime.world_size > 2

    @contextlib.contextmanager
    def micro_batch(self, batch: Batch, is_last: bool) -> Iterator[None]:
        """Surrounds the forward and backward pass of a micro-batch, which must be on the model's device."""
        if self.needs_bucket_order:
            self._settle_bucket_order(batch)
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(is_last)
        with self.ddp.no_sync() if self.ddp is not None and not is_last else contextlib.nullcontext():
            yield

    def _settle_bucket_order(self, batch: Batch) -> None:
        """Run one backward pass and drop its gradients.

        The first backward pass determines the order of DistributedDataParallel's buckets, and with more than two
        processes the rounding of the sums depends on this order. Without a extra pass, the first step after a resume
        would round differently from the same step of an uninterrupted run.
        """
        device = self.runtime.device
        with torch.random.fork_rng([device.index] if device.type == "cuda" else []), self.runtime.autocast():
            self.loss(batch)[0].backward()
        for parameter in self.model.parameters():
            parameter.grad = None
        self.needs_bucket_order = False
