"""Supervised fine-tuning data: whole chats, packed; only what the assistant wrote is scored.

Every chat in it holds at least one target, so a batch without any cannot occur.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from tinylm.dataset.documents import CUT, DROPPED, Documents, encode_chats
from tinylm.dataset.packing import WholePacking, check_row_length, pack_rows
from tinylm.dataset.rows import Batch, Row, build_row, collate_rows
from tinylm.dataset.shards.tokenizing import available_cores, chunked, process_map
from tinylm.tokenizer.chat_template import Message

CHUNK_SIZE = 2_000
"""Chats sent to a worker at a time: about a second of work."""

PARALLEL_FROM = 100_000
"""Chats from which starting worker processes pays."""


@dataclass(frozen=True)
class Outcomes:
    """What became of the chats (or pairs) that came in."""

    num_seen: int
    num_cut: int
    """Longer than `max_seq_len`; cut to fit."""
    num_dropped: int
    """Nothing to learn from was left, or no answer token fits into `max_seq_len`."""


def encode_all(
    encode: Callable[..., tuple[Documents, list[str]]],
    items: Iterable[Any],
    tokenizer: Any,
    max_seq_len: int,
    num_processes: int | None,
    progress: Callable[[int], None] | None,
) -> tuple[Documents, Outcomes]:
    """Tokenise chats or pairs with `encode_chats` or `encode_pairs`, in worker processes where there are
    many.

    Args:
        num_processes: None is one a core from PARALLEL_FROM items on, else none.
        progress: called with the number of items done so far.

    Raises:
        ValueError: if nothing can be learned from any of them.
    """
    check_row_length(max_seq_len)
    items = items if isinstance(items, Sequence) else list(items)
    if num_processes is None:
        num_processes = available_cores() if len(items) >= PARALLEL_FROM else 0
    parts, outcomes = [], []
    with process_map(encode, (tokenizer, max_seq_len), num_processes) as map_chunks:
        for part, part_outcomes in map_chunks(chunked(items, CHUNK_SIZE)):
            parts.append(part)
            outcomes += part_outcomes
            if progress is not None:
                progress(len(outcomes))
    documents = Documents.concatenate(parts)
    if len(documents) == 0:
        raise ValueError(
            f"none of the {len(outcomes)} conversations has an answer that fits into {max_seq_len} tokens; "
            "expected at least one; raise --max_seq_len or check the data"
        )
    return documents, Outcomes(len(outcomes), outcomes.count(CUT), outcomes.count(DROPPED))


def documents_fingerprint(kind: str, documents: Documents, max_seq_len: int) -> str:
    """First 16 hexadecimal digits of a SHA-256 over all tokens, targets and boundaries."""
    digest = hashlib.sha256(f"{kind} {max_seq_len}".encode())
    for array in (documents.ids, documents.is_target, documents.offsets):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


class SFTDataset:
    """Chats in packed rows. Make one with `from_conversations`.

    Args:
        documents: one for each chat, none longer than `max_seq_len` + 1 tokens, each with a target.
        max_seq_len: positions of a row.
        outcomes: how many chats were cut and dropped on the way.
        pad_id: token id of filler positions.
    """

    unit = "rows"

    def __init__(self, documents: Documents, max_seq_len: int, outcomes: Outcomes, pad_id: int = 0) -> None:
        self.documents = documents
        self.max_seq_len = max_seq_len
        self.outcomes = outcomes
        self.pad_id = pad_id
        self.packing: WholePacking = pack_rows(documents.lengths - 1, max_seq_len)
        used = np.add.reduceat(documents.lengths[self.packing.order] - 1, self.packing.row_starts[:-1])
        # All batches are as wide as the fullest row: one shape, so that a compiled model is compiled once.
        self.width = int(used.max())

    @classmethod
    def from_conversations(
        cls,
        conversations: Iterable[list[Message]],
        tokenizer: Any,
        max_seq_len: int,
        num_processes: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> SFTDataset:
        """Tokenise, cut to `max_seq_len` at a turn's end, and pack.

        Args:
            conversations: lists of {"role", "content"} messages.
            num_processes: that tokenise; None chooses by the amount of data.
            progress: called with the number of conversations done so far.

        Raises:
            ValueError: if no conversation has an answer that fits.
        """
        documents, outcomes = encode_all(encode_chats, conversations, tokenizer, max_seq_len, num_processes, progress)
        return cls(documents, max_seq_len, outcomes, tokenizer.pad_id)

    def __len__(self) -> int:
        return len(self.packing)

    @property
    def num_targets(self) -> int:
        """Tokens that are scored, in all rows."""
        return self.documents.num_targets

    @cached_property
    def fingerprint(self) -> str:
        """Changes when any token, target or row boundary does."""
        return documents_fingerprint("sft", self.documents, self.max_seq_len)

    def row(self, index: int) -> Row:
        """Row `index`: its chats side by side."""
        return build_row(self.documents.document(int(document)) for document in self.packing.row(index))

    def collate(self, rows: Sequence[Row]) -> Batch:
        """Stack rows into a batch of `self.width` positions."""
        return collate_rows(rows, self.width, self.pad_id)
