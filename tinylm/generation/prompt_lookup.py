"""Speculation by copying (Saxena 2023, prompt lookup decoding): answers repeat what the text before them holds.

One pass over several tokens costs a CPU hardly more than a pass over one, since both read all weights. So where the
last tokens occurred before, the tokens that followed there are taken as a guess, and one pass computes the logits after
each of them. The answer keeps the tokens that would have been chosen one by one, so it stays the same.
"""

from __future__ import annotations

NGRAM = 3
"""How many tokens must have occurred before in the same order."""
WORTH = 2.0
"""Right tokens that a guess must have on average: a pass with a guess takes 1.2 times (float32) to 2.3 times (int8) as
long as one without, preset `small` on two cores."""
MEMORY = 0.7
"""Weight of the past in the average over guesses."""


class PromptLookup:
    """Guesses for one stream. A guess that is not worth a pass is still compared with what came, which costs nothing,
    so a text that begins to repeat itself is noticed."""

    def __init__(self) -> None:
        self._next_places: dict[tuple[int, ...], int] = {}  # of n-grams: the place behind their last occurrence
        self._num_known = NGRAM  # places before this one are in it
        self._guess: list[int] = []
        self._place = 0  # of the guess
        self._num_right = WORTH  # on average; the first guess is tried

    def guess(self, tokens: list[int], most: int) -> list[int]:
        """The next tokens, if it is worth a pass to look whether they are right; else none.

        Args:
            tokens: prompt and answer so far; they only grow between calls.
            most: length of a guess.
        """
        for place in range(self._num_known, len(tokens)):
            self._next_places[tuple(tokens[place - NGRAM : place])] = place
        self._num_known = max(self._num_known, len(tokens))
        if self._is_open(tokens):
            return []
        source = self._next_places.get(tuple(tokens[-NGRAM:]))
        if source is None or most < 1:
            return []
        self._place, self._guess = len(tokens), []
        for place in range(source, source + most):  # a guess may run into itself: "ha ha ha"
            self._guess.append(tokens[place] if place < len(tokens) else self._guess[place - len(tokens)])
        return self._guess if self._num_right >= WORTH else []

    def _is_open(self, tokens: list[int]) -> bool:
        """Whether too few tokens came to judge the last guess; otherwise it enters the average."""
        came = tokens[self._place : self._place + len(self._guess)]
        pairs = zip(self._guess, came, strict=False)
        num_right = next((n for n, (guessed, token) in enumerate(pairs) if guessed != token), len(self._guess))
        if num_right > len(came):
            return True
        if self._guess:
            self._num_right = MEMORY * self._num_right + (1 - MEMORY) * num_right
            self._guess = []
        return False
