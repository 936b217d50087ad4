"""The description in /openapi.json, and schemathesis, which makes requests from it: good ones and bad ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.server.serving import Server, running, settings_for

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
    response_headers_conformance, allow_header_conformance,
]  # fmt: skip
"""Of its other checks, `positive_data_acceptance` does not fit: whether a prompt is too long for the model, a name that
of a model, and a token one of its tokens, no schema says. Those on resources and keys need routes that create, and
keys; tests/server/test_gate.py looks at keys."""
ROUTES = ["/health", "/metrics", "/v1/models", "/v1/models/{name}", "/tokenize", "/detokenize", "/v1/completions",
          "/v1/chat/completions", "/v1/responses"]  # fmt: skip


@pytest.fixture(scope="module")
def described(model_folder: Path) -> Iterator[tuple[Server, Any]]:
    with running(settings_for(model_folder, context_length=24)) as server:
        yield server, schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def try_route(described: tuple[Server, Any], path: str, mode: GenerationMode, count: int) -> None:
    server, schema = described
    (operation,) = (found.ok() for found in schema.get_all_operations() if found.ok().path == path)
    checks = [*CHECKS, negative_data_rejection] if mode is GenerationMode.NEGATIVE else CHECKS

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(case: Any) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(
            case.body, dict
        ):  # one answer of few tokens tells what many tell
            case.body.update({name: 2 for name in ("max_tokens", "max_output_tokens") if name in case.body})
        case.call_and_validate(base_url=server.url, checks=checks)

    check()
    assert server.get("/health").status_code == 200


def has_negatives(path: str) -> bool:
    return path not in ("/health", "/metrics", "/v1/models")


@pytest.mark.parametrize("path", ROUTES)
def test_good_requests(described, path):
    try_route(described, path, GenerationMode.POSITIVE, 25)


@pytest.mark.parametrize("path", [path for path in ROUTES if has_negatives(path) and "{" not in path])
def test_bad_requests(described, path):
    try_route(described, path, GenerationMode.NEGATIVE, 25)


@pytest.mark.long
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("path", [path for path in ROUTES if has_negatives(path) and "{" not in path])
def test_many_requests(described, path, mode):
    try_route(described, path, mode, 1500)


def test_the_description_names_every_route_and_its_errors(described):
    server, _ = described
    document = server.get("/openapi.json").json()
    assert set(ROUTES) <= set(document["paths"])
    for path in ROUTES:
        for operation in document["paths"][path].values():
            assert operation["description"] or operation["summary"]
            assert "422" not in operation["responses"] and {"200", "4XX", "5XX"} <= set(operation["responses"])
            refused = operation["responses"]["4XX"]["content"]["application/json"]["schema"]
            assert refused == {"$ref": "#/components/schemas/ErrorBody"}
    fields = document["components"]["schemas"]["ChatRequest"]
    assert fields["additionalProperties"] is False and "messages" in fields["required"]
