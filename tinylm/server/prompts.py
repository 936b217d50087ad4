"""From the fields of a body to what the scheduler takes: token ids, settings and constraints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import anyio.to_thread

from tinylm.files.untrusted import is_unicode
from tinylm.generation.constraints import Grammar
from tinylm.generation.request import PromptTooLong, Request
from tinylm.generation.sampling import SamplingSettings
from tinylm.server.errors import ApiError, refused
from tinylm.server.schemas import ChatMessage, Sampling
from tinylm.server.served_models import ServedModel
from tinylm.server.settings import ServeSettings
from tinylm.tokenizer.chat_template import encode_chat
from tinylm.tokenizer.tokenizer import Tokenizer

ENCODED_AT_ONCE = 1 << 14
"""Characters of a text that is encoded while other requests wait (milliseconds); a longer one has a thread."""


@cache
def _longest_token(tokenizer: Tokenizer) -> int:
    """Most bytes of a text that one token holds."""
    return max(len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids)


def _check_text(model: ServedModel, texts: Sequence[str], param: str) -> None:
    """Refuse what cannot be encoded, and what is too long by its mere size, before time goes into it."""
    for text in texts:
        if not is_unicode(text):
            raise ApiError(400, f"{param} has a lone surrogate; expected valid Unicode", param, "invalid_value")
    size = sum(len(text.encode("utf-8")) for text in texts)
    least = math.ceil(size / _longest_token(model.tokenizer))
    most = model.scheduler.context_length
    if least >= most:
        message = f"the prompt has at least {least:,} tokens; expected fewer than {most}; shorten the prompt"
        raise refused(PromptTooLong(message), param)


async def _off_loop(function: Callable[[], list[int]], is_slow: bool) -> list[int]:
    """Its result, from a thread if it is slow: long texts, and templates of strangers."""
    return await anyio.to_thread.run_sync(function) if is_slow else function()


async def chat_prompt(
    model: ServedModel, messages: Sequence[ChatMessage], settings: ServeSettings, param: str = "messages"
) -> list[int]:
    """Token ids of a conversation and the beginning of its answer.

    Args:
        param: the field that the messages came in.

    Raises:
        ApiError: too many messages, no valid Unicode, or the model's template cannot render them.
    """
    if model.why_no_chats:
        message = f"{model.name} answers no chats: {model.why_no_chats}; use /v1/completions"
        raise ApiError(400, message, param, "no_chat_template")
    if len(messages) > settings.max_messages:
        message = f"{len(messages)} messages; expected at most {settings.max_messages}; leave out the oldest"
        raise ApiError(400, message, param, "too_many_messages")
    _check_text(model, [message.text for message in messages], param)
    plain = [message.plain for message in messages]
    try:
        size = sum(len(message["content"]) for message in plain)
        return await _off_loop(
            lambda: encode_chat(model.tokenizer, plain, add_generation_prompt=True)[0],
            is_slow=size > ENCODED_AT_ONCE or model.tokenizer.their_template is not None,
        )
    except ValueError as error:
        raise refused(error, param) from None


async def text_prompt(model: ServedModel, text: str) -> list[int]:
    """Token ids of the beginning of a document.

    Raises:
        ApiError: no valid Unicode, or too long.
    """
    _check_text(model, [text], "prompt")
    return await _off_loop(lambda: model.engine.text_prompt(text), is_slow=len(text) > ENCODED_AT_ONCE)


def sampling_settings(body: Sampling, max_new_tokens: int | None) -> SamplingSettings:
    """How tokens are drawn; None as the limit leaves it to the context."""
    given = {
        name: value
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
        if (value := getattr(body, name, None)) is not None
    }
    given["top_k"] = max(0, given.get("top_k", 0))
    return SamplingSettings(max_new_tokens=2**31 if max_new_tokens is None else max_new_tokens, **given)


def requests_of(
    model: ServedModel,
    prompts: Sequence[list[int]],
    body: Sampling,
    settings: ServeSettings,
    max_new_tokens: int | None,
    grammar: Grammar | None,
    num_logprobs: int | None = None,
    num_prompt_logprobs: int | None = None,
) -> list[Request]:
    """The requests of a body: `n` for each prompt, one after the other.

    Raises:
        ApiError: a value that this model or server does not take.
    """
    n = body.num_answers
    bias = getattr(body, "logit_bias", None) or {}
    penalties: dict[str, Any] = {
        name: getattr(body, name, None) or 0.0 for name in ("presence_penalty", "frequency_penalty")
    }
    most = min(settings.max_answers, settings.max_waiting)  # more would never find room: they come all at once
    if n * len(prompts) > most:
        message = f"{len(prompts)} prompts with n = {n}; expected at most {most} answers in all"
        raise ApiError(400, f"{message}; send several requests", "n", "too_many_answers")
    if len(stops := body.stops) > settings.max_stops:
        message = f"{len(stops)} stop strings; expected at most {settings.max_stops}; use fewer"
        raise ApiError(400, message, "stop", "too_many_stops")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options without stream; set stream to true", "stream_options", "invalid_value")
    try:
        sampling = sampling_settings(body, max_new_tokens)
        return [
            Request(
                prompt,
                sampling,
                stop_ids=model.engine.stop_ids,
                stop_strings=stops,
                number=number,
                logit_bias={int(token_id): value for token_id, value in bias.items()},
                num_logprobs=num_logprobs,
                num_prompt_logprobs=num_prompt_logprobs,
                constraint=grammar,
                **penalties,
            )
            for prompt in prompts
            for number in range(n)
        ]
    except ValueError as error:
        raise refused(error) from None
