"""From a request's fields to answers: prompts to the scheduler, events back to the event loop, as they come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import anyio
import anyio.to_thread

from tinylm.generation.request import Event, PromptTooLong, Request, Ticket, TokenLogprob
from tinylm.server.errors import ApiError, refused
from tinylm.server.metrics import Metrics
from tinylm.server.served_models import ServedModel


@dataclass
class Answer:
    """One answer, once it is complete."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str = ""

    def add(self, event: Event) -> None:
        """Append what a step brought."""
        self.text += event.text
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs
        self.finish_reason = event.finish_reason or self.finish_reason


class Answers:
    """The answers to one HTTP request while they are written; leaving the `async with` block cancels what is not done.

        async with Answers(model, requests, metrics, timeout) as answers:
            async for number, event in answers:
                ...

    `number` is the place in `requests`. The loop ends when all are complete.

    Raises:
        ApiError: a request cannot be answered, the queue is full, the computation failed, or it took too long.
    """

    def __init__(self, model: ServedModel, requests: Sequence[Request], metrics: Metrics, timeout: float) -> None:
        self.model, self.requests = model, requests
        self._metrics, self._timeout = metrics, timeout
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.tickets: list[Ticket] = []
        self._started = time.monotonic()

    async def submit(self) -> Answers:
        """Let the requests wait for their places; whoever calls this must `cancel` in the end."""
        loop = asyncio.get_running_loop()
        try:
            if any(request.constraint for request in self.requests):  # a grammar takes up to a tenth of a second
                await anyio.to_thread.run_sync(self._submit_all, loop)
            else:
                self._submit_all(loop)
        except Exception as error:
            self.cancel()
            raise refused(error, "prompt" if isinstance(error, PromptTooLong) else None) from None
        return self

    def _submit_all(self, loop: asyncio.AbstractEventLoop) -> None:
        for number, request in enumerate(self.requests):

            def listen(event: Event, number: int = number) -> None:  # in the scheduler's thread
                loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

            self.tickets.append(self.model.scheduler.submit(request, listen))

    async def __aenter__(self) -> Answers:
        return await self.submit()

    async def __aexit__(self, *raised: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        """End what is not done; nobody waits for it."""
        for ticket in self.tickets:
            if not ticket.is_done:
                self.model.scheduler.cancel(ticket)
                self._metrics.ended(self.model.name, "cancelled")

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        name = self.model.name
        last = dict.fromkeys(range(len(self.tickets)), self._started)
        begun: set[int] = set()
        deadline = self._started + self._timeout
        while last:
            number, event = await self._next(deadline)
            now = time.monotonic()
            self._metrics.wrote(name, len(event.token_ids), now - last[number], is_first=number not in begun)
            begun.add(number)
            last[number] = now
            if event.finish_reason:
                del last[number]
                self._metrics.ended(name, event.finish_reason, len(self.requests[number].prompt), now - self._started)
            if event.finish_reason == "error":
                raise ApiError(500, event.error, code="computation_failed")
            if event.finish_reason == "cancelled":
                raise ApiError(503, "the server is shutting down; use another", code="shutting_down")
            yield number, event

    async def _next(self, deadline: float) -> tuple[int, Event]:
        try:
            with anyio.fail_after(deadline - time.monotonic()):
                return await self._events.get()
        except TimeoutError:
            message = f"no complete answer within {self._timeout:g} seconds; ask for fewer tokens, or try again later"
            raise ApiError(408, message, code="timeout") from None

    async def complete(self) -> list[Answer]:
        """Wait for all answers."""
        answers = [Answer() for _ in self.requests]
        async for number, event in self:
            answers[number].add(event)
        for answer, ticket in zip(answers, self.tickets, strict=True):
            answer.prompt_logprobs = ticket.prompt_logprobs
        return answers
