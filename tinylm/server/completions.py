"""POST /v1/completions: texts or token ids in, what follows them out, with the likelihood of both on request."""

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
from tinylm.server.prompts import requests_of, text_prompt
from tinylm.server.replies import event_stream, likeliest, token_text, unless_gone, usage
from tinylm.server.schemas import CompletionRequest
from tinylm.server.served_models import ServedModel
from tinylm.server.state import state_of
from tinylm.tokenizer.tokenizer import StreamDecoder

DEFAULT_TOKENS = 16
"""OpenAI's limit for an answer that names none."""
router = json_router()


@router.post("/v1/completions", response_model=None, responses=STREAM)
async def completions(body: CompletionRequest, request: Request) -> dict[str, Any] | EventSourceResponse:
    """Continue texts."""
    state = state_of(request)
    model = state.models.named(body.model)
    if body.best_of not in (None, body.num_answers):
        raise ApiError(
            400, f"best_of is {body.best_of}; expected n, which is {body.num_answers}", "best_of", "invalid_value"
        )
    limit = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    if limit == 0 and not body.echo:
        raise ApiError(400, "max_tokens is 0 without echo, so there is nothing to send", "max_tokens", "invalid_value")
    texts = _texts(body, state.settings.max_answers)
    prompts = [await text_prompt(model, each) if isinstance(each, str) else each for each in texts]
    prompt_logprobs = body.logprobs if body.echo else None
    # One token more than none: it is computed and not shown.
    requests = requests_of(
        model,
        prompts,
        body,
        state.settings,
        max(1, limit),
        await grammar_of(model, body),
        body.logprobs,
        prompt_logprobs,
    )
    answers = Answers(model, requests, state.metrics, state.settings.request_timeout)
    head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model.name}
    if body.stream:
        await answers.submit()
        return event_stream(answers, _chunks(answers, head, body, texts))
    async with answers:
        complete = await unless_gone(request, answers.complete())
    shown = _shown(answers, texts, body)
    choices = []
    for index, (part, answer) in enumerate(zip(shown, complete, strict=True)):
        answer = _without_answer(answer) if limit == 0 else answer
        start = part.start(answer.prompt_logprobs)
        text, logprobs = part.piece(answer.text, answer.logprobs)
        choices.append(_choice(index, start[0] + text, _joined(start[1], logprobs), answer.finish_reason))
    return {**head, "object": "text_completion", "choices": choices, "usage": _usage(prompts, complete, limit)}


def _texts(body: CompletionRequest, most: int) -> list[str | list[int]]:
    """The prompts, each a text or token ids."""
    given: Any = body.prompt
    texts = given if isinstance(given, list) and not (given and isinstance(given[0], int)) else [given]
    if not 1 <= len(texts) <= most:
        message = f"{len(texts)} prompts; expected 1 to {most}; send several requests"
        raise ApiError(400, message, "prompt", "invalid_value")
    return texts


async def _chunks(
    answers: Answers, head: dict[str, Any], body: CompletionRequest, texts: Sequence[str | list[int]]
) -> AsyncIterator[dict[str, Any]]:
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    rest = {"usage": None} if with_usage else {}
    limit = body.max_tokens
    shown = _shown(answers, texts, body)
    complete = [Answer() for _ in shown]
    async for index, event in answers:
        is_first = not complete[index].token_ids and not complete[index].text
        complete[index].add(event)
        text, logprobs = "", None
        if is_first and body.echo:
            text, logprobs = shown[index].start(answers.tickets[index].prompt_logprobs)
        if limit != 0:
            piece, found = shown[index].piece(event.text, event.logprobs)
            text, logprobs = text + piece, _joined(logprobs, found)
        reason = ("length" if event.finish_reason else None) if limit == 0 else event.finish_reason
        if text or event.logprobs or reason:
            choice = _choice(index, text, logprobs, reason)
            yield {**head, "object": "text_completion", "choices": [choice], **rest}
    if with_usage:
        prompts = [request.prompt for request in answers.requests[:: body.num_answers]]
        yield {**head, "object": "text_completion", "choices": [], "usage": _usage(prompts, complete, limit)}


def _shown(answers: Answers, texts: Sequence[str | list[int]], body: CompletionRequest) -> list[_Shown]:
    """One for each answer: `n` for each text."""
    places = (place for place in range(len(texts)) for _ in range(body.num_answers))
    pairs = zip(places, answers.requests, strict=True)
    return [_Shown(answers.model, texts[place], request.prompt, body) for place, request in pairs]


class _Shown:
    """A prompt and its answer in the shape of completions: text, and log-probabilities by place in the text.

    Args:
        given: the prompt as it came: a text, or the token ids.
    """

    def __init__(
        self, model: ServedModel, given: str | list[int], prompt: Sequence[int], body: CompletionRequest
    ) -> None:
        self._model, self._prompt, self._body = model, prompt, body
        self._text = given if isinstance(given, str) else model.tokenizer.decode(self._known(given), False)
        # Control tokens are text where the client sent them, and not where we put them.
        self._decoder = StreamDecoder(model.tokenizer, skip_special_tokens=isinstance(given, str))
        self._length = 0

    def start(self, found: Sequence[TokenLogprob]) -> tuple[str, dict[str, Any] | None]:
        """The prompt, if it is asked for. How likely its first token was, nobody knows."""
        if not self._body.echo:
            return "", None
        if self._body.logprobs is None:
            return self._text, None
        first = self._placed([self._prompt[0]])
        rest = self._logprobs(found)
        logprobs = {
            "tokens": [token_text(self._model.tokenizer, self._prompt[0]), *rest["tokens"]],
            "token_logprobs": [None, *rest["token_logprobs"]],
            "top_logprobs": [None, *rest["top_logprobs"]],
            "text_offset": [*first, *rest["text_offset"]],
        }
        return self._text, logprobs

    def piece(self, text: str, found: Sequence[TokenLogprob]) -> tuple[str, dict[str, Any] | None]:
        """A part of the answer."""
        return text, None if self._body.logprobs is None else self._logprobs(found)

    def _logprobs(self, found: Sequence[TokenLogprob]) -> dict[str, Any]:
        tokenizer = self._model.tokenizer
        return {
            "tokens": [token_text(tokenizer, each.token_id) for each in found],
            "token_logprobs": [each.logprob for each in found],
            "top_logprobs": [likeliest(tokenizer, each) for each in found],
            "text_offset": self._placed([each.token_id for each in found]),
        }

    def _placed(self, token_ids: Sequence[int]) -> list[int]:
        """Where each token begins in the text, in characters."""
        places = []
        for token_id in token_ids:
            places.append(self._length)
            self._length += sum(len(self._decoder.feed(known)) for known in self._known([token_id]))
        return places

    def _known(self, token_ids: Sequence[int]) -> list[int]:
        return [token_id for token_id in token_ids if token_id < self._model.tokenizer.vocab_size]


def _choice(index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _joined(one: dict[str, Any] | None, other: dict[str, Any] | None) -> dict[str, Any] | None:
    """The log-probabilities of two pieces that follow each other."""
    return other if one is None else one if other is None else {name: one[name] + other[name] for name in one}


def _without_answer(answer: Answer) -> Answer:
    return Answer(prompt_logprobs=answer.prompt_logprobs, finish_reason="length")


def _usage(prompts: Sequence[Sequence[int]], answers: list[Answer], limit: int | None) -> dict[str, int]:
    written = sum(len(answer.token_ids) for answer in answers) if limit != 0 else 0
    return usage(sum(map(len, prompts)), written)
