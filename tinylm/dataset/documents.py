"""Chats and preference pairs -> token documents that fit into a row. Does not import torch, for worker processes.

A *turn* is one message as `chat_turns` encodes it: (ids, mask). The mask is True on the assistant's words and on the
<|im_end|> after them. Tokens after a document's last target teach nothing, so they are cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinylm.dataset.sources.record_shapes import PreferencePair
from tinylm.tokenizer.chat_template import Message, chat_turns

Turn = tuple[list[int], list[bool]]

WHOLE, CUT, DROPPED, EQUAL = "whole", "cut", "dropped", "equal"

MIN_ANSWER_SHARE = 0.5
"""Share of a row that is reserved for the answers of a pair that is too long; its prompt is cut first. DPO learns only
from the answers, so they should not be cut."""

MIN_ANSWER_TOKENS = 32
"""How many tokens of a pair's longer answer must remain, or all of them if it is shorter."""


@dataclass(frozen=True)
class Documents:
    """Token documents end to end: document i is `ids[offsets[i] : offsets[i + 1]]`.

    ids [N] int32; is_target [N] bool, True where the token is to be predicted; offsets [D + 1] int64.
    """

    ids: np.ndarray
    is_target: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids [n], is_target [n]) of one document; views, not copies."""
        span = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.ids[span], self.is_target[span]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, [D]."""
        return np.diff(self.offsets)

    @property
    def num_targets(self) -> int:
        """Tokens to predict. A document's first token is never one of them."""
        return int(np.count_nonzero(self.is_target))

    def select(self, indices: Sequence[int]) -> Documents:
        """The documents with these numbers, in this order."""
        spans = [(int(self.offsets[i]), int(self.offsets[i + 1])) for i in indices]
        offsets = np.cumsum([0, *(stop - start for start, stop in spans)], dtype=np.int64)
        empty = self.ids[:0], self.is_target[:0]
        parts = [(self.ids[start:stop], self.is_target[start:stop]) for start, stop in spans] or [empty]
        ids, is_target = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return Documents(ids, is_target, offsets)

    @classmethod
    def join(cls, turns: Sequence[Turn]) -> Documents:
        """Documents, one for each (ids, mask)."""
        offsets = np.cumsum([0, *(len(ids) for ids, _ in turns)], dtype=np.int64)
        ids = np.fromiter((token for ids, _ in turns for token in ids), dtype=np.int32, count=offsets[-1])
        mask = np.fromiter((flag for _, mask in turns for flag in mask), dtype=bool, count=offsets[-1])
        return cls(ids, mask, offsets)

    @classmethod
    def concatenate(cls, parts: Sequence[Documents]) -> Documents:
        """All documents of all parts, in order."""
        if not parts:
            return cls.join([])
        lengths = np.concatenate([part.lengths for part in parts])
        return cls(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.is_target for part in parts]),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        )


def flatten(turns: Sequence[Turn]) -> Turn:
    """Join turns to one (ids, mask) that ends with the last target. The first token is never a target."""
    ids = [token for turn, _ in turns for token in turn]
    mask = [flag for _, turn_mask in turns for flag in turn_mask]
    if mask:
        mask[0] = False
    end = len(mask)
    while end and not mask[end - 1]:
        end -= 1
    return ids[:end], mask[:end]


def fit_chat(turns: Sequence[Turn], row_length: int) -> tuple[Turn, str]:
    """A chat as one document of at most `row_length` positions.

    A chat that is too long keeps as many complete turns from its start as fit. If not even the first answer fits, the
    chat is cut within that answer; if no token of an answer fits, the chat is dropped.

    Returns:
        (ids, mask), and WHOLE, CUT or DROPPED (then ids are empty).
    """
    limit = row_length + 1  # a document of n tokens takes n - 1 positions
    whole = flatten(turns)
    if len(whole[0]) <= limit:
        return whole, WHOLE if whole[0] else DROPPED
    best, seen = 0, 0  # tokens up to the last target that fits; tokens of the turns before this one
    for ids, mask in turns:
        if any(mask):
            used = seen + len(mask) - mask[::-1].index(True)
            if used > limit:
                break
            best = used
        seen += len(ids)
    if best == 0:
        cut = flatten([(whole[0][:limit], whole[1][:limit])])
        return cut, CUT if cut[0] else DROPPED
    return (whole[0][:best], whole[1][:best]), CUT


