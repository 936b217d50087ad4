"""Continuous batching (Yu et al. 2022, Orca): requests join and leave a running batch at every step.

    scheduler = Scheduler(engine.compute_model, engine.tokenizer)
    scheduler.start()
    ticket = scheduler.submit(Request(prompt_ids, SamplingSettings(max_new_tokens=50), engine.stop_ids))
    for event in ticket:
        print(event.text, end="")
    scheduler.close()

A step reads a bounded number of prompt tokens, then computes one token of every answer. Keys and values lie in rows of
one cache, reserved once (`Slots`). The rows in use are, in this order: answers, and prompts that are being read.

A request's random numbers, penalties and text depend on that request alone. Its logits do, too, up to rounding: the
kernels add in another order when the batch has another shape. In float32 this decides a close call hardly ever.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinylm.generation.request import Event, QueueFull, Request, SchedulerClosed, Ticket, joined, one_line
from tinylm.generation.sampling import accept
from tinylm.generation.slots import Slots, common_start
from tinylm.generation.stream import DAMAGED, Stream, TokenChoice, token_logprobs, unsound_rows
from tinylm.model.kv_cache import KVCache
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.tokenizer.tokenizer import Tokenizer

SCORED_AT_ONCE = 128
"""Positions of a prompt whose logits are computed at a time; each takes the memory of a vocabulary."""
WORTH_WAITING = 32
"""A prompt that shares this many more tokens with one that is being read waits for them, in place of reading them."""


@dataclass(frozen=True)
class SchedulerSettings:
    """Settings of the scheduler: how many requests at a time, and how much memory for them."""

    max_streams: int = 16
    """most requests answered at the same time"""
    max_waiting: int = 64
    """most requests that wait for a place; more are refused"""
    cache_bytes: int = 512 * 2**20
    """memory for keys and values in bytes, reserved at the start; what the streams leave keeps prompts for reuse"""
    context_length: int | None = None
    """most tokens of a prompt and its answer; None takes the model's"""
    prefill_tokens: int = 128
    """most prompt tokens read in a step while others are being answered; four times as many while none is"""
    draft_tokens: int = 7
    """most tokens that a request alone guesses ahead where it repeats itself, to compute them at once; 0 for none"""

    def __post_init__(self) -> None:
        for name in ("max_streams", "max_waiting", "cache_bytes", "prefill_tokens"):
            accept(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        accept("draft_tokens", self.draft_tokens, self.draft_tokens >= 0, "0 (off) or more")
        if self.context_length is not None:
            accept("context_length", self.context_length, self.context_length >= 2, "at least 2")


class Scheduler:
    """Answers many requests with one model.

    `submit` and `cancel` may be called from any thread. Either `start` a thread that steps, or call `step` yourself.

    Args:
        model: in evaluation mode, in the precision to compute in.
        tokenizer: for text and stop strings; None for token ids only.
        changed: shared by schedulers that one thread runs (see `run_together`); None for one of its own.

    Raises:
        ValueError: the memory for keys and values holds no stream, or the context is longer than the model's.
    """

    def __init__(
        self,
        model: TinyLMForCausalLM,
        tokenizer: Tokenizer | None = None,
        settings: SchedulerSettings | None = None,
        changed: threading.Condition | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.settings = settings = settings or SchedulerSettings()
        self.context_length, num_slots = _shape(model, settings)
        self.max_streams = min(settings.max_streams, num_slots)
        self._slots = Slots(model, num_slots, self.context_length)
        self._streams: list[Stream] = []  # of the rows in use
        self._num_answering = 0  # the first of these; the others' prompts are being read
        self._choice = TokenChoice()
        self._waiting: deque[Ticket] = deque()
        self._is_closing = self._cancels_all = False
        self._changed = changed or threading.Condition()  # guards `_waiting` and `_is_closing`
        self._stepping = threading.Lock()
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------------------------------ from any thread

    def submit(self, request: Request, listener: Callable[[Event], None] | None = None) -> Ticket:
        """Let a request wait for its place.

        Args:
            listener: see `Ticket`.

        Raises:
            RequestError: this model cannot answer it.
            QueueFull: too many wait.
            SchedulerClosed: the scheduler was closed.
        """
        request.check(self.model.config.vocab_size, self.context_length, self.tokenizer is not None)
        ticket = Ticket(request, listener)
        with self._changed:
            if self._is_closing:
                raise SchedulerClosed("the scheduler is closed and takes no more requests; start another")
            if (waiting := sum(not other.is_cancelled for other in self._waiting)) >= self.settings.max_waiting:
                raise QueueFull(f"{waiting} requests wait already; at most that many may; try again later")
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a request at the next step; it gets a last event, unless it has it already."""
        with self._changed:
            ticket.is_cancelled = True
            self._changed.notify_all()

    def start(self) -> None:
        """Run in a thread of its own, until `close`."""
        self._thread = threading.Thread(target=self.run, name="scheduler", daemon=True)
        self._thread.start()

    def run(self) -> None:
        """Step whenever there is something to do; return once the scheduler is closed and all requests are done."""
        run_together([self])

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests, and wait for the thread to end, at most `timeout` seconds.

        Args:
            drain: answer the requests that were accepted; otherwise they are cancelled.
        """
        with self._changed:
            self._is_closing = True
            self._cancels_all = not drain
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout)

    @property
    def has_work(self) -> bool:
        """Whether a request waits or is being answered."""
        return bool(self._waiting or self._streams)

    @property
    def num_running(self) -> int:
        """Requests that have a place."""
        return len(self._streams)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._waiting)

    # ------------------------------------------------------------------------------------------------- one step

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Compute the next tokens; returns what it brought, at most one event for each request."""
        with self._stepping:
            events = self._end_cancelled()
            self._admit()
            try:
                events += self._compute()
            except Exception as error:  # such as a lack of memory: the requests end, and the scheduler serves others
                reason = f"the computation failed: {one_line(error)}"
                events += [stream.fail(reason) for stream in self._streams if not stream.is_done]
                self._remove_done()
            for event in events:
                event.ticket.deliver(event)
            return events

    def _end_cancelled(self) -> list[Event]:
        with self._changed:
            gone = [ticket for ticket in self._waiting if ticket.is_cancelled or self._cancels_all]
            for ticket in gone:
                self._waiting.remove(ticket)
        events = [Event(ticket, finish_reason="cancelled") for ticket in gone]
        streams = [stream for stream in self._streams if stream.ticket.is_cancelled or self._cancels_all]
        events += [stream.cancel() for stream in streams]
        self._remove_done()
        return events

    def _admit(self) -> None:
        """Give waiting requests the free places, first come, first served."""
        while len(self._streams) < self.max_streams:
            with self._changed:
                if not self._waiting:
                    return
                ticket = self._waiting.popleft()
            request = ticket.request
            room = self.context_length - len(request.prompt)
            stream = Stream(ticket, min(request.settings.max_new_tokens, room), self.tokenizer)
            self._slots.take(stream.tokens, stream.prompt_length)
            self._streams.append(stream)

    def _compute(self) -> list[Event]:
        """Prompt tokens within the bound, then the next token of every answer, those just begun among them."""
        if len(self._streams) == self._num_answering == 1 and (guess := self._guess(self._streams[0])):
            return [self._check_guess(self._streams[0], guess)]
        answering = self._streams[: self._num_answering]
        begun, logits = self._read_prompts()
        if answering:
            cache = self._slots.cache.rows(0, len(answering))
            last = [stream.tokens[-1:] for stream in answering]
            hidden = self.model.hidden_states(torch.tensor(last, device=self.model.device), cache=cache)
            self._slots.cache.lengths[: len(answering)] = cache.lengths
            logits.insert(0, self.model.lm_head(hidden[:, -1]))
        events = [stream.fail(DAMAGED) for stream in self._streams if stream.is_damaged]
        for stream in begun:
            self._swap(self._streams.index(stream), self._num_answering)
            self._num_answering += 1
        if logits:
            events += self._choice.choose(answering + begun, torch.cat(logits))
        self._remove_done()
        return events

    def _guess(self, stream: Stream) -> list[int]:
        """The next tokens but for the last that fits, if it is worth to compute them at once."""
        most = min(self.settings.draft_tokens, stream.prompt_length + stream.limit - len(stream.tokens) - 1)
        return stream.lookup.guess(stream.tokens, most) if most > 0 else []

    def _check_guess(self, stream: Stream, guess: list[int]) -> Event:
        """Compute the logits after a guess's tokens in one pass, and choose from them as far as the guess is right."""
        cache = self._slots.cache.rows(0, 1)
        (past,) = cache.lengths
        ids = torch.tensor([[stream.tokens[-1], *guess]], device=self.model.device)
        logits = self.model.lm_head(self.model.hidden_states(ids, cache=cache)[0])
        events = []
        for row, guessed in enumerate([*guess, None]):
            events += self._choice.choose([stream], logits[row : row + 1])
            self._slots.cache.lengths[0] = past + row + 1  # of the wrong tokens nothing is kept
            if stream.is_done or stream.tokens[-1] != guessed:
                break
        self._remove_done()
        return joined(events)

    # -------------------------------------------------------------------------------------------------- prompts

    def _read_prompts(self) -> tuple[list[Stream], list[Tensor]]:
        """Read prompts, group after group; returns the streams whose prompts are read, and the logits after them."""
        budget = self.settings.prefill_tokens * (1 if self._num_answering else 4)
        least = budget // 4  # a pass of fewer tokens costs nearly as much as one of these
        begun: list[Stream] = []
        logits = []
        first = self._num_answering
        while budget > least and (chunks := self._next_group(first, budget)):
            ended, hidden = self._read(first, chunks)
            if ended:
                begun += ended
                logits.append(self.model.lm_head(hidden))
            budget -= len(chunks) * max(chunks)
            first += len(chunks)
        return begun, logits

    def _next_group(self, first: int, budget: int) -> list[int]:
        """Of how many prompts from row `first` on the next pass reads a part, and how many tokens of each.

        Short parts are padded to the longest, so a group ends where more than half of the pass would be padding.
        """
        cache = self._slots.cache
        chunks: list[int] = []
        longest_past = 0
        for place in range(first, len(self._streams)):
            stream = self._streams[place]
            if not stream.is_started:
                if stream.request.num_prompt_logprobs is not None:
                    cache.lengths[place] = 0
                elif self._must_wait(place):
                    break
                else:
                    stream.ticket.num_cached = self._slots.reuse(place, stream.prompt_length)
                stream.is_started = True
            past = cache.lengths[place]
            size = min(stream.prompt_length - past, budget)
            width, rows = max([size, *chunks]), len(chunks) + 1
            longest_past = max(longest_past, past)
            fits = width * rows <= budget and longest_past + width <= self.context_length
            if chunks and not (fits and 2 * (sum(chunks) + size) >= width * rows):
                break
            chunks.append(size)
        return chunks

    def _must_wait(self, place: int) -> bool:
        """Whether a prompt before this one in the queue is about to leave it much more than any row holds now."""
        stream = self._streams[place]
        most = stream.prompt_length - 1
        ahead = range(self._num_answering, place)
        lengths = self._slots.cache.lengths
        return any(
            common_start(other.tokens, stream.tokens, min(most, other.prompt_length)) >= lengths[row] + WORTH_WAITING
            for row in ahead
            if (other := self._streams[row]) and lengths[row] < other.prompt_length
        )

    def _read(self, first: int, chunks: list[int]) -> tuple[list[Stream], Tensor]:
        """Read the next tokens of the prompts from row `first` on, so many of each.

        Returns:
            The streams whose prompts are now read, and the hidden states [B, C] at the ends of these prompts.
        """
        end, width = first + len(chunks), max(chunks)
        cache: KVCache = self._slots.cache
        past = cache.lengths[first:end]
        rows = list(zip(self._streams[first:end], past, chunks, strict=True))
        # A row is padded with a token of its own: the next tokens do see it behind the mask, where NaN would hurt them.
        parts = [_padded(stream.tokens[start : start + size], width) for stream, start, size in rows]
        device = self.model.device
        hidden = self.model.hidden_states(torch.tensor(parts, device=device), cache=cache.rows(first, end))
        cache.lengths[first:end] = [start + size for _, start, size in rows]
        for row, (stream, start, size) in enumerate(rows):
            self._score_prompt(stream, start, hidden[row, :size])
        # Where hidden states are numbers, so are the keys and values below them, which other prompts may reuse.
        for row in unsound_rows(hidden):
            rows[row][0].is_damaged = True
            self._slots.wipe(first + row)
        ends = [stream.prompt_length == cache.lengths[first + row] for row, (stream, _, _) in enumerate(rows)]
        ended = [row for row, is_end in enumerate(ends) if is_end]
        last = [chunks[row] - 1 for row in ended]
        return [rows[row][0] for row in ended], hidden[ended, last]

    def _score_prompt(self, stream: Stream, start: int, hidden: Tensor) -> None:
        """If the stream asked for it, how likely its prompt's tokens after `start` are, from hidden states [T, C]."""
        count = stream.request.num_prompt_logprobs
        if count is None:
            return
        following = stream.tokens[start + 1 : min(start + len(hidden) + 1, stream.prompt_length)]
        for first in range(0, len(following), SCORED_AT_ONCE):
            ids = following[first : first + SCORED_AT_ONCE]
            logits = self.model.lm_head(hidden[first : first + len(ids)]).float()
            stream.ticket.prompt_logprobs += token_logprobs(ids, logits, count)

    # ----------------------------------------------------------------------------------------------------- rows

    def _swap(self, one: int, other: int) -> None:
        self._slots.swap(one, other)
        self._streams[one], self._streams[other] = self._streams[other], self._streams[one]

    def _remove_done(self) -> None:
        """Give back the rows of streams that are done; the last ones take their places."""
        for stream in [stream for stream in reversed(self._streams) if stream.is_done]:  # the last need no swap
            place = self._streams.index(stream)
            if stream.is_damaged:
                self._slots.wipe(place)
            if place < self._num_answering:
                self._num_answering -= 1
                self._swap(place, self._num_answering)
                place = self._num_answering
            self._swap(place, len(self._streams) - 1)
            self._slots.give_back_last()
            self._streams.pop()


