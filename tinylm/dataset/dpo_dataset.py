"""Preference data for DPO: pairs of answers to one prompt, both in the same batch.

A batch of P pairs holds 2P documents, packed into rows as long as the longest of them. Document 2i is pair i's prompt
with the chosen answer, 2i + 1 the same prompt with the rejected one. Only the answers have targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from tinylm.dataset.documents import Documents, encode_pairs
from tinylm.dataset.packing import pack_rows
from tinylm.dataset.rows import Batch, build_row, collate_rows
from tinylm.dataset.sft_dataset import Outcomes, documents_fingerprint, encode_all
from tinylm.dataset.sources.record_shapes import PreferencePair
from tinylm.dataset.splits import hold_out_items


@dataclass(frozen=True)
class PairRow:
    """One pair: (ids [n], is_target [n]) of the prompt with each answer, and the reference's log-probabilities."""

    chosen: tuple[np.ndarray, np.ndarray]
    rejected: tuple[np.ndarray, np.ndarray]
    reference_log_probs: np.ndarray | None
    """[2] float32: log-probability of the chosen and of the rejected answer under the frozen reference."""


class DPODataset:
    """Preference pairs. Make one with `from_preferences`.

    Args:
        documents: 2i and 2i + 1 are pair i's chosen and rejected, of at most `max_seq_len` + 1 tokens each.
        max_seq_len: positions of a row.
        outcomes: how many pairs were cut and dropped.
        pad_id: token id of filler positions.
    """

    unit = "pairs"

    items = "pairs"

    def __init__(self, documents: Documents, max_seq_len: int, outcomes: Outcomes, pad_id: int = 0) -> None:
        assert len(documents) % 2 == 0
        self.documents = documents
        self.max_seq_len = max_seq_len
        self.outcomes = outcomes
        self.pad_id = pad_id
        self.reference_log_probs: np.ndarray | None = None

    @classmethod
    def from_preferences(
        cls,
        preferences: Iterable[PreferencePair],
        tokenizer: Any,
        max_seq_len: int,
        num_processes: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> DPODataset:
        """Tokenise pairs and fit them into `max_seq_len`, both with the same prompt.

        Args:
            preferences: (prompt, chosen, rejected), each a list of {"role", "content"} messages.
            num_processes: how many tokenise; None chooses by the amount of data.
            progress: called with the number of pairs done so far.

        Raises:
            ValueError: all pairs were dropped.
        """
        documents, outcomes = encode_all(encode_pairs, preferences, tokenizer, max_seq_len, num_processes, progress)
        return cls(documents, max_seq_len, outcomes, tokenizer.pad_id)

    def split(self, fraction: float, seed: int) -> tuple[DPODataset, DPODataset | None]:
        """(training, validation) parts, by pair; see `hold_out_items`. Only pairs that can be learnt are held out."""
        train, held = hold_out_items(range(len(self)), fraction, seed)
        if not held:
            return self, None
        parts = (self.documents.select([2 * i + side for i in part for side in (0, 1)]) for part in (train, held))
        first, second = (DPODataset(part, self.max_seq_len, self.outcomes, self.pad_id) for part in parts)
        return first, second

    def __len__(self) -> int:
        return len(self.documents) // 2

    @property
    def num_targets(self) -> int:
        """Answer tokens that are scored, chosen and rejected together."""
        return self.documents.num_targets

    @cached_property
    def fingerprint(self) -> str:
        """Changes when any token, target or boundary changes; does not depend on the reference's log-probabilities."""
        return documents_fingerprint("dpo", self.documents, self.max_seq_len)

    def attach_reference_log_probs(self, log_probs: np.ndarray) -> None:
        """Keep the frozen reference's log-probabilities, computed once, with their pairs.

        Args:
            log_probs: [pairs, 2], chosen and rejected, in the order of `row(i)`.

        Raises:
            ValueError: if the shape is another or a number is not finite.
        """
        values = np.asarray(log_probs, dtype=np.float32)
        if values.shape != (len(self), 2):
            raise ValueError(f"reference log-probabilities have shape {values.shape}; expected {(len(self), 2)}")
        if not np.isfinite(values).all():
            raise ValueError("a reference log-probability is not finite; expected numbers; check the reference model")
        self.reference_log_probs = values

    def row(self, index: int) -> PairRow:
        """Pair `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        reference = None if self.reference_log_probs is None else self.reference_log_probs[index]
        return PairRow(self.documents.document(2 * index), self.documents.document(2 * index + 1), reference)

    def collate(self, rows: Sequence[PairRow]) -> Batch:
        """Pack pairs into a batch as wide as its longest document; `count` is the number of pairs."""
        documents = [document for pair in rows for document in (pair.chosen, pair.rejected)]
        lengths = np.array([len(ids) - 1 for ids, _ in documents])
        width = int(lengths.max())
        packing = pack_rows(lengths, width)
        numbers = [packing.row(index) for index in range(len(packing))]
        packed = [build_row(documents[number] for number in row) for row in numbers]
        batch = collate_rows(packed, width, self.pad_id, numbers)
        reference = [pair.reference_log_probs for pair in rows if pair.reference_log_probs is not None]
        extras = {"reference_log_probs": torch.from_numpy(np.stack(reference))} if reference else {}
        return replace(batch, count=len(rows), extras=extras)
