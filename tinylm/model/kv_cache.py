"""The memory of generation: keys and values of all past tokens, in storage reserved once.

Shapes: B rows, L layers, K key/value heads, D head dim, t new tokens, S tokens of the longest row, the new ones among
them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from tinylm.model.config import TinyLMConfig


class KVCache:
    """Keys and values of every layer, [L][B, K, max_length, D], written in place.

    A cache that grows by concatenation copies everything it holds at every token; this one only fills a little more of
    its storage. Each row has its own length, so rows may start and end at any time. Rows of equal length are written
    and read as slices.

    Args:
        config: the model's shape.
        batch_size: number of rows B.
        max_length: number of tokens to reserve room for in each row.
        device, dtype: where and how to keep them (the model's).

    Attributes:
        lengths: [B] tokens held by each row.

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
        self.lengths = [0] * batch_size
        self._rows = torch.arange(batch_size, device=device)[:, None]  # index of each row, beside [B, t] positions

    @staticmethod
    def bytes_per_token(config: TinyLMConfig, dtype: torch.dtype) -> int:
        """Memory of one token of one row."""
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_width * dtype.itemsize

    @property
    def max_length(self) -> int:
        """Tokens that each row has room for."""
        return self.keys[0].shape[2]

    def next_positions(self, num_tokens: int) -> slice | Tensor:
        """Where the next `num_tokens` tokens of each row belong: a slice if the rows are equally long, else [B, t].

        Raises:
            ValueError: they do not fit.
        """
        longest = max(self.lengths)
        if longest + num_tokens > self.max_length:
            raise ValueError(
                f"the cache holds {longest} tokens and {num_tokens} more were given; it has room for "
                f"{self.max_length}: reserve a larger max_length or generate less"
            )
        if min(self.lengths) == longest:
            return slice(longest, longest + num_tokens)
        device = self.keys[0].device
        return torch.tensor(self.lengths, device=device)[:, None] + torch.arange(num_tokens, device=device)

    def update(self, layer_idx: int, k: Tensor, v: Tensor, positions: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v, [B, K, t, D], at `positions` (from `next_positions`); return views of all, [B, K, S, D].

        `lengths` itself changes only at `advance`, when every layer has written.
        """
        num_rows, end = len(self.lengths), max(self.lengths) + k.shape[2]
        held = self.keys[layer_idx][:num_rows, :, :end], self.values[layer_idx][:num_rows, :, :end]
        for storage, new in zip(held, (k, v), strict=True):
            if isinstance(positions, slice):
                storage[:, :, positions] = new
            else:
                storage.transpose(1, 2)[self._rows[:num_rows], positions] = new.transpose(1, 2)
        return held

    def advance(self, num_tokens: int) -> None:
        """Count `num_tokens` more in every row; the model calls it once at the end of a forward pass."""
        self.lengths = [length + num_tokens for length in self.lengths]

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget everything after the first lengths[b] tokens of row b: padding on the right, a rejected draft."""
        for new, held in zip(lengths, self.lengths, strict=True):
            if not 0 <= new <= held:
                raise ValueError(f"cannot rewind to {new} tokens; the cache holds {held}")
        self.lengths = list(lengths)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Let row i become what row rows[i] was. Rows may repeat, so the cache can grow as well as shrink.

        Only what moves is copied.
        """
        if len(rows) > self.keys[0].shape[0]:
            self._reserve(len(rows), self.max_length)
        moved = [(target, source) for target, source in enumerate(rows) if target != source]
        if moved:
            device, longest = self.keys[0].device, max(self.lengths[source] for _, source in moved)
            targets, sources = (torch.tensor(places, device=device) for places in zip(*moved, strict=True))
            for storage in (*self.keys, *self.values):
                storage[:, :, :longest].index_copy_(0, targets, storage[:, :, :longest].index_select(0, sources))
        self.lengths = [self.lengths[source] for source in rows]

    def rows(self, first: int, end: int) -> KVCache:
        """The rows first to end - 1 as a cache in the same storage; its `lengths` are its own from then on."""
        part = copy.copy(self)
        part.keys, part.values = ([layer[first:end] for layer in held] for held in (self.keys, self.values))
        part.lengths = self.lengths[first:end]
        part._rows = self._rows[: end - first]
        return part

    def swap_rows(self, one: int, other: int) -> None:
        """Let two rows change places."""
        longest = max(self.lengths[one], self.lengths[other])
        if one != other and longest:
            for layer in (*self.keys, *self.values):
                layer[[one, other], :, :longest] = layer[[other, one], :, :longest]
        self.lengths[one], self.lengths[other] = self.lengths[other], self.lengths[one]

    def copy_start(self, source: int, target: int, length: int) -> None:
        """Let row `target` hold the first `length` tokens of row `source`, and nothing else."""
        if not 0 <= length <= self.lengths[source]:
            raise ValueError(f"cannot copy {length} tokens; row {source} holds {self.lengths[source]}")
        if source != target:
            for layer in (*self.keys, *self.values):
                layer[target, :, :length] = layer[source, :, :length]
        self.lengths[target] = length

    def wipe_row(self, row: int) -> None:
        """Empty a row and its storage: NaN would reach its next tokens even behind a mask."""
        for layer in (*self.keys, *self.values):
            layer[row] = 0
        self.lengths[row] = 0

    def append(self, other: KVCache) -> None:
        """Add the rows of `other`, a cache of the same model, behind those held."""
        start, longest = len(self.lengths), max(other.lengths)
        end, max_length = start + len(other.lengths), max(self.max_length, other.max_length)
        if end > self.keys[0].shape[0] or max_length > self.max_length:
            self._reserve(max(end, self.keys[0].shape[0]), max_length)
        for ours, theirs in zip((*self.keys, *self.values), (*other.keys, *other.values), strict=True):
            ours[start:end, :, :longest] = theirs[: end - start, :, :longest]
        self.lengths += other.lengths

    def _reserve(self, num_rows: int, max_length: int) -> None:
        """Move to larger storage."""
        self._rows = torch.arange(num_rows, device=self._rows.device)[:, None]
        for held in (self.keys, self.values):
            for layer_idx, old in enumerate(held):
                held[layer_idx] = old.new_zeros(num_rows, old.shape[1], max_length, old.shape[3])
                held[layer_idx][: old.shape[0], :, : old.shape[2]] = old
