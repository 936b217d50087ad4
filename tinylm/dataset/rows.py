"""Rows and batches: what the packers make and the model eats.

The shift by one happens here and nowhere else: `input_ids[t]` predicts `targets[t]`.

Shapes: B rows of a batch, T positions of a row, P preference pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from tinylm.system.runtime import to_device

IGNORE_INDEX = -100
"""Target of a position that teaches nothing; the default `ignore_index` of torch's cross-entropy."""

FILLER_DOCUMENT = -1
"""Document id of the filler behind a row's last document."""


@dataclass(frozen=True)
class Row:
    """One packed row: whole documents, or pieces of them, side by side. All arrays are [T].

    `position_ids` restart at 0 in every document (and in every piece of a document that was split over rows);
    `document_ids` number the documents of this row from 0.
    """

    input_ids: np.ndarray
    targets: np.ndarray
    position_ids: np.ndarray
    document_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        """Positions that are scored."""
        return int(np.count_nonzero(self.targets != IGNORE_INDEX))


@dataclass(frozen=True)
class Batch:
    """What the model and the objective see. All tensors but the extras are [B, T] int64.

    `targets` is -100 where nothing is scored. `document_ids` are unique within the batch and -1 on filler;
    attention never crosses them. `count` is what the loss is divided by, summed over micro-batches and ranks:
    the number of targets, or of preference pairs. In a batch of pairs, document 2i is pair i's chosen answer
    and 2i + 1 its rejected one.

    `extras` are tensors that one objective needs, by name; their first axis runs over what `count` counts. DPO's
    "reference_log_probs" [P, 2] float32 are the frozen reference's log-probabilities of both answers of each pair.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    position_ids: torch.Tensor
    document_ids: torch.Tensor
    count: int
    extras: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch for a model on `device`.

        `targets` and `document_ids` stay where they are: how many targets and documents there are decides the shapes
        of tensors, and to read that from an accelerator is to wait until it has nothing left to do.
        """
        return replace(
            self,
            input_ids=to_device(self.input_ids, device),
            position_ids=to_device(self.position_ids, device),
            extras={name: to_device(tensor, device) for name, tensor in self.extras.items()},
        )

    def without_targets(self) -> Batch:
        """The same batch with nothing to learn: it adds exactly zero to the loss and to the count."""
        nothing = torch.full_like(self.targets, IGNORE_INDEX)
        return replace(self, targets=nothing, count=0, extras={name: x[:0] for name, x in self.extras.items()})


def build_row(documents: Iterable[tuple[np.ndarray, np.ndarray | None]]) -> Row:
    """Lay documents side by side in one row, each shifted by one.

    Args:
        documents: (ids [n], is_target [n] or None for "every token is a target"). A document of n tokens
            takes n - 1 positions: its inputs are ids[:-1], its targets ids[1:] where `is_target[1:]`, else
            -100.
    """
    inputs, targets, positions, numbers = [], [], [], []
    for number, (ids, is_target) in enumerate(documents):
        wide = ids.astype(np.int64)
        inputs.append(wide[:-1])
        targets.append(wide[1:] if is_target is None else np.where(is_target[1:], wide[1:], IGNORE_INDEX))
        positions.append(np.arange(len(ids) - 1, dtype=np.int64))
        numbers.append(np.full(len(ids) - 1, number, dtype=np.int64))
    return Row(*(np.concatenate(parts) for parts in (inputs, targets, positions, numbers)))


def collate_rows(
    rows: Sequence[Row], width: int, pad_id: int, document_ids: Sequence[np.ndarray] | None = None
) -> Batch:
    """Stack rows into a batch of `width` positions; what a row lacks is filler without targets.

    Args:
        rows: at least one row, none longer than `width`.
        width: T of the batch.
        pad_id: token id on filler positions.
        document_ids: for each row, the batch-wide number of each of its documents; by default the documents
            are numbered in the order in which they come.
    """
    assert rows and max(len(row) for row in rows) <= width
    shape = (len(rows), width)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    targets = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    documents = np.full(shape, FILLER_DOCUMENT, dtype=np.int64)
    seen = 0
    for index, row in enumerate(rows):
        used = slice(0, len(row))
        input_ids[index, used] = row.input_ids
        targets[index, used] = row.targets
        position_ids[index, used] = row.position_ids
        if document_ids is None:
            documents[index, used] = row.document_ids + seen
            seen += int(row.document_ids[-1]) + 1
        else:
            documents[index, used] = document_ids[index][row.document_ids]
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        targets=torch.from_numpy(targets),
        position_ids=torch.from_numpy(position_ids),
        document_ids=torch.from_numpy(documents),
        count=int(np.count_nonzero(targets != IGNORE_INDEX)),
    )
