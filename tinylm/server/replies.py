"""What both routes of completions send back: a stream of server-sent events, and an answer that nobody waits for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from fastapi import Request as HttpRequest
from sse_starlette.sse import EventSourceResponse

from tinylm.generation.request import TokenLogprob
from tinylm.server.answers import Answers
from tinylm.server.errors import ApiError
from tinylm.tokenizer.tokenizer import Tokenizer

DONE = "[DONE]"
PATIENCE = 30.0
"""Seconds that a client may leave what it asked for unread."""


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """How many tokens were read and written."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as text; one that is no whole characters as OpenAI writes it, such as `bytes:\\xe4\\xbd`."""
    spelt = token_bytes(tokenizer, token_id)
    try:
        return spelt.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelt)


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """The bytes of a token; none for a row of the model that the tokenizer has no entry for."""
    return tokenizer.token_bytes(token_id) if token_id < tokenizer.vocab_size else b""


def likeliest(tokenizer: Tokenizer, found: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens with their log-probabilities, and the one that was taken."""
    top = {token_text(tokenizer, token_id): logprob for token_id, logprob in found.top}
    return {token_text(tokenizer, found.token_id): found.logprob} | top


def event_stream(
    answers: Answers, events: AsyncIterator[dict[str, Any]], has_names: bool = False
) -> EventSourceResponse:
    """The events as they come. The answers have been submitted; they are cancelled when the client leaves.

    Args:
        has_names: whether each event has its type as a name, and no [DONE] follows the last.
    """

    async def lines() -> AsyncIterator[dict[str, str]]:
        try:
            async for event in events:
                data = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
                yield {"data": data, "event": event["type"]} if has_names else {"data": data}
        except ApiError as error:
            yield {"data": json.dumps(error.content)}
        finally:
            answers.cancel()
        if not has_names:
            yield {"data": DONE}

    return EventSourceResponse(lines(), sep="\n", send_timeout=PATIENCE, headers={"Cache-Control": "no-cache"})


async def unless_gone(request: HttpRequest, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of `work`, which is cancelled if the client leaves before it is there."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "the client left")
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
