"""Fit a conversation into the model's context: drop the oldest exchanges first, then cut text."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

from tinylm.tokenizer.chat_template import encode_chat
from tinylm.tokenizer.tokenizer import Tokenizer

# What a decoder puts for the broken bytes left when text is cut inside a character.
REPLACEMENT_CHARACTER = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class FittedPrompt:
    """A prompt within the budget, and what was left out for it."""

    ids: list[int]
    """Token ids, ready to be answered."""
    dropped_messages: int = 0
    """Messages left out, the oldest first."""
    cut_tokens: int = 0
    """Tokens cut from the beginning of messages that were too long by themselves."""

    @property
    def notice(self) -> str:
        """One sentence on what was left out; empty when all of it fits."""
        parts = []
        if self.dropped_messages:
            parts.append(f"{self.dropped_messages} of the oldest messages")
        if self.cut_tokens:
            parts.append(f"the first {self.cut_tokens} tokens of a long message")
        return f"left out to fit the context: {' and '.join(parts)}" if parts else ""


def prompt_budget(context_length: int, max_new_tokens: int) -> int:
    """Tokens a prompt may take: the context less the answer, but never less than half of the context.

    An answer may be shorter than `max_new_tokens`, but the model must be able to read the question.
    """
    return max(context_length - max_new_tokens, context_length // 2)


def fit_history(tokenizer: Tokenizer, messages: list[dict[str, Any]], budget: int) -> FittedPrompt:
    """Encode `messages` for an answer in at most `budget` tokens.

    A leading system message always stays. Whole exchanges (a user message and what follows it) are dropped, the oldest
    first. If the last exchange alone is too long, its longest messages keep only their ends.

    Raises:
        ValueError: `messages` is empty, or not even the empty template fits the budget.
    """
    if not messages:
        raise ValueError("no messages to answer; expected at least one; add a user message")
    num_system = 1 if messages[0]["role"] == "system" else 0
    system, turns = messages[:num_system], messages[num_system:]
    starts = [0] + [i for i, message in enumerate(turns) if i > 0 and message["role"] == "user"]

    def kept(start: int) -> list[dict[str, Any]]:
        return system + turns[start:]

    # The prompt only shrinks with a later start, so halving the search finds the earliest that fits.
    first = bisect_left(starts, True, key=lambda start: len(_encode(tokenizer, kept(start))) <= budget)
    start = starts[min(first, len(starts) - 1)]
    ids, cut = _cut_longest(tokenizer, kept(start), budget)
    return FittedPrompt(ids, dropped_messages=start, cut_tokens=cut)


def _encode(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> list[int]:
    return encode_chat(tokenizer, messages, add_generation_prompt=True)[0]


def _cut_longest(tokenizer: Tokenizer, messages: list[dict[str, Any]], budget: int) -> tuple[list[int], int]:
    """Cut the beginning of the longest message until all fit; returns the ids and how many tokens were cut."""
    messages = [dict(message) for message in messages]
    ids = _encode(tokenizer, messages)
    cut = 0
    while len(ids) > budget:
        contents = [tokenizer.encode(message["content"].strip()) for message in messages]
        longest = max(range(len(messages)), key=lambda i: len(contents[i]))
        if not contents[longest]:
            raise ValueError(
                f"the chat template alone takes {len(ids)} tokens, and the context leaves {budget} for the prompt; "
                f"expected a context of at least {2 * len(ids)} tokens; raise max_seq_len, or use a model with a "
                "longer context"
            )
        # Shrink the longest message at most to the size of the second longest; from there both shrink.
        others = sorted((len(content) for content in contents), reverse=True)
        spare = max(1, len(contents[longest]) - (others[1] if len(others) > 1 else 0))
        excess = min(len(ids) - budget, max(spare, (len(ids) - budget + 1) // 2))
        tail = tokenizer.decode(contents[longest][excess:]).lstrip(REPLACEMENT_CHARACTER)
        messages[longest]["content"] = tail
        cut += min(excess, len(contents[longest]))
        ids = _encode(tokenizer, messages)
    return ids, cut
