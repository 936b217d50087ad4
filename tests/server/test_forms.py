"""Answers in a given form, from a model that never learnt one: JSON, a schema, a regular expression, a choice."""

from __future__ import annotations

import json
import re
import time
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from tests.server.serving import Server
from tests.server.test_bad_input import SOON

MESSAGES = [{"role": "user", "content": "Größe der 三 Äpfel?"}]
SCHEMA = {
    "type": "object",
    "properties": {"größe": {"type": "integer", "minimum": 0, "maximum": 99}, "art": {"enum": ["rot", "grün 🐉"]}},
    "required": ["größe", "art"],
    "additionalProperties": False,
}


class Apple(BaseModel):
    size: Literal[1, 2, 3]
    is_red: bool


def ask(server: Server, path: str = "/v1/chat/completions", **body: Any) -> Any:
    given = {"/v1/completions": {"prompt": "Äpfel: "}, "/v1/responses": {"input": "Äpfel?"}}
    return server.post(path, {**given.get(path, {"messages": MESSAGES}), "temperature": 1.0, **body})


def text_of(answer: Any) -> str:
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert choice["finish_reason"] == "stop"
    return choice["message"]["content"] if "message" in choice else choice["text"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_schema(server, path, seed):
    form = {"type": "json_schema", "json_schema": {"name": "apfel", "strict": True, "schema": SCHEMA}}
    found = json.loads(text_of(ask(server, path, response_format=form, seed=seed, max_tokens=200)))
    assert set(found) == {"größe", "art"} and 0 <= found["größe"] <= 99 and found["art"] in ("rot", "grün 🐉")
    same = json.loads(text_of(ask(server, path, structured_outputs={"json": SCHEMA}, seed=seed, max_tokens=200)))
    assert same == found


def test_openais_parse(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        found = client.chat.completions.parse(model="tiny", messages=MESSAGES, response_format=Apple, seed=3)
        assert isinstance(found.choices[0].message.parsed, Apple)
        response = client.responses.parse(model="tiny", input=MESSAGES, text_format=Apple)
        assert isinstance(response.output_parsed, Apple)


def test_a_regex_and_a_choice(server):
    pattern = r"[A-Z]{2}-\d{3}|[äöü]{4}"
    for seed in range(4):
        assert re.fullmatch(pattern, text_of(ask(server, structured_outputs={"regex": pattern}, seed=seed)))
    choices = ["ja", "nein", "vielleicht 🐉"]
    found = {text_of(ask(server, structured_outputs={"choice": choices}, seed=seed, top_p=1)) for seed in range(8)}
    assert found <= set(choices) and len(found) > 1


def test_in_a_stream_and_for_several(server):
    answer = ask(server, structured_outputs={"choice": ["语言", "Größe"]}, stream=True, n=3, seed=1)
    texts = ["", "", ""]
    for line in answer.text.split("\n"):
        if line.startswith("data: {"):
            (choice,) = json.loads(line[6:])["choices"]
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert set(texts) <= {"语言", "Größe"}


NO_FORMS: dict[str, dict[str, Any]] = {
    "two of them": {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
    "two in one": {"structured_outputs": {"regex": "a", "choice": ["b"]}},
    "none in one": {"structured_outputs": {}},
    "no regex": {"structured_outputs": {"regex": "(a"}},
    "an empty choice": {"structured_outputs": {"choice": []}},
    "an unknown form": {"response_format": {"type": "yaml"}},
    "no schema": {"response_format": {"type": "json_schema"}},
    "a schema of nothing": {"structured_outputs": {"json": {"type": "größe"}}},
    "a schema from elsewhere": {"structured_outputs": {"json": {"$ref": "http://127.0.0.1:1/x.json"}}},
    "a file": {"structured_outputs": {"json": {"$ref": "file:///etc/passwd"}}},
    "a schema that nothing fits": {"structured_outputs": {"json": {"type": "integer", "minimum": 3, "maximum": 2}}},
    "a regex that explodes": {"structured_outputs": {"regex": "((a{1,900}){1,900}){1,900}"}},
    "a regex of many states": {"structured_outputs": {"regex": "(a|b|ab)*c.{60000}"}},
    "many choices": {"structured_outputs": {"choice": ["ü" * 900] * 900}},
    "a regex that is long": {"structured_outputs": {"regex": "a" * 100_000}},
}


@pytest.mark.parametrize("name", NO_FORMS)
def test_forms_that_cannot_be_used(server, name):
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        answer = ask(server, **NO_FORMS[name])
        times.append(time.perf_counter() - begun)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert "\n" not in error["message"] and len(error["message"]) < 400
    assert min(times) < SOON
    assert server.get("/health").status_code == 200


@pytest.mark.parametrize(
    "regex", ["(a+)+b", "(a|aa)*c", "(.*a){30}", "(a|b)*a(a|b){16}", "[^x]*x{300}", "(?:(?:a|b|c)*d){40}"]
)
def test_a_regex_that_is_dear_ends(server, regex):
    """It is answered, or it fails alone; others are answered meanwhile."""
    begun = time.perf_counter()
    answer = ask(server, structured_outputs={"regex": regex}, max_tokens=60)
    assert answer.status_code in (200, 400, 500) and time.perf_counter() - begun < 10
    assert text_of(ask(server, structured_outputs={"choice": ["ja"]})) == "ja"
