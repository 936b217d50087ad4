"""What a client asks of the scheduler, and what it gets: requests, tickets, events, and the errors between them."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from tinylm.generation.sampling import SamplingSettings, accept


class AnswerState(Protocol):
    """What may follow in one answer, step by step."""

    def mask(self) -> Tensor | None:
        """bool [V], true where a token may come next; None where every token may."""

    def take(self, token_id: int) -> bool:
        """Go on behind the token that was chosen; returns whether the answer is complete, so that nothing follows."""


class Constraint(Protocol):
    """Which answers there may be."""

    def start(self, stop_ids: Sequence[int]) -> AnswerState:
        """The state of a new answer, which these tokens end. It is called from any thread."""


class RequestError(ValueError):
    """A request that can never be answered."""


class PromptTooLong(RequestError):
    """The prompt leaves no room for an answer."""


class QueueFull(RuntimeError):
    """Too many requests wait already; the same request may succeed later."""


class SchedulerClosed(RuntimeError):
    """The scheduler takes no more requests."""


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt and how it is answered. Several answers to one prompt are several requests with different `number`.

    Raises:
        RequestError: the prompt or a stop string is empty, or the settings ask for beam search.
        ValueError: a number outside of its range.
    """

    prompt: Sequence[int]
    """token ids, at least one"""
    settings: SamplingSettings = field(default_factory=SamplingSettings)
    stop_ids: Sequence[int] = ()
    """tokens that end the answer without being part of it"""
    stop_strings: Sequence[str] = ()
    """texts that end the answer without being shown, wherever the tokens' borders are"""
    number: int = 0
    """place in a list of requests: requests with one seed and different numbers draw different answers"""
    presence_penalty: float = 0.0
    """subtracted from the logit of each token in the answer so far, from -2 to 2"""
    frequency_penalty: float = 0.0
    """subtracted from a token's logit for each time it is in the answer so far, from -2 to 2"""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """added to the logits of these tokens, from -100 to 100"""
    num_logprobs: int | None = None
    """with each token its log-probability, and those of this many likeliest tokens; None for none of it"""
    num_prompt_logprobs: int | None = None
    """the same for each token of the prompt but the first, in the ticket's `prompt_logprobs`; the prompt is then read
    from its beginning, whatever is known of it"""
    constraint: Constraint | None = None
    """which tokens may come next; every answer has its own state"""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise RequestError("the prompt is empty; expected at least one token; give some text to continue")
        if self.settings.num_beams > 1:
            raise RequestError(
                f"num_beams is {self.settings.num_beams}; a stream has no beams; set num_beams to 1, or use "
                "Engine.generate"
            )
        if "" in self.stop_strings:
            raise RequestError("a stop string is empty; expected at least one character; leave it out")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            accept(name, value, -2 <= value <= 2, "-2 to 2 (0 = off)")
        for token_id, value in self.logit_bias.items():
            accept(f"logit_bias of token {token_id}", value, -100 <= value <= 100, "-100 to 100")
        for name in ("num_logprobs", "num_prompt_logprobs"):
            value = getattr(self, name)
            accept(name, value, value is None or value >= 0, "0 or more")

    def check(self, vocab_size: int, context_length: int, has_tokenizer: bool) -> None:
        """Refuse what this model cannot answer.

        Raises:
            PromptTooLong: the prompt leaves no room for an answer.
            RequestError: a token is not the model's, or stop strings were given and there is no tokenizer.
        """
        if len(self.prompt) >= context_length:
            raise PromptTooLong(
                f"the prompt has {len(self.prompt)} tokens; expected at most {context_length - 1}, which leaves room "
                f"for an answer in a context of {context_length}; shorten the prompt"
            )
        for name, ids in (("prompt", self.prompt), ("logit_bias", self.logit_bias)):
            for token_id in ids:
                if not 0 <= token_id < vocab_size:
                    raise RequestError(
                        f"{name} has token {token_id}; expected 0 to {vocab_size - 1}; encode the text with this "
                        "model's tokenizer"
                    )
        for name in ("num_logprobs", "num_prompt_logprobs"):
            if (value := getattr(self, name)) is not None and value > vocab_size:
                raise RequestError(f"{name} is {value}; the model has {vocab_size} tokens; ask for fewer")
        if self.stop_strings and not has_tokenizer:
            raise RequestError("stop strings need a tokenizer, and the scheduler has none; use stop_ids")

    @property
    def has_own_logits(self) -> bool:
        """Whether the model's logits are changed for this request alone, before the settings' filters."""
        return self.counts_tokens or bool(self.logit_bias) or self.constraint is not None

    @property
    def counts_tokens(self) -> bool:
        """Whether a penalty depends on how often a token is in the answer."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model alone found a token: before bias, penalties, masks and temperature."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """the likeliest tokens and their log-probabilities, likeliest first"""


@dataclass(frozen=True)
class Event:
    """What one step brought to one request."""

    ticket: Ticket
    token_ids: tuple[int, ...] = ()
    """new tokens of the answer; a token that ends it is not among them"""
    text: str = ""
    """whole characters, which no stop string can still take back"""
    logprobs: tuple[TokenLogprob, ...] = ()
    """one for each of `token_ids` if the request asked for them"""
    finish_reason: str | None = None
    """with the last event: "stop", "length", "cancelled" or "error" """
    error: str = ""
    """one line of what went wrong; empty unless the reason is "error" """


def joined(events: Sequence[Event]) -> Event:
    """Events of one ticket that followed each other as one."""
    return replace(
        events[-1],
        token_ids=tuple(token_id for event in events for token_id in event.token_ids),
        text="".join(event.text for event in events),
        logprobs=tuple(logprob for event in events for logprob in event.logprobs),
    )


class Ticket:
    """A request that was accepted; iterate over it for its events, up to the last one, while a thread steps.

    Args:
        listener: called with each event in the scheduler's thread, in place of keeping it for iteration. It must be
            quick. If it raises, the request is cancelled.

    Attributes:
        prompt_logprobs: of the prompt's second and later tokens, if asked for; complete with the first event.
        num_cached: tokens of the prompt that were known already.
        answer_state: of the request's constraint; None if it has none.
    """

    def __init__(self, request: Request, listener: Callable[[Event], None] | None = None) -> None:
        self.request = request
        self.answer_state = request.constraint.start(request.stop_ids) if request.constraint else None
        self.is_cancelled = False
        self.is_done = False
        self.prompt_logprobs: list[TokenLogprob] = []
        self.num_cached = 0
        self._kept: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._listener = listener or self._kept.put

    def deliver(self, event: Event) -> None:
        """Hand the event to whoever waits for it."""
        self.is_done = event.finish_reason is not None
        try:
            self._listener(event)
        except Exception:  # whatever it was, nobody reads on, and the other requests must not suffer
            self.is_cancelled = True

    def __iter__(self) -> Iterator[Event]:
        while True:
            event = self._kept.get()
            yield event
            if event.finish_reason is not None:
                return


def one_line(error: Exception) -> str:
    """What an error says first; its kind, if it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
