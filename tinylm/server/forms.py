"""The form that an answer must have: from a body's fields to a grammar."""

from __future__ import annotations

from functools import cache
from typing import Any

import anyio.to_thread

from tinylm.generation.constraints import Grammar, GrammarCompiler
from tinylm.server.errors import ApiError, refused
from tinylm.server.schemas import JsonFormat, NamedSchemaFormat, Sampling, SchemaFormat, StructuredOutputs, TextFormat
from tinylm.server.served_models import ServedModel

_compiler = cache(GrammarCompiler)
"""One for each tokenizer and size of vocabulary."""


async def grammar_of(model: ServedModel, body: Sampling) -> Grammar | None:
    """What the body's `response_format`, `structured_outputs` or `text.format` asks for; None for any text.

    Raises:
        ApiError: two of them are given, or the form cannot be used.
    """
    text = getattr(body, "text", None)
    given: dict[str, Any] = {
        "response_format": getattr(body, "response_format", None),
        "structured_outputs": getattr(body, "structured_outputs", None),
        "text.format": text.format if text else None,
    }
    asked = {name: form for name, form in given.items() if form is not None and not isinstance(form, TextFormat)}
    if not asked:
        return None
    if len(asked) > 1:
        raise ApiError(400, f"{' and '.join(asked)} both say what an answer must be; send one", code="invalid_value")
    ((param, form),) = asked.items()
    compiler = _compiler(model.tokenizer, model.scheduler.model.config.vocab_size)
    try:
        return await anyio.to_thread.run_sync(_grammar, compiler, form)
    except ValueError as error:
        raise refused(error, param) from None


def _grammar(compiler: GrammarCompiler, form: Any) -> Grammar:
    if isinstance(form, JsonFormat):
        return compiler.json_object()
    if isinstance(form, SchemaFormat):
        return compiler.json_schema(form.json_schema.json_schema)
    if isinstance(form, NamedSchemaFormat):
        return compiler.json_schema(form.json_schema)
    assert isinstance(form, StructuredOutputs)
    chosen = {name: value for name, value in form if value is not None}
    if len(chosen) != 1:
        raise ValueError(f"structured_outputs has {len(chosen)} forms; expected one of json, regex and choice")
    if form.json_schema is not None:
        return compiler.json_schema(form.json_schema)
    return compiler.regex(form.regex) if form.regex is not None else compiler.choices(form.choice or [])