def fit_pair(
    prompt: Sequence[Turn], chosen: Sequence[Turn], rejected: Sequence[Turn], row_length: int
) -> tuple[Turn, Turn, str]:
    """A preference pair as two documents with the same prompt, each of at most `row_length` positions.

    Only the answers have targets. If the longer answer does not fit after the prompt, the prompt first loses its oldest
    turns, until the answers fit or have MIN_ANSWER_SHARE of the row. Then the answers are cut at the end of the row.
    The pair is dropped if its last question leaves fewer than MIN_ANSWER_TOKENS for the answers, or if the cut answers
    are equal.

    Returns:
        chosen (ids, mask), rejected (ids, mask), and WHOLE, CUT, DROPPED or EQUAL (then both are empty): the answers
        do not differ, so there is nothing to learn.
    """
    limit = row_length + 1
    answers = [flatten(turns) for turns in (chosen, rejected)]
    if answers[0] == answers[1]:
        return ([], []), ([], []), EQUAL
    wanted = max(len(ids) for ids, _ in answers)
    kept_for_answers = min(wanted, int(limit * MIN_ANSWER_SHARE))
    sizes = [len(ids) for ids, _ in prompt]
    first = 0
    while first < len(prompt) - 1 and sum(sizes[first:]) > limit - kept_for_answers:
        first += 1
    prompt_ids = [token for ids, _ in prompt[first:] for token in ids]
    room = limit - len(prompt_ids)
    dropped: tuple[Turn, Turn, str] = (([], []), ([], []), DROPPED)
    if room < min(wanted, MIN_ANSWER_TOKENS):
        return dropped
    answers = [flatten([(ids[:room], mask[:room])]) for ids, mask in answers]
    if not answers[0][0] or not answers[1][0] or answers[0] == answers[1]:
        return dropped
    silent = [False] * len(prompt_ids)
    documents = [(prompt_ids + ids, silent + mask) for ids, mask in answers]
    return documents[0], documents[1], CUT if first or wanted > room else WHOLE


def encode_chats(tokenizer: Any, row_length: int, chats: Sequence[list[Message]]) -> tuple[Documents, list[str]]:
    """Tokenise chats and fit them into rows. There is one outcome per chat, and no document for a dropped one."""
    fitted = [fit_chat(chat_turns(tokenizer, chat), row_length) for chat in chats]
    kept = [turn for turn, outcome in fitted if outcome != DROPPED]
    return Documents.join(kept), [outcome for _, outcome in fitted]


def encode_pairs(tokenizer: Any, row_length: int, pairs: Sequence[PreferencePair]) -> tuple[Documents, list[str]]:
    """Tokenise pairs and fit them into rows. There is one outcome per pair; documents 2i and 2i + 1 are the chosen and
    the rejected answer of pair i of those that are kept."""
    turns: list[Turn] = []
    outcomes = []
    for prompt, chosen, rejected in pairs:
        encoded = chat_turns(tokenizer, [*prompt, *chosen]), chat_turns(tokenizer, [*prompt, *rejected])
        parts = encoded[0][: len(prompt)], encoded[0][len(prompt) :], encoded[1][len(prompt) :]
        good, bad, outcome = fit_pair(*parts, row_length)
        outcomes.append(outcome)
        if outcome in (WHOLE, CUT):
            turns += [good, bad]
    return Documents.join(turns), outcomes
