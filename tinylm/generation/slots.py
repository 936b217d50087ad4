"""Rows of one KV cache, reserved once, that requests take and leave; what they leave serves later prompts.

The rows in use come first, without a gap, so that a step reads them in one piece. A row that is given back keeps its
tokens until another request needs it: the next turn of a chat, or another chat with the same system message, then
starts behind what both have in common.
"""

from __future__ import annotations

from bisect import bisect_left

from tinylm.model.model_tinylm import TinyLMForCausalLM


class Slots:
    """The rows, their tokens, and which of them are in use.

    Args:
        num_slots: rows to reserve.
        length: tokens that each has room for.

    Attributes:
        cache: keys and values; `cache.lengths[i]` tokens of row i are held.
        num_used: rows in use; they are the first.
    """

    def __init__(self, model: TinyLMForCausalLM, num_slots: int, length: int) -> None:
        self.cache = model.new_cache(num_slots, length)
        self.num_used = 0
        # Of each row; they may run ahead of what the cache holds.
        self._tokens: list[list[int]] = [[] for _ in range(num_slots)]
        self._last_use = [0] * num_slots  # larger is later
        self._clock = 0

    def __len__(self) -> int:
        return len(self._tokens)

    def take(self, tokens: list[int], prompt_length: int) -> int:
        """Take a row for `tokens`, a list that may grow; returns its place. See `reuse` for what it holds at first.

        It is the row whose tokens the prompt continues for the most part, else the one that was not used for longest.
        """
        free = range(self.num_used, len(self))
        row = max(free, key=lambda place: self._common(place, tokens, prompt_length))
        common = self._common(row, tokens, prompt_length)
        if common == 0 or 2 * common < self.cache.lengths[row]:
            row = min(free, key=lambda place: self._last_use[place])
            common = self._common(row, tokens, prompt_length)
        place = self.num_used
        self.cache.lengths[row] = common
        self._tokens[row] = tokens
        self.swap(row, place)
        self.num_used += 1
        return place

    def reuse(self, place: int, prompt_length: int) -> int:
        """Let the row begin with the longest start of its prompt that any row holds; returns how much that is.

        At least one token of the prompt is left to compute, for the logits after it.
        """
        tokens = self._tokens[place]
        best = max(range(len(self)), key=lambda row: self._common(row, tokens, prompt_length))
        common = self._common(best, tokens, prompt_length)
        if common > self.cache.lengths[place]:
            self._use(best)
            self.cache.copy_start(best, place, common)
        return self.cache.lengths[place]

    def give_back_last(self) -> None:
        """End the use of the last row in use; its tokens stay."""
        self.num_used -= 1
        row = self.num_used
        self._tokens[row] = self._tokens[row][: self.cache.lengths[row]]
        self._use(row)

    def wipe(self, place: int) -> None:
        """Empty a row that holds what must not be used again."""
        self.cache.wipe_row(place)

    def swap(self, one: int, other: int) -> None:
        """Let two rows change places."""
        self.cache.swap_rows(one, other)
        self._tokens[one], self._tokens[other] = self._tokens[other], self._tokens[one]
        self._last_use[one], self._last_use[other] = self._last_use[other], self._last_use[one]

    def _common(self, row: int, tokens: list[int], prompt_length: int) -> int:
        held = min(self.cache.lengths[row], prompt_length - 1)
        return common_start(self._tokens[row], tokens, held)

    def _use(self, row: int) -> None:
        self._clock += 1
        self._last_use[row] = self._clock


def common_start(one: list[int], other: list[int], most: int) -> int:
    """How many of the first `most` tokens two lists have in common, starting with their first."""
    if one[:1] != other[:1]:
        return 0
    return bisect_left(range(1, most + 1), True, key=lambda n: one[:n] != other[:n])
