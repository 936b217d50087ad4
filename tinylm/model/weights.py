"""A model's weights by name, without wrappers and adapters, and their fingerprint."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

_WRAPPERS = ("_orig_mod.", "module.")


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`'s and DistributedDataParallel's wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put into it (`_orig_mod.`, a leading `module.`)."""
    name = name.replace(_WRAPPERS[0], "")
    while name.startswith(_WRAPPERS[1]):
        name = name.removeprefix(_WRAPPERS[1])
    return name


def is_tied(model: nn.Module) -> bool:
    """Whether the output projection uses the embedding's table."""
    return bool(getattr(getattr(unwrapped(model), "config", None), "tie_word_embeddings", False))


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights under their names on disk: no wrappers, no adapters, a tied output projection left out."""
    model, tied = unwrapped(model), is_tied(model)
    state: dict[str, Tensor] = {}
    # Not `state_dict`: inside `distributed.whole`, that would still give the shards of a sharded model.
    for name, tensor in model.named_parameters(remove_duplicate=False):
        name = plain_name(name).replace(".base.", ".")
        if ".lora_" in name or (tied and name == "lm_head.weight"):
            continue
        state[name] = tensor
    return state


def weights_fingerprint(model: nn.Module) -> str:
    """16 hex digits of a SHA-256 over the names, dtypes, shapes and exact values of the base weights.

    Adapters, wrappers and the device do not change it; a single changed bit does.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(base_state(model).items()):
        # A copy: a sharded model frees this memory after each use, which it cannot do once numpy refers to it.
        data = tensor.detach().to("cpu", copy=True).contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}\n".encode())
        digest.update(data.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
