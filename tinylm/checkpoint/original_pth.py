"""The `.pth` files of the original project, lyuzlion/Tiny-Language-Model: their tensor names, and how to read them."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from tinylm.checkpoint.pth_file import StoredTensor, load_tensors, read_contents
from tinylm.checkpoint.weights_file import check_name
from tinylm.model.config import TinyLMConfig
from tinylm.model.weights import plain_name

NUM_KEY_VALUE_HEADS = 2  # fixed in the original's code; the tensors' shapes do not show it
_TO_OURS = (
    (".attention.out_proj.", ".self_attn.o_proj."),
    (".attention.", ".self_attn."),
    (".norm1.", ".input_layernorm."),
    (".norm2.", ".post_attention_layernorm."),
    (".ffn.", ".mlp."),
)
_LAYER = re.compile(r"model\.layers\.([0-9]{1,9})\.")
_TABLES = re.compile(r"(freqs_cos|freqs_sin|freqs_cis|inv_freq|cos_cached|sin_cached)$")


def name_from_original(name: str) -> str:
    """`model.layers.0.attention.out_proj.weight` -> `model.layers.0.self_attn.o_proj.weight`."""
    for theirs, ours in _TO_OURS:
        name = name.replace(theirs, ours)
    return name


def name_to_original(name: str) -> str:
    """The inverse of `name_from_original`."""
    for theirs, ours in _TO_OURS:
        name = name.replace(ours, theirs)
    return name


def read_pth(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.pth`, under our names.

    Nothing is unpickled: `pth_file` reads the few instructions that describe tensors and refuses all others, without
    executing any.

    Raises:
        ValueError: the file holds code, is damaged, or holds no floating-point weights.
    """
    data = read_contents(path)
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(data, dict) and isinstance(data.get(key), dict):
            data = data[key]
    if not isinstance(data, dict) or not all(isinstance(v, StoredTensor) for v in data.values()) or not data:
        raise ValueError(f"{path} holds no state_dict of tensors; save the model with torch.save(model.state_dict())")
    named = {name_from_original(plain_name(str(name))): tensor for name, tensor in data.items()}
    if len(named) < len(data):
        raise ValueError(
            f"{path} holds two tensors of the same name; save only the model's own state_dict with torch.save"
        )
    named = {name: tensor for name, tensor in named.items() if not _TABLES.search(name)}
    for name, tensor in named.items():
        try:
            check_name(name)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; save the model's own state_dict with torch.save") from None
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{path}: {name} is {tensor.dtype}; expected floating-point weights; save it unquantised")
    return load_tensors(path, named)


def config_from_tensors(path: Path, tensors: dict[str, Tensor]) -> TinyLMConfig:
    """The config that follows from the tensors' shapes and the original's fixed two key/value heads.

    Raises:
        ValueError: a tensor is missing, or the shapes do not fit together.
    """
    layer = "model.layers.0."
    try:
        vocab_size, hidden_size = tensors["model.embed_tokens.weight"].shape
        head_dim, uneven = divmod(tensors[f"{layer}self_attn.k_proj.weight"].shape[0], NUM_KEY_VALUE_HEADS)
        num_heads, uneven_heads = divmod(tensors[f"{layer}self_attn.q_proj.weight"].shape[0], max(head_dim, 1))
        width = tensors[f"{layer}mlp.gate_proj.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}; expected the original project's tensors; check the file") from None
    except (ValueError, IndexError):
        raise ValueError(f"{path} has weights that are not matrices; expected the original project's tensors") from None
    if uneven or uneven_heads:
        raise ValueError(f"{path} has q_proj and k_proj of unequal heads; expected {NUM_KEY_VALUE_HEADS} k/v heads")
    numbers = [int(m.group(1)) for name in tensors if (m := _LAYER.match(name))]
    head, embeddings = tensors.get("lm_head.weight"), tensors["model.embed_tokens.weight"]
    tied = head is None or (head.dtype == embeddings.dtype and torch.equal(head, embeddings))
    try:
        return TinyLMConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=width,
            num_hidden_layers=max(numbers) + 1,
            num_attention_heads=num_heads,
            num_key_value_heads=NUM_KEY_VALUE_HEADS,
            head_dim=head_dim,
            rope_theta=1e6,
            rms_norm_eps=1e-5,
            tie_word_embeddings=tied,
        )
    except ValueError as error:
        raise ValueError(f"{path} is not a model of the original project ({error}); check the file") from None
