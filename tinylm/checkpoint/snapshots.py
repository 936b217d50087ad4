"""Snapshots: the weights that a run trains, at some of its steps, in bfloat16. They show how a model learnt.

`pretrain_512_snapshots/step000100.safetensors` lies beside `pretrain_512_epoch0`, whose config and tokenizer it has. An
adapter's snapshot holds the adapter alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from tinylm.checkpoint.model_path import states_of
from tinylm.checkpoint.weights_file import check_shapes, read_weights
from tinylm.files.atomic import atomic_write
from tinylm.model.lora import has_lora, lora_parameters
from tinylm.model.model_tinylm import TinyLMForCausalLM

_NAME = re.compile(r"step(\d{6,12})\.safetensors")


def snapshot_folder(model: Path) -> Path:
    """Where the run that wrote `model` keeps its snapshots."""
    states = states_of(model)
    return states.with_name(states.name.removesuffix("_state") + "_snapshots")


def snapshots_in(folder: Path) -> dict[int, Path]:
    """The snapshots in a folder by step, the first step first."""
    found = [(match, path) for path in folder.glob("step*") if (match := _NAME.fullmatch(path.name))]
    return dict(sorted((int(match[1]), path) for match, path in found))


def snapshot_steps(num_steps: int, count: int) -> list[int]:
    """At most `count` steps from 0 to `num_steps`: close to each other at first, when a model changes most."""
    if count == 1:
        return [num_steps]
    return sorted({round(num_steps * (place / (count - 1)) ** 3) for place in range(count)}) if count else []


def write_snapshot(folder: Path, step: int, weights: Mapping[str, Tensor]) -> None:
    """Write one file, completely or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: weight.detach().to("cpu", torch.bfloat16).contiguous() for name, weight in weights.items()}
    with atomic_write(folder / f"step{step:06d}.safetensors") as file:
        file.write(save(tensors, metadata={"format": "pt"}))


@torch.no_grad()
def load_snapshot(model: TinyLMForCausalLM, path: Path) -> None:
    """Give the model the weights of a snapshot of its run; an adapter must be attached.

    Raises:
        ValueError: the file is damaged, or of another model. The model is unchanged.
    """
    tensors, parameters = read_weights(path), dict(model.named_parameters())
    if has_lora(model):
        trained = {id(parameter) for parameter in lora_parameters(model)}
        parameters = {name: parameter for name, parameter in parameters.items() if id(parameter) in trained}
    shapes = [{name: tuple(each.shape) for name, each in group.items()} for group in (tensors, parameters)]
    check_shapes(path, *shapes)
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)
