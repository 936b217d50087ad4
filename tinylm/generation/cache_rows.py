"""Choosing rows of a KV cache: beams that change parents, batches that finished rows leave."""

from __future__ import annotations

import copy

from torch import Tensor

from tinylm.model.kv_cache import KVCache


def select_rows(cache: KVCache, rows: Tensor) -> KVCache:
    """A cache whose row i is a copy of row rows[i] of `cache`; rows may repeat, so a cache can grow as well as shrink.

    Args:
        rows: int64 [n].
    """
    selected = copy.copy(cache)
    selected.keys = [keys.index_select(0, rows) for keys in cache.keys]
    selected.values = [values.index_select(0, rows) for values in cache.values]
    if cache.pad_lengths is not None:
        selected.pad_lengths = cache.pad_lengths.index_select(0, rows)
    return selected
