"""Several processes, one model: what each holds of it, and how their gradients come together.

- `--sharding none`: every process holds the whole model. PyTorch's DistributedDataParallel sends gradients in buckets
  while the backward pass still computes the earlier layers' (Li et al. 2020, arXiv:2006.15704).
- `--sharding fsdp`: every process holds its share of each weight, of its gradient and of the optimizer's state; a block
  is put together just before it computes. PyTorch's FSDP2 (Zhao et al. 2023, arXiv:2304.11277), for models that one
  device cannot hold.

Both *average* gradients over the processes. Here they must be summed, since each process's loss is divided by the
global count already; so the loss is multiplied by their number.
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
# The model's buffers are tables of positions, the same everywhere. torch 2.13 calls the setting by another name.
_BUFFERS = "forward_sync_buffers"
if _BUFFERS not in inspect.signature(DistributedDataParallel).parameters:
    _BUFFERS = "broadcast_buffers"


def shard(model: TinyLMForCausalLM, sharding: str, runtime: Runtime) -> None:
    """Deal the weights of `model` out to the processes, in place, before its optimizers are made; "none" leaves it.

    Raises:
        ValueError: fsdp in a single process, or in float16.
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
    # One unit: with tied embeddings both are the same weight, which is needed at both ends of the forward pass.
    fully_shard([model.model.embed_tokens, model.lm_head], mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "run_backbone")  # what objectives call instead of `forward`


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has dealt this model out."""
    return isinstance(model, FSDPModule)


@contextlib.contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Inside, every process has all weights of `model` as plain tensors, to save or look at; not to compute with."""
    for part in _sharded_parts(model):
        part.unshard()
    try:
        yield
    finally:
        reshard(model)


def reshard(model: nn.Module) -> None:
    """Leave each process its share again; a forward pass without a backward pass keeps some weights together."""
    for part in _sharded_parts(model):
        part.reshard()


def _sharded_parts(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, whole_value: Tensor) -> Tensor:
    """`whole_value`, which every process has, sharded as `tensor` is."""
    if not isinstance(tensor, DTensor):
        return whole_value
    return distribute_tensor(whole_value, tensor.device_mesh, tensor.placements, src_data_rank=None)


class _Forward(nn.Module):
    """`objective(model, batch)` as a module's forward pass, which DistributedDataParallel needs to see."""

    def __init__(self, model: TinyLMForCausalLM, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch) -> Any:
        return self.objective(self.model, batch)


class GradientExchange:
    """The objective as a step computes it: called with a batch, it gives `(loss_sum, metrics)`.

    The gradients of all processes are summed in the backward pass of a step's last micro-batch, and only there.
    """

    def __init__(self, model: TinyLMForCausalLM, objective: Objective, runtime: Runtime) -> None:
        self.model = model
        forward: nn.Module = _Forward(model, objective)
        if runtime.world_size > 1 and not is_sharded(model):
            buffers: dict[str, Any] = {_BUFFERS: False}
            forward = DistributedDataParallel(forward, gradient_as_bucket_view=True, **buffers)
        self.forward = forward
        self.needs_rehearsal = isinstance(forward, DistributedDataParallel) and runtime.world_size > 2
        """Whether to go through a backward pass for nothing before the first step. It is the first pass that
        DistributedDataParallel orders its buckets by, and their order is the order in which more than two processes
        are summed; without, the first step after a resume would round otherwise than the unbroken run's."""

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss_sum, metrics = self.forward(batch)
        return loss_sum, metrics

    @contextlib.contextmanager
    def micro_batch(self, is_last: bool) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(is_last)
        waits = isinstance(self.forward, DistributedDataParallel) and not is_last
        with self.forward.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
            yield
