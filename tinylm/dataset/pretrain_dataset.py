"""Pretraining data: running text in rows of equal length. Every token of a document is scored once.

A document begins with <|endoftext|>, as in GPT-2, so that its first token is predicted from something, too, and a
model can write a text from nothing. The shards hold what follows it; it is put in front where rows are made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tinylm.dataset.packing import RunningTextPacking, Segment
from tinylm.dataset.rows import Batch, Row, build_row, collate_rows
from tinylm.dataset.shards.shard_cache import cached_token_shards
from tinylm.dataset.shards.shared_cache import SharedCache
from tinylm.dataset.shards.token_shards import TokenShards, tokenize_texts
from tinylm.dataset.sources.finding import find_sources
from tinylm.dataset.sources.records import BadRows
from tinylm.dataset.splits import Spans, hold_out_documents


class PretrainDataset:
    """Rows of `max_seq_len` positions over a tokenised corpus, or a part of it.

    Args:
        shards: the corpus, in memory or memory-mapped.
        tokenizer: the one that made the shards.
        max_seq_len: positions of a row.
        spans: (starts, lengths) of the documents to use; all of them by default.

    Raises:
        ValueError: the text has no target.
    """

    unit = "rows"

    def __init__(self, shards: TokenShards, tokenizer: Any, max_seq_len: int, spans: Spans | None = None) -> None:
        self.shards = shards
        self.tokenizer = tokenizer
        self.max_seq_len = max_seq_len
        self.starts, self.lengths = (shards.offsets[:-1], shards.lengths) if spans is None else spans
        self.document_start = np.array(tokenizer.document_start)
        # Tokens in front of each span: those of a document's start; none for the rest of a document, or for no text.
        begins = np.isin(self.starts, shards.offsets[:-1]) & (self.lengths > 1)
        self.num_before = begins.astype(np.int64) * len(self.document_start)
        self.packing = RunningTextPacking(self.lengths + self.num_before, max_seq_len)
        if len(self.packing) == 0:
            raise ValueError("the text has no token; expected some; add data")
        self.width = min(max_seq_len, self.packing.num_positions)

    @classmethod
    def from_texts(cls, texts: Iterable[str], tokenizer: Any, max_seq_len: int) -> PretrainDataset:
        """Tokenise documents in memory."""
        return cls(tokenize_texts(texts, tokenizer), tokenizer, max_seq_len)

    def split(self, validation_fraction: float, seed: int) -> tuple[PretrainDataset, PretrainDataset | None]:
        """(training, validation) parts of a corpus, by document; see `hold_out_documents`."""
        train, held = hold_out_documents(self.shards.lengths, validation_fraction, seed)
        if not (held[1] > 1).any():  # a document of one token has no target
            return self, None
        return tuple(PretrainDataset(self.shards, self.tokenizer, self.max_seq_len, part) for part in (train, held))  # type: ignore[return-value]

    def __len__(self) -> int:
        return len(self.packing)

    @property
    def num_documents(self) -> int:
        """The number of documents, or parts of them, in the rows."""
        return len(self.lengths)

    @property
    def num_targets(self) -> int:
        """Tokens that are scored, in all rows."""
        return self.packing.num_positions

    @cached_property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text that is scored: bits per byte = loss_sum / ln 2 / num_bytes.

        <|endoftext|> is a target but not text. The first token of the rest of a document is text but not a target.
        """
        sizes = np.zeros(self.tokenizer.vocab_size, dtype=np.int64)
        for token_id in range(self.tokenizer.vocab_size):
            if token_id not in self.tokenizer.special_ids:
                sizes[token_id] = len(self.tokenizer.token_bytes(token_id))
        total = 0
        for start, length, before in zip(
            self.starts.tolist(), self.lengths.tolist(), self.num_before.tolist(), strict=True
        ):
            total += int(sizes[self.shards.tokens[start + (before == 0) : start + length]].sum())
        return total

    @property
    def bytes_per_target(self) -> float:
        """Mean UTF-8 bytes of a target: bits per byte = (nats per target) / ln 2 / (bytes per target)."""
        return self.num_bytes / self.num_targets

    @cached_property
    def fingerprint(self) -> str:
        """Changes when any token, the choice of documents or a row boundary changes."""
        theirs = self.document_start.tolist() != [self.tokenizer.endoftext_id]
        opened = f"opened with {self.document_start.tolist()}" if theirs else "opened"
        digest = hashlib.sha256(f"pretrain, {opened} {self.shards.fingerprint} {self.max_seq_len}".encode())
        for array in (self.starts, self.lengths):
            digest.update(np.ascontiguousarray(array, dtype=np.int64).data)
        return digest.hexdigest()[:16]

    def row(self, index: int) -> Row:
        """Row `index`: the segments of documents in it, side by side. Positions restart in each segment."""
        return build_row((self._tokens(segment), None) for segment in self.packing.row(index))

    def _tokens(self, segment: Segment) -> np.ndarray:
        """The tokens of a segment; its places count those in front of a document."""
        before, start = int(self.num_before[segment.document]), int(self.starts[segment.document])
        first, last = (start + max(place - before, 0) for place in (segment.start, segment.stop))
        stored = self.shards.tokens[first:last]
        opening = self.document_start[:before][segment.start : segment.stop]
        return np.concatenate((opening, stored)) if len(opening) else stored

    def collate(self, rows: Sequence[Row]) -> Batch:
        """Stack rows into a batch of `max_seq_len` positions. Only the last row of the corpus has filler."""
        return collate_rows(rows, self.width, self.tokenizer.pad_id)


def load_pretrain_data(
    data_path: str,
    tokenizer: Any,
    max_seq_len: int,
    own_folder: str | Path,
    validation_path: str | None = None,
    validation_fraction: float = 0.01,
    seed: int = 0,
    bad_rows: BadRows | None = None,
    num_processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    notice: Callable[[str], None] | None = None,
    cache: SharedCache | None = None,
    resume: bool = False,
) -> tuple[PretrainDataset, PretrainDataset | None]:
    """Training and validation data from files, tokenised once and cached.

    Several processes may call it at the same time; those with the same cache, or the same `own_folder`, share the work.

    Args:
        data_path: files of {"text"} records, as for `find_files`.
        own_folder: where the token shards are kept if there is no cache or it cannot be used.
        validation_path: held-out files; without it, `validation_fraction` of the data is held out (0 for none).
        seed: chooses which documents are held out.
        progress: called with (documents, tokens) while tokenising.
        notice: called with a line about each damaged shard, which is then made again, and about the cache.
        cache: where the token shards of all runs are kept.
        resume: also use the shards that an earlier version made in `own_folder`.
    """
    options: dict[str, Any] = {"notice": notice, "cache": cache, "resume": resume}
    if validation_path is not None:
        find_sources(validation_path)  # a wrong path is an error before the training data is tokenised
    shards = cached_token_shards(data_path, tokenizer, own_folder, bad_rows, num_processes, progress, **options)
    whole = PretrainDataset(shards, tokenizer, max_seq_len)
    if validation_path is None:
        return whole.split(validation_fraction, seed)
    held = cached_token_shards(validation_path, tokenizer, own_folder, bad_rows, num_processes, progress, **options)
    return whole, PretrainDataset(held, tokenizer, max_seq_len)
