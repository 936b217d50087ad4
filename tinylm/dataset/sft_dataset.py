"""Supervised fine-tuning data: chats packed into rows; only the assistant's words are scored.

Every chat has at least one target, so there is no batch without one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from tinylm.dataset.documents import CUT, DROPPED, EQUAL, Documents, encode_chats
from tinylm.dataset.packing import WholePacking, check_row_length, pack_rows
from tinylm.dataset.rows import Batch, Row, build_row, collate_rows
from tinylm.dataset.shards.tokenizing import available_cores, chunked, process_map
from tinylm.dataset.splits import hold_out_items
from tinylm.tokenizer.chat_template import Message

CHUNK_SIZE = 2_000
"""Chats sent to a worker process at a time: about a second of work."""

PARALLEL_FROM = 100_000
"""How many chats are worth worker processes."""


@dataclass(frozen=True)
class Outcomes:
    """How many of the chats (or pairs) were cut or dropped."""

    num_seen: int
    num_cut: int
    """They were longer than `max_seq_len`."""
    num_dropped: int
    """They have no answer token that fits into `max_seq_len`."""
    num_equal: int = 0
    """Pairs whose two answers are equal; they are dropped too."""


def encode_all(
    encode: Callable[..., tuple[Documents, list[str]]],
    items: Iterable[Any],
    tokenizer: Any,
    max_seq_len: int,
    num_processes: int | None,
    progress: Callable[[int], None] | None,
) -> tuple[Documents, Outcomes]:
    """Tokenise chats or pairs with `encode_chats` or `encode_pairs`; many of them in worker processes.

    Args:
        num_processes: how many tokenise; 0 is this process. None is one per core from PARALLEL_FROM items on, else 0.
        progress: called with the number of items done so far.

    Raises:
        ValueError: all of them were dropped.
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
        raise ValueError(_why_none(outcomes, max_seq_len))
    return documents, Outcomes(len(outcomes), *(outcomes.count(outcome) for outcome in (CUT, DROPPED, EQUAL)))


def _why_none(outcomes: list[str], max_seq_len: int) -> str:
    """The error for data of which nothing can be learnt."""
    equal = outcomes.count(EQUAL)
    if equal == len(outcomes) > 0:
        return f"chosen and rejected are equal in all {equal} pairs; expected two different answers; correct the data"
    before = f"chosen and rejected are equal in {equal} pairs, and " if equal else ""
    return (
        f"{before}none of the {len(outcomes) - equal} {'others' if equal else 'conversations'} has an answer that fits "
        f"into {max_seq_len} tokens; expected at least one; raise --max_seq_len or check the data"
    )


def documents_fingerprint(kind: str, documents: Documents, max_seq_len: int) -> str:
    """First 16 hexadecimal digits of a SHA-256 over all tokens, targets and boundaries."""
    digest = hashlib.sha256(f"{kind} {max_seq_len}".encode())
    for array in (documents.ids, documents.is_target, documents.offsets):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


class SFTDataset:
    """Chats in packed rows. Make one with `from_conversations`.

    Args:
        documents: one for each chat, of at most `max_seq_len` + 1 tokens, each with a target.
        max_seq_len: positions of a row.
        outcomes: how many chats were cut and dropped.
        pad_id: token id of filler positions.
    """

    unit = "rows"

    items = "chats"

    def __init__(self, documents: Documents, max_seq_len: int, outcomes: Outcomes, pad_id: int = 0) -> None:
        self.documents = documents
        self.max_seq_len = max_seq_len
        self.outcomes = outcomes
        self.pad_id = pad_id
        self.packing: WholePacking = pack_rows(documents.lengths - 1, max_seq_len)
        used = np.add.reduceat(documents.lengths[self.packing.order] - 1, self.packing.row_starts[:-1])
        # All batches are as wide as the fullest row. With one shape, a model is compiled only once.
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
        """Tokenise chats, cut them to `max_seq_len` at the end of a turn, and pack them.

        Args:
            conversations: lists of {"role", "content"} messages.
            num_processes: how many tokenise; None chooses by the amount of data.
            progress: called with the number of conversations done so far.

        Raises:
            ValueError: no conversation has an answer that fits.
        """
        documents, outcomes = encode_all(encode_chats, conversations, tokenizer, max_seq_len, num_processes, progress)
        return cls(documents, max_seq_len, outcomes, tokenizer.pad_id)

    def split(self, fraction: float, seed: int) -> tuple[SFTDataset, SFTDataset | None]:
        """(training, validation) parts, by chat; see `hold_out_items`. Only chats that can be learnt are held out."""
        train, held = hold_out_items(range(len(self.documents)), fraction, seed)
        if not held:
            return self, None
        parts = (self.documents.select(numbers) for numbers in (train, held))
        first, second = (SFTDataset(part, self.max_seq_len, self.outcomes, self.pad_id) for part in parts)
        return first, second

    def __len__(self) -> int:
        return len(self.packing)

    @property
    def num_targets(self) -> int:
        """Tokens that are scored, in all rows."""
        return self.documents.num_targets

    @cached_property
    def fingerprint(self) -> str:
        """Changes when any token, target or row boundary changes."""
        return documents_fingerprint("sft", self.documents, self.max_seq_len)

    def row(self, index: int) -> Row:
        """Row `index`: its chats side by side."""
        return build_row(self.documents.document(int(document)) for document in self.packing.row(index))

    def collate(self, rows: Sequence[Row]) -> Batch:
        """Stack rows into a batch of `self.width` positions."""
        return collate_rows(rows, self.width, self.pad_id)
