"""POST /v1/chat/completions: a conversation in, the assistant's next message out."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request
from sse_starlette.sse import EventSourceResponse

from tinylm.generation.request import TokenLogprob
from tinylm.server.answers import Answer, Answers
from tinylm.server.errors import STREAM, ApiError
from tinylm.server.forms import grammar_of
from tinylm.server.json_body import json_router
from tinylm.server.prompts import chat_prompt, requests_of
from tinylm.server.replies import event_stream, token_bytes, token_text, unless_gone, usage
from tinylm.server.schemas import ChatRequest
from tinylm.server.state import state_of
from tinylm.tokenizer.tokenizer import Tokenizer

router = json_router()


@router.post("/v1/chat/completions", response_model=None, responses=STREAM)
async def chat_completions(body: ChatRequest, request: Request) -> dict[str, Any] | EventSourceResponse:
    """Answer a conversation."""
    state = state_of(request)
    model = state.models.named(body.model)
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiError(400, "max_tokens and max_completion_tokens are one setting; send one", "max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs without logprobs; set logprobs to true", "top_logprobs", "invalid_value")
    prompt = await chat_prompt(model, body.messages, state.settings)
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    requests = requests_of(model, [prompt], body, state.settings, limit, await grammar_of(model, body), num_logprobs)
    answers = Answers(model, requests, state.metrics, state.settings.request_timeout)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model.name}
    if body.stream:
        await answers.submit()
        return event_stream(answers, _chunks(answers, head, body))
    async with answers:
        complete = await unless_gone(request, answers.complete())
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": _logprobs(model.tokenizer, answer.logprobs) if body.logprobs else None,
            "finish_reason": answer.finish_reason,
        }
        for index, answer in enumerate(complete)
    ]
    return {**head, "object": "chat.completion", "choices": choices, "usage": _usage(prompt, complete)}


async def _chunks(answers: Answers, head: dict[str, Any], body: ChatRequest) -> AsyncIterator[dict[str, Any]]:
    """The first chunk of an answer names the role, and the last the reason for its end."""
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    rest = {"usage": None} if with_usage else {}

    def chunk(index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**head, "object": "chat.completion.chunk", "choices": [choice], **rest}

    complete = [Answer() for _ in answers.requests]
    for index in range(len(complete)):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for index, event in answers:
        complete[index].add(event)
        if event.text or event.logprobs:
            logprobs = _logprobs(answers.model.tokenizer, event.logprobs) if body.logprobs else None
            yield chunk(index, {"content": event.text}, logprobs)
        if event.finish_reason:
            yield chunk(index, {}, None, event.finish_reason)
    if with_usage:
        yield {
            **head,
            "object": "chat.completion.chunk",
            "choices": [],
            "usage": _usage(answers.requests[0].prompt, complete),
        }


def _usage(prompt: Sequence[int], answers: list[Answer]) -> dict[str, int]:
    return usage(len(prompt), sum(len(answer.token_ids) for answer in answers))


def _logprobs(tokenizer: Tokenizer, found: Sequence[TokenLogprob]) -> dict[str, Any]:
    """How likely each token was, and which were likeliest, in the shape of a chat's logprobs."""

    def shown(token_id: int, logprob: float) -> dict[str, Any]:
        spelt = token_bytes(tokenizer, token_id)
        return {"token": token_text(tokenizer, token_id), "logprob": logprob, "bytes": list(spelt)}

    content = [
        {**shown(each.token_id, each.logprob), "top_logprobs": [shown(*pair) for pair in each.top]} for each in found
    ]
    return {"content": content, "refusal": None}
