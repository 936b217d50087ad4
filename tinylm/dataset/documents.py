"""Chats and preference pairs -> token documents that fit a row. Free of torch, for worker processes.

A *turn* is one message as `chat_turns` encodes it: (ids, mask), where the mask is True on what the assistant
wrote and on the <|im_end|> that ends it. What stands after a document's last target teaches nothing and is
cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinylm.dataset.sources.record_shapes import PreferencePair
from tinylm.tokenizer.chat_template import Message, chat_turns

Turn = tuple[list[int], list[bool]]

WHOLE, CUT, DROPPED = "whole", "cut", "dropped"

MIN_ANSWER_SHARE = 0.5
"""Share of a row that an over-long pair keeps for its answers; the prompt gives way first. DPO learns from
the answers alone, so they must not be what is cut away."""

MIN_ANSWER_TOKENS = 32
"""Tokens that must remain of the longer answer of a pair, or all of it where it is shorter."""


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
        """Tokens to predict; a document's first token never is one."""
        return int(np.count_nonzero(self.is_target))

    @classmethod
    def join(cls, turns: Sequence[Turn]) -> Documents:
        """Documents from (ids, mask) each."""
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
    """Turns -> one (ids, mask), without what follows the last target. The first token is never a target."""
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

    An over-long chat keeps as many whole turns from its start as fit. Where not even the first answer fits,
    it is cut within that answer; where no token of an answer fits, the chat is dropped.

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

    Only the answers have targets. When the longer answer does not fit behind the prompt, the prompt loses its
    oldest turns first, until the answers have their need or MIN_ANSWER_SHARE of the row; then the answers are
    cut at the row's end. The pair is dropped where its last question alone leaves the answers fewer than
    MIN_ANSWER_TOKENS, or where the cut answers no longer differ.

    Returns:
        chosen (ids, mask), rejected (ids, mask), and WHOLE, CUT or DROPPED (then both are empty).
    """
    limit = row_length + 1
    answers = [flatten(turns) for turns in (chosen, rejected)]
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
    """Tokenise and fit chats; dropped ones leave no document. The outcomes are one for each chat."""
    fitted = [fit_chat(chat_turns(tokenizer, chat), row_length) for chat in chats]
    kept = [turn for turn, outcome in fitted if outcome != DROPPED]
    return Documents.join(kept), [outcome for _, outcome in fitted]


def encode_pairs(tokenizer: Any, row_length: int, pairs: Sequence[PreferencePair]) -> tuple[Documents, list[str]]:
    """Tokenise and fit pairs: documents 2i and 2i + 1 are kept pair i's chosen and rejected answers."""
    turns: list[Turn] = []
    outcomes = []
    for prompt, chosen, rejected in pairs:
        encoded = chat_turns(tokenizer, [*prompt, *chosen]), chat_turns(tokenizer, [*prompt, *rejected])
        parts = encoded[0][: len(prompt)], encoded[0][len(prompt) :], encoded[1][len(prompt) :]
        good, bad, outcome = fit_pair(*parts, row_length)
        outcomes.append(outcome)
        if outcome != DROPPED:
            turns += [good, bad]
    return Documents.join(turns), outcomes
