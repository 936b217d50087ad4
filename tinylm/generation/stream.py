"""A request that is being answered, and the choice of the next token of several of them.

Shapes: B streams, V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from tinylm.generation.decoding import DAMAGED
from tinylm.generation.prompt_lookup import PromptLookup
from tinylm.generation.request import Event, Ticket, TokenLogprob, one_line
from tinylm.generation.sampling import BatchChoice, count_penalties, numbers_to_draw_with
from tinylm.generation.text_stream import TextStream
from tinylm.tokenizer.tokenizer import Tokenizer


class Stream:
    """One request's prompt and its answer so far.

    Args:
        limit: most tokens of the answer; prompt and answer together must fit the context.
        tokenizer: for pieces of text; None for token ids only.

    Attributes:
        tokens: prompt and answer.
        prompt_length: tokens of the prompt.
        lookup: guesses its next tokens.
        is_started: whether reading of the prompt has begun.
        is_done, is_damaged: whether the answer has ended, and whether it did so by an error.
    """

    def __init__(self, ticket: Ticket, limit: int, tokenizer: Tokenizer | None) -> None:
        self.ticket, self.limit = ticket, limit
        self.request = request = ticket.request
        self.tokens = list(request.prompt)
        self.prompt_length = len(self.tokens)
        self.is_started = False
        self.is_done = False
        self.is_damaged = False
        self._stop_ids = frozenset(request.stop_ids)
        self._text = None if tokenizer is None else TextStream(tokenizer, request.stop_strings)
        self._counts: Counter[int] = Counter()
        self.lookup = PromptLookup()
        seed = torch.Generator().seed() if request.settings.seed is None else request.settings.seed
        self._uniforms = numbers_to_draw_with(request.settings, seed, request.number, limit)

    @property
    def next_uniform(self) -> float:
        """The random number that the next token is drawn with."""
        return self._uniforms[len(self.tokens) - self.prompt_length]

    def adjust(self, logits: Tensor) -> Tensor:
        """The logits [V] with this request's bias and penalties, and minus infinity for tokens it does not allow.

        Raises:
            ValueError: no token is allowed, or the mask has another shape.
        """
        request = self.request
        if request.logit_bias:
            ids = torch.tensor(list(request.logit_bias), device=logits.device)
            bias = torch.tensor([float(value) for value in request.logit_bias.values()], device=logits.device)
            logits = logits.index_add(0, ids, bias)
        if self._counts:
            counts = torch.zeros_like(logits)
            counts[list(self._counts)] = torch.tensor(list(self._counts.values()), dtype=logits.dtype).to(counts.device)
            logits = count_penalties(logits, counts, request.presence_penalty, request.frequency_penalty)
        state = self.ticket.answer_state
        allowed = state.mask() if state else None
        if allowed is None:
            return logits
        if allowed.shape != logits.shape or allowed.dtype != torch.bool:
            raise ValueError(
                f"the token mask is {allowed.dtype} {list(allowed.shape)}; expected torch.bool [{len(logits)}]; "
                "give one value for each token of the model"
            )
        if not allowed.any():
            raise ValueError("the token mask allows no token; expected at least one, if only one that ends the answer")
        return logits.masked_fill(~allowed.to(logits.device), -torch.inf)

    def take(self, token_id: int, logprob: TokenLogprob | None = None) -> Event:
        """Append the token to the answer, or end the answer."""
        if token_id in self._stop_ids:
            return self._finish("stop")
        state = self.ticket.answer_state
        try:
            is_complete = state is not None and state.take(token_id)
        except Exception as error:  # whatever a constraint raises is its own request's end
            return self.fail(one_line(error))
        self.tokens.append(token_id)
        if self.request.counts_tokens:
            self._counts[token_id] += 1
        text = self._text.feed(token_id) if self._text else ""
        logprobs = () if logprob is None else (logprob,)
        if is_complete or (self._text and self._text.is_stopped):
            return self._finish("stop", (token_id,), text, logprobs)
        if len(self.tokens) == self.prompt_length + self.limit:
            return self._finish("length", (token_id,), text, logprobs)
        return Event(self.ticket, (token_id,), text, logprobs)

    def fail(self, reason: str) -> Event:
        """End the answer because it cannot be continued."""
        self.is_done = self.is_damaged = True
        return Event(self.ticket, finish_reason="error", error=reason)

    def cancel(self) -> Event:
        """End the answer because nobody waits for it."""
        self.is_done = True
        return Event(self.ticket, finish_reason="cancelled")

    def _finish(
        self, reason: str, ids: tuple[int, ...] = (), text: str = "", logprobs: tuple[TokenLogprob, ...] = ()
    ) -> Event:
        self.is_done = True
        if self._text and not self._text.is_stopped:
            text += self._text.finish()
            reason = "stop" if self._text.is_stopped else reason
        return Event(self.ticket, ids, text, logprobs, reason)


class TokenChoice:
    """Chooses the next tokens of streams from their logits, and remembers what is the same at the next step."""

    def __init__(self) -> None:
        self._streams: list[Stream] = []

    def choose(self, streams: Sequence[Stream], logits: Tensor) -> list[Event]:
        """One event for each stream, from logits [B, V]. A stream whose logits or mask are unusable fails alone."""
        logits = logits.float()
        failed = {row: DAMAGED for row in unsound_rows(logits)}
        adjusted = self._adjusted(streams, logits, failed)
        if self._streams != list(streams):
            self._streams = list(streams)
            settings, before = [stream.request.settings for stream in streams], [stream.tokens for stream in streams]
            self._choice = BatchChoice(settings, before, logits.shape[-1], logits.device)
        tokens = self._choice(adjusted, [stream.next_uniform for stream in streams])
        return [
            stream.fail(failed[row])
            if row in failed
            else stream.take(token_id, _logprob(stream, token_id, logits, row))
            for row, (stream, token_id) in enumerate(zip(streams, tokens.tolist(), strict=True))
        ]

    def _adjusted(self, streams: Sequence[Stream], logits: Tensor, failed: dict[int, str]) -> Tensor:
        """The logits that tokens are chosen from; fills `failed` with rows that have none, and why."""
        own = [row for row, stream in enumerate(streams) if stream.request.has_own_logits and row not in failed]
        if not own and not failed:
            return logits
        logits = logits.clone()
        for row in own:
            try:
                logits[row] = streams[row].adjust(logits[row])
            except Exception as error:  # the mask is the client's code: whatever it raises is its own request's end
                failed[row] = one_line(error)
        logits[list(failed)] = 0.0
        return logits


def unsound_rows(values: Tensor) -> list[int]:
    """Which of the B rows of [B, ...] have something that is not a finite number: their sum is not finite."""
    sums = values.flatten(1).sum(dim=1).tolist()
    return [row for row, total in enumerate(sums) if not math.isfinite(total)]


def _logprob(stream: Stream, token_id: int, logits: Tensor, row: int) -> TokenLogprob | None:
    """The log-probabilities that the stream asked for, from the model's logits [B, V]."""
    count = stream.request.num_logprobs
    return None if count is None else token_logprobs([token_id], logits[row : row + 1], count)[0]


def token_logprobs(token_ids: Sequence[int], logits: Tensor, count: int) -> list[TokenLogprob]:
    """How likely each of B tokens is by its row of logits [B, V], and the `count` likeliest tokens there."""
    log_probs = logits.log_softmax(dim=-1)
    chosen = log_probs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None]).flatten().tolist()
    values, ids = log_probs.topk(count, dim=-1)
    return [
        TokenLogprob(token_id, logprob, tuple(zip(tops, those, strict=True)))
        for token_id, logprob, tops, those in zip(token_ids, chosen, ids.tolist(), values.tolist(), strict=True)
    ]
