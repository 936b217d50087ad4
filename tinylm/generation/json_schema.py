"""What of JSON Schema (draft 2020-12) an answer can be held to; everything else is refused by name.

The library that enforces a schema takes a keyword that it does not know for an annotation. Here such a keyword is an
error: a client who writes `uniqueItems`, or `nullable` as in OpenAPI, must not believe that it holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tinylm.files.untrusted import shown
from tinylm.generation.request import RequestError

MAX_SCHEMA_CHARACTERS = 2**16
"""A schema of this length takes less than 0.1 s to prepare."""
MAX_SCHEMA_DEPTH = 32
"""Schemas within each other."""
MAX_OPTIONAL_PROPERTIES = 400
"""Of one object; the time to prepare them grows with their square."""

_WITH_ONE_SCHEMA = ("items", "additionalItems", "additionalProperties")
_WITH_A_LIST = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_WITH_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_WITH_VALUES = (
    *("$ref", "const", "enum", "type", "minItems", "maxItems", "required", "minProperties", "maxProperties"),
    *("minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    "multipleOf",
)
ANNOTATIONS = (
    *("$schema", "$id", "id", "$anchor", "$comment", "title", "description", "default", "examples", "deprecated"),
    *("readOnly", "writeOnly", "contentMediaType", "contentEncoding"),
)
"""Keywords that by their definition restrict nothing."""
KEYWORDS = (*dict.fromkeys((*_WITH_A_LIST, *_WITH_ONE_SCHEMA, *_WITH_NAMED_SCHEMAS, *_WITH_VALUES)),)
"""Keywords that an answer is held to."""


def schema_text(schema: dict[str, Any] | bool) -> str:
    """The schema as a JSON object's text, if an answer can be held to all of it.

    Raises:
        RequestError: it is not a schema, it is too large or too deep, or has a keyword that cannot be enforced.
    """
    if schema is False:
        raise RequestError("the JSON schema is false, which accepts nothing; expected one that accepts something")
    try:
        text = json.dumps({} if schema is True else schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        reason = "its brackets are too deep" if isinstance(error, RecursionError) else error
        raise RequestError(f"the JSON schema cannot be written as JSON: {reason}; expected plain JSON") from None
    if len(text) > MAX_SCHEMA_CHARACTERS:
        raise RequestError(
            f"the JSON schema has {len(text)} characters; expected at most {MAX_SCHEMA_CHARACTERS}; simplify it"
        )
    _check(schema, "$", MAX_SCHEMA_DEPTH)
    return text


def patterns(schema: Any) -> Iterator[str]:
    """Every regular expression in a schema that `schema_text` accepts."""
    if not isinstance(schema, dict):
        return
    if isinstance(schema.get("pattern"), str):
        yield schema["pattern"]
    yield from schema.get("patternProperties", {})
    for _, child in _children(schema):
        yield from patterns(child)


def _check(schema: Any, where: str, depth: int) -> None:
    if not isinstance(schema, (dict, bool)):
        raise RequestError(f"the JSON schema at {where} is {shown(schema)}; expected an object, true or false")
    if isinstance(schema, bool):
        return
    if not depth:
        raise RequestError(f"the JSON schema is nested deeper than {MAX_SCHEMA_DEPTH} schemas; flatten it")
    for keyword in schema:
        if keyword not in KEYWORDS and keyword not in ANNOTATIONS:
            raise RequestError(
                f"the JSON schema at {where} has {shown(keyword)}, which is not supported; leave it out; supported are "
                f"{', '.join(KEYWORDS)}"
            )
        if keyword in _WITH_NAMED_SCHEMAS and not isinstance(schema[keyword], dict):
            raise RequestError(f"the JSON schema at {where}.{keyword} is {shown(schema[keyword])}; expected an object")
    if isinstance(minimum := schema.get("minProperties"), (int, float)) and minimum > 1:
        raise RequestError(
            f"the JSON schema at {where} has minProperties {minimum}; expected at most 1, as nothing keeps an answer "
            "from writing one name twice; name the properties and require them"
        )
    required = schema.get("required")
    named = set(schema.get("properties", {})).difference(required if isinstance(required, list) else ())
    if len(named) > MAX_OPTIONAL_PROPERTIES:
        raise RequestError(
            f"the JSON schema at {where} has {len(named)} properties that are not required; expected at most "
            f"{MAX_OPTIONAL_PROPERTIES}; require some of them"
        )
    for step, child in _children(schema):
        _check(child, f"{where}.{step}", depth - 1)


def _children(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas directly within a schema, and where they are."""
    for keyword, value in schema.items():
        if keyword in _WITH_NAMED_SCHEMAS:
            yield from ((f"{keyword}.{name}", child) for name, child in value.items())
        elif keyword in _WITH_A_LIST and isinstance(value, list):
            yield from ((f"{keyword}[{number}]", child) for number, child in enumerate(value))
        elif keyword in _WITH_ONE_SCHEMA:
            yield keyword, value
