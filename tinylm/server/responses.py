"""POST /v1/responses: OpenAI's newer form of a conversation, for text. Nothing is stored between two requests."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from sse_starlette.sse import EventSourceResponse

from tinylm.server.answers import Answer, Answers
from tinylm.server.errors import STREAM, ApiError
from tinylm.server.forms import grammar_of
from tinylm.server.json_body import json_router
from tinylm.server.prompts import chat_prompt, requests_of, sampling_settings
from tinylm.server.replies import event_stream, unless_gone
from tinylm.server.schemas import ChatMessage, ResponsesRequest
from tinylm.server.state import state_of

router = json_router()


@router.post("/v1/responses", response_model=None, responses=STREAM)
async def create_response(body: ResponsesRequest, request: Request) -> dict[str, Any] | EventSourceResponse:
    """Answer a text or a conversation."""
    state = state_of(request)
    model = state.models.named(body.model)
    prompt = await chat_prompt(model, _messages(body), state.settings, param="input")
    requests = requests_of(model, [prompt], body, state.settings, body.max_output_tokens, await grammar_of(model, body))
    answers = Answers(model, requests, state.metrics, state.settings.request_timeout)
    response = _Response(body, model.name)
    if body.stream:
        await answers.submit()
        return event_stream(answers, _events(answers, response), has_names=True)
    async with answers:
        (answer,) = await unless_gone(request, answers.complete())
    return response.finished(answers, answer)


def _messages(body: ResponsesRequest) -> list[ChatMessage]:
    messages = [ChatMessage(role="system", content=body.instructions)] if body.instructions else []
    return messages + ([ChatMessage(role="user", content=body.input)] if isinstance(body.input, str) else body.input)


class _Response:
    """The response object, before and after the answer is there."""

    def __init__(self, body: ResponsesRequest, model: str) -> None:
        self.item_id = f"msg_{uuid.uuid4().hex}"
        settings = sampling_settings(body, None)
        text_format = body.text.format if body.text else None
        self._fields = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "text": {"format": text_format.model_dump(by_alias=True) if text_format else {"type": "text"}},
            "metadata": body.metadata or {},
            "user": body.user,
            "truncation": "disabled",
            "store": False,
            "background": False,
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
        }

    def begun(self) -> dict[str, Any]:
        """Before the first token."""
        return self._with("in_progress", [], None)

    def failed(self, error: ApiError) -> dict[str, Any]:
        """When no answer came."""
        return self._with("failed", [], None) | {"error": {"code": "server_error", "message": error.message}}

    def finished(self, answers: Answers, answer: Answer) -> dict[str, Any]:
        """With the answer."""
        (prompt,) = (request.prompt for request in answers.requests)
        usage = {
            "input_tokens": len(prompt),
            "input_tokens_details": {"cached_tokens": answers.tickets[0].num_cached},
            "output_tokens": len(answer.token_ids),
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": len(prompt) + len(answer.token_ids),
        }
        is_whole = answer.finish_reason == "stop"
        response = self._with("completed" if is_whole else "incomplete", [self.item(answer)], usage)
        return response if is_whole else response | {"incomplete_details": {"reason": "max_output_tokens"}}

    def item(self, answer: Answer | None = None) -> dict[str, Any]:
        """The message; without an answer, as it begins."""
        status = "in_progress" if answer is None else "completed" if answer.finish_reason == "stop" else "incomplete"
        content = [] if answer is None else [self.part(answer.text)]
        return {"type": "message", "id": self.item_id, "status": status, "role": "assistant", "content": content}

    @staticmethod
    def part(text: str) -> dict[str, Any]:
        """The text of the message."""
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _with(self, status: str, output: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        rest = {"output": output, "usage": usage, "error": None, "incomplete_details": None}
        return {**self._fields, "status": status, **rest}


async def _events(answers: Answers, response: _Response) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream, numbered, from `response.created` to `response.completed`."""
    number = 0
    async for event in _unnumbered(answers, response):
        yield {**event, "sequence_number": number}
        number += 1


async def _unnumbered(answers: Answers, response: _Response) -> AsyncIterator[dict[str, Any]]:
    item = {"item_id": response.item_id, "output_index": 0}
    content = {**item, "content_index": 0}
    answer = Answer()
    yield {"type": "response.created", "response": response.begun()}
    yield {"type": "response.in_progress", "response": response.begun()}
    yield {"type": "response.output_item.added", "output_index": 0, "item": response.item()}
    yield {"type": "response.content_part.added", **content, "part": response.part("")}
    try:
        async for _, event in answers:
            answer.add(event)
            if event.text:
                yield {"type": "response.output_text.delta", **content, "delta": event.text, "logprobs": []}
    except ApiError as error:
        yield {"type": "response.failed", "response": response.failed(error)}
        return
    yield {"type": "response.output_text.done", **content, "text": answer.text, "logprobs": []}
    yield {"type": "response.content_part.done", **content, "part": response.part(answer.text)}
    yield {"type": "response.output_item.done", "output_index": 0, "item": response.item(answer)}
    finished = response.finished(answers, answer)
    yield {"type": f"response.{finished['status']}", "response": finished}
