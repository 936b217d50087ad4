"""What a server must refuse at once, in OpenAI's shape, without memory, and without harm to the next request."""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.serving import Server

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
SOON = 0.1
"""Seconds for a refusal: the best of three tries, as another program may hold the processor during one."""
MANY = 100_000


def chat(**fields: Any) -> str:
    return json.dumps({"messages": [{"role": "user", "content": "Größe?"}], **fields})


def resident() -> int:
    """Memory of this process in bytes."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs Linux's /proc")
    return 1024 * int(status.read_text().split("VmRSS:")[1].split()[0])


@pytest.fixture(autouse=True)
def _unharmed(server: Server) -> Iterator[None]:
    """After each test, the server is as it was."""
    before = resident()
    yield
    assert resident() - before < 48 * 2**20
    assert server.get("/health").json() == {"status": "ok"}
    assert server.figure("vllm:num_requests_running") == server.figure("vllm:num_requests_waiting") == 0
    assert server.post(CHAT, {"messages": [{"role": "user", "content": "Noch da?"}], "max_tokens": 1}).is_success


BODIES: dict[str, tuple[str, str | bytes]] = {
    "no body": (CHAT, b""),
    "null": (CHAT, "null"),
    "a list": (CHAT, "[]"),
    "a text": (CHAT, '"messages"'),
    "half": (CHAT, chat()[:-3]),
    "no UTF-8": (CHAT, b'{"messages": "\xff\xfe"}'),
    "UTF-16": (CHAT, chat().encode("utf-16")),
    "a byte order mark": (CHAT, b"\xef\xbb\xbf" + chat().encode()),
    "deep lists": (CHAT, "[" * 100_000),
    "deep objects": (CHAT, '{"a":' * 50_000 + "1" + "}" * 50_000),
    "deep messages": (CHAT, '{"messages":' + "[" * 900 + "]" * 900 + "}"),
    "deep, but not too deep": (CHAT, '{"messages":' + "[" * 60 + "]" * 60 + "}"),
    "NaN": (CHAT, chat(temperature=math.nan)),
    "infinity": (CHAT, chat(top_p=math.inf)),
    "1e999": (CHAT, chat(temperature=7).replace("7", "1e999")),
    "5,000 digits": (CHAT, chat(seed=7).replace("7", "7" * 5000)),
    "duplicate keys": (CHAT, chat()[:-1] + ', "temperature": 0, "temperature": 1}'),
    "duplicate keys below": (CHAT, '{"messages": [{"role": "user", "content": "a", "content": "b"}]}'),
    "a lone surrogate": (CHAT, '{"messages": [{"role": "user", "content": "\\ud83d"}]}'),
    "a lone surrogate as a name": (CHAT, chat()[:-1] + ', "\\udc00": 1}'),
    "a surrogate's bytes": (CHAT, b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}'),
    "n is a billion": (CHAT, chat(n=10**9)),
    "n is huge": (CHAT, chat(n=10**30)),
    "n is 0": (CHAT, chat(n=0)),
    "n is 1.5": (CHAT, chat(n=1.5)),
    "n is true": (CHAT, chat(n=True)),
    "10,000 stops": (CHAT, chat(stop=[f"ü{i}" for i in range(10_000)])),
    "an empty stop": (CHAT, chat(stop=["x", ""])),
    "stops of another kind": (CHAT, chat(stop=[1] * MANY)),
    "max_tokens 0": (CHAT, chat(max_tokens=0)),
    "max_tokens huge": (CHAT, chat(max_tokens=10**30)),
    "max_tokens negative": (CHAT, chat(max_tokens=-1)),
    "a seed out of range": (CHAT, chat(seed=2**63)),
    "a long prompt": (CHAT, json.dumps({"messages": [{"role": "user", "content": "Größe " * 300}]})),
    "a very long prompt": (CHAT, json.dumps({"messages": [{"role": "user", "content": "x" * 3_900_000}]})),
    "many messages": (CHAT, json.dumps({"messages": [{"role": "user", "content": ""}] * 1500})),
    "many wrong messages": (CHAT, json.dumps({"messages": [0] * MANY})),
    "many unknown fields": (CHAT, chat(**{f"ü{i}": 1 for i in range(MANY // 2)})),
    "many unknown fields below": (
        CHAT, json.dumps({"messages": [{"role": "user", "content": "", **{f"x{i}": 1 for i in range(MANY // 2)}}]}),
    ),
    "much metadata": (CHAT, chat(metadata={f"k{i}": i for i in range(MANY // 2)})),
    "much bias": (CHAT, chat(logit_bias={f"k{i}": i for i in range(MANY // 2)})),
    "bias for a strange token": (CHAT, chat(logit_bias={"6400": 1})),
    "bias for no token": (CHAT, chat(logit_bias={"-1": 1})),
    "bias too large": (CHAT, chat(logit_bias={"5": 101})),
    "more values than allowed": (CHAT, "[" + "0," * 300_000 + "0]"),
    "empty text parts": (CHAT, json.dumps({"messages": [{"role": "user", "content": [{"type": "text"}]}]})),
    "a model of another kind": (CHAT, chat(model=["tiny"])),
    "an empty model": (CHAT, chat(model="")),
    "an empty prompt": (COMPLETIONS, '{"prompt": []}'),
    "an empty prompt of two": (COMPLETIONS, '{"prompt": [[1], []]}'),
    "a prompt of fractions": (COMPLETIONS, json.dumps({"prompt": [0.5] * MANY})),
    "a prompt of too many ids": (COMPLETIONS, json.dumps({"prompt": [5] * MANY})),
    "too many prompts": (COMPLETIONS, json.dumps({"prompt": ["ü"] * 65})),
    "too many answers": (COMPLETIONS, json.dumps({"prompt": ["ü"] * 60, "n": 2})),
    "a prompt as long as the context": (COMPLETIONS, json.dumps({"prompt": [5] * 256})),
    "too much input": (RESPONSES, json.dumps({"input": "Größe " * 400})),
    "no input": (RESPONSES, '{"input": []}'),
    "a token that is none": ("/detokenize", '{"tokens": [6400]}'),
    "negative tokens": ("/detokenize", '{"tokens": [-1]}'),
    "text and chat": ("/tokenize", json.dumps({"prompt": "a", "messages": [{"role": "user", "content": "b"}]})),
    "neither": ("/tokenize", "{}"),
}  # fmt: skip


def send(server: Server, path: str, body: str | bytes, content_type: str = "application/json") -> Any:
    raw = body.encode() if isinstance(body, str) else body
    return server.post(path, content=raw, headers={"content-type": content_type})


def assert_refused(answer: Any, *statuses: int) -> dict[str, Any]:
    assert answer.status_code in (statuses or (400, 404)), answer.text[:500]
    assert answer.headers["content-type"] == "application/json"
    (error,) = answer.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"] and len(error["message"]) < 400
    assert error["type"] in ("invalid_request_error", "not_found_error", "permission_error")
    return error


@pytest.mark.parametrize("name", BODIES)
def test_each_is_refused_at_once(server, name):
    path, body = BODIES[name]
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        answer = send(server, path, body)
        times.append(time.perf_counter() - begun)
        assert_refused(answer)
    assert min(times) < SOON, f"{min(times):.3f} s"


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 5e-324}, {"temperature": 1e-40}, {"temperature": 1e300}, {"temperature": 2}, {"top_p": 5e-324},
        {"top_p": 1}, {"min_p": 5e-324}, {"top_k": 2**62}, {"top_k": 1, "min_p": 1}, {"seed": -(2**63)},
        {"seed": 2**63 - 1}, {"repetition_penalty": 0.01}, {"repetition_penalty": 100}, {"presence_penalty": -2},
        {"frequency_penalty": 2}, {"logit_bias": {"7": -100, "8": 100}}, {"max_tokens": 2**62}, {"n": 9},
        {"stop": ["\x00", "\ufffd", "🐉"]}, {"user": "\x00"}, {"metadata": {"🐉": "\x00"}},
        {"temperature": 1e-40, "top_p": 1e-40, "min_p": 1.0, "repetition_penalty": 100.0, "frequency_penalty": -2},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_only_strange_is_answered(server, fields):
    answer = send(server, CHAT, chat(**{"max_tokens": 4, **fields}))
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "content", ["", " ", "\n", "<|im_end|>", "<|endoftext|>" * 9, "\x00", "\u202e", "\ufeff", "\ufdd0"]
)
def test_texts_of_nothing_are_answered(server, content):
    answer = server.post(CHAT, {"messages": [{"role": "user", "content": content}], "max_tokens": 2})
    assert answer.status_code == 200, answer.text
    for path, name in ((COMPLETIONS, "prompt"), (RESPONSES, "input")):
        assert server.post(path, {name: content}).status_code == 200


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "a/b/c", "json"]
)
def test_other_kinds_of_content_are_refused(server, kind):
    """A form of a page can send these without asking; JSON it cannot."""
    error = assert_refused(send(server, CHAT, chat(), kind))
    assert "application/json" in error["message"]
    assert send(server, CHAT, chat(max_tokens=1), "application/json; charset=utf-8").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nichts", 404), ("POST", "/v1", 404), ("GET", "/v1/gr%C3%B6%C3%9Fe", 404), ("GET", "/%ff%00", 404),
        ("GET", "/v1/models/gr%C3%B6%C3%9Fe", 404), ("GET", "/../../etc/passwd", 404),
        ("GET", CHAT, 405), ("DELETE", CHAT, 405), ("PATCH", "/v1/models", 405), ("POST", "/health", 405),
        ("PUT", COMPLETIONS, 405), ("OPTIONS", CHAT, 405), ("TRACE", "/health", 405), ("BREW", "/health", 405),
    ],
)  # fmt: skip
def test_routes_and_methods_that_do_not_exist(server, method, path, status):
    connection = server.connect(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    head, _, body = received(connection).partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode()), head
    assert json.loads(body)["error"]["message"]
    assert (b"allow:" in head.lower()) == (status == 405)


def test_head_has_no_body(server):
    for path in ("/health", CHAT, "/nichts"):
        connection = server.connect(f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        head, _, body = received(connection).partition(b"\r\n\r\n")
        assert head.startswith((b"HTTP/1.1 404", b"HTTP/1.1 405")) and body == b""


@pytest.mark.parametrize(
    "raw",
    [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET\r\n\r\n",
     b"GET / HTTP/1.1\r\nbad header\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
     b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
     b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
     b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 2**20 + b"\r\n\r\n"],
)  # fmt: skip
def test_what_is_no_http_is_refused_in_the_same_shape(server, raw):
    head, _, body = received(server.connect(raw)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and b"application/json" in head
    assert json.loads(body)["error"]["code"] == "invalid_http"


def received(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    parts = []
    with connection:
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize("is_chunked", [False, True], ids=["declared", "chunked"])
def test_a_body_of_100_mb(server, is_chunked):
    """The client that sends on to the end reads why it was refused, and so does the one that looks at once."""
    piece = b" " * 2**20
    head = HEAD + (b"Transfer-Encoding: chunked\r\n\r\n" if is_chunked else b"Content-Length: 104857600\r\n\r\n")
    framed = b"100000\r\n" + piece + b"\r\n" if is_chunked else piece
    connection = server.connect(head)
    before = resident()
    begun = time.perf_counter()
    sent = 0
    with connection:
        try:
            for _ in range(100):
                connection.sendall(framed)
                sent += 1
        except ConnectionError:
            pass
        answer = connection.recv(65536)
    assert sent == 100 and resident() - before < 16 * 2**20
    assert answer.startswith(b"HTTP/1.1 413 ") and b'"body_too_large"' in answer
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        with server.connect(head, *[framed] * (6 if is_chunked else 0)) as connection:
            assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")
        times.append(time.perf_counter() - begun)
    assert min(times) < SOON


def test_a_body_that_never_ends_is_cut_off(server):
    connection = server.connect(HEAD + b"Content-Length: 104857600\r\n\r\n")
    begun = time.monotonic()
    with connection, pytest.raises(ConnectionError):
        while time.monotonic() - begun < 30:
            connection.sendall(b" " * 4096)
            time.sleep(0.01)
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("length", [b"1e3", b"99999999999999999999999999", b"0x10", "１".encode()])
def test_lengths_that_are_none(server, length):
    answer = received(server.connect(HEAD + b"Connection: close\r\nContent-Length: " + length + b"\r\n\r\n"))
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 413 ")) and b'"error"' in answer


def test_what_is_refused_says_why(server):
    """By the name of the field, with the value as it was sent."""
    ask = {"messages": [{"role": "user", "content": "Größe?"}]}
    for body, message in (
        ({**ask, "tools": [{"type": "function"}]}, "tools is not supported here; leave it out; /docs lists what is"),
        ({**ask, "stop": ""}, "a stop string is empty"),
        ({**ask, "n": 73}, "1 prompts with n = 73; expected at most 64 answers in all"),
        ({**ask, "temperature": None, "top_p": False}, "top_p is false: input should be a valid number"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content is null: input should be"),
    ):
        answer = server.post("/v1/chat/completions", body)
        assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(message)
