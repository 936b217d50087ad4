"""The memory of generation: keys and values of all past tokens, in storage reserved once.

Shapes: B batch, K key/value heads, D head dim, t new tokens, S tokens held.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinylm.model.config import TinyLMConfig


class KVCache:
    """Keys and values of every layer, [L][B, K, max_length, D], written in place.

    A cache that grows by concatenation copies everything it holds at every token; this one only fills a
    little more of its storage, which never moves.

    Args:
        config: the model's shape.
        batch_size: number of sequences B.
        max_length: number of tokens to reserve room for.
        device, dtype: where and how to keep them (the model's).
        pad_lengths: [B] number of left-padding tokens per row, or None. Those tokens are never attended to,
            and positions are counted from the first real one.

    Raises:
        ValueError: more room asked than the model has positions, or more tokens fed than there is room for.
    """

    def __init__(
        self,
        config: TinyLMConfig,
        batch_size: int,
        max_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        pad_lengths: Tensor | None = None,
    ):
        if batch_size < 1 or max_length < 1:
            raise ValueError(f"batch_size {batch_size} and max_length {max_length} must be at least 1")
        if max_length > config.max_position_embeddings:
            raise ValueError(
                f"a cache of {max_length} tokens was asked for; the model has max_position_embeddings "
                f"{config.max_position_embeddings}: ask for at most that"
            )
        shape = (batch_size, config.num_key_value_heads, max_length, config.head_width)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.max_length = max_length
        self.length = 0
        self.pad_lengths = pad_lengths

    def update(self, layer_idx: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v, [B, K, t, D], behind what is held; return views of all, [B, K, length+t, D].

        `length` itself moves only at `advance`, when every layer has written.
        """
        end = self.length + k.shape[2]
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def require_room(self, num_tokens: int) -> None:
        """Raise ValueError unless `num_tokens` more fit."""
        if self.length + num_tokens > self.max_length:
            raise ValueError(
                f"the cache holds {self.length} tokens and {num_tokens} more were given; it has room for "
                f"{self.max_length}: reserve a larger max_length or generate less"
            )

    def advance(self, num_tokens: int) -> None:
        """Count `num_tokens` as held; the model calls it once at the end of a forward pass."""
        self.length += num_tokens

    def rewind(self, length: int) -> None:
        """Forget everything after the first `length` tokens (a shared prompt, a rejected draft)."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind to {length} tokens; the cache holds {self.length}")
        self.length = length