def run_together(schedulers: Sequence[Scheduler]) -> None:
    """Step those that have something to do in turn; return once all are closed and all requests are done.

    Models that share a machine are run so, in one thread: in two, each would wait for the other's cores.

    Args:
        schedulers: made with the same `changed`.
    """
    changed = schedulers[0]._changed
    while True:
        with changed:
            changed.wait_for(lambda: any(s.has_work for s in schedulers) or all(s._is_closing for s in schedulers))
            busy = [scheduler for scheduler in schedulers if scheduler.has_work]
        if not busy:
            return
        for scheduler in busy:
            scheduler.step()


def _padded(tokens: list[int], width: int) -> list[int]:
    return tokens + tokens[-1:] * (width - len(tokens))


def _shape(model: TinyLMForCausalLM, settings: SchedulerSettings) -> tuple[int, int]:
    """Tokens that a row holds, and the number of rows that the memory for keys and values holds."""
    longest = model.config.max_position_embeddings
    length = settings.context_length or longest
    if length > longest:
        raise ValueError(f"context_length is {length}; the model has {longest} positions; set at most that")
    row_bytes = length * KVCache.bytes_per_token(model.config, model.dtype)
    if settings.cache_bytes < row_bytes:
        raise ValueError(
            f"cache_bytes is {settings.cache_bytes}; a context of {length} tokens takes {row_bytes}; set at least "
            "that, or a shorter context_length"
        )
    return length, settings.cache_bytes // row_bytes
