"""Clients that connect, stall, send half, and leave: others are answered meanwhile, and nothing of them remains."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.processes import PATIENCE
from tests.server.serving import Server, running, settings_for, slowed, wait_until
from tests.server.test_bad_requests import HEAD, received, resident

LONG = {"messages": [{"role": "user", "content": "Erzähl! 讲 🐉"}], "temperature": 0, "max_tokens": 200}
SHORT = {**LONG, "max_tokens": 3}
FREED = 2.0
"""Seconds until the place of a client that has gone is free."""


def request(body: dict[str, Any], path: str = "/v1/chat/completions") -> bytes:
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}"
    return head.encode() + b"\r\n\r\n" + raw


@pytest.fixture(scope="module")
def crowded(model_folder: Path) -> Iterator[Server]:
    """A server that soon loses its patience."""
    with running(settings_for(model_folder, receive_timeout=1.0, max_waiting=256)) as found:
        yield found


def is_idle(server: Server) -> bool:
    return server.figure("vllm:num_requests_running") + server.figure("vllm:num_requests_waiting") == 0


def bad_client(server: Server, kind: int) -> socket.socket:
    """Connected, and at its worst."""
    whole = request({**LONG, "stream": kind % 2 == 0})
    parts = {
        0: [], 1: [b"POST /v1/chat"], 2: [whole[:90]], 3: [whole[:-7]],
        4: [HEAD + b"Transfer-Encoding: chunked\r\n\r\n5"],
        5: [whole], 6: [whole], 7: [b"\x00" * 100],
    }[kind]  # fmt: skip
    connection = server.connect(*parts)
    if kind == 6:
        connection.recv(100)  # the stream has begun
    return connection


def remains(server: Server) -> tuple[int, int]:
    """Open descriptors of this process, and tasks of the server."""
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    return descriptors, len(asyncio.all_tasks(server.loop))


def test_200_of_them(crowded):
    expected = crowded.post("/v1/chat/completions", SHORT).json()["choices"]
    crowded.post("/v1/chat/completions", {**SHORT, "stream": True})  # the first stream starts a task that stays
    memory = []
    before = remains(crowded)
    for _ in range(3):
        with ThreadPoolExecutor(20) as pool:
            clients = list(pool.map(lambda number: bad_client(crowded, number % 8), range(200)))
        begun = time.monotonic()
        for _ in range(5):
            assert crowded.post("/v1/chat/completions", SHORT).json()["choices"] == expected
            assert crowded.get("/health").status_code == 200
        assert time.monotonic() - begun < 20  # they take their turn among 50 long answers
        for client in clients:
            client.close()
        assert wait_until(lambda: is_idle(crowded)) < FREED
        memory.append(resident())
    wait_until(lambda: all(now <= then for now, then in zip(remains(crowded), before, strict=True)), 20)
    assert memory[2] - memory[1] < 8 * 2**20


@pytest.mark.parametrize("kind", ["stream", "whole", "waiting", "responses", "completions", "n"])
def test_who_leaves_frees_the_place(crowded, kind):
    """The answers would take 10 seconds."""
    body = {**LONG, "stream": kind != "whole", **({"n": 8} if kind == "n" else {})}
    path = {"responses": "/v1/responses", "completions": "/v1/completions"}.get(kind, "/v1/chat/completions")
    if kind == "responses":
        body = {"input": "Erzähl!", "stream": True}
    if kind == "completions":
        body = {"prompt": ["Es", "war"], "max_tokens": 200, "stream": True}
    with slowed(crowded):
        count = 12 if kind == "waiting" else 1
        clients = [crowded.connect(request(body, path)) for _ in range(count)]
        expected = {"waiting": 8, "completions": 2, "n": 8}.get(kind, 1)
        wait_until(lambda: crowded.figure("vllm:num_requests_running") == expected)
        if kind != "whole":
            clients[0].recv(10)
        for client in clients:
            client.close()
        assert wait_until(lambda: is_idle(crowded)) < FREED
    assert crowded.figure('vllm:request_success_total{finished_reason="abort"') >= 1


def test_who_stops_reading_holds_nobody_up(crowded):
    clients = [crowded.connect(request({**LONG, "stream": True})) for _ in range(8)]
    assert crowded.post("/v1/chat/completions", SHORT).status_code == 200
    wait_until(lambda: is_idle(crowded))
    for client in clients:
        client.close()


def test_half_a_body_is_given_up(crowded):
    begun = time.monotonic()
    answer = received(crowded.connect(request(LONG)[:-5]))
    assert 0.9 < time.monotonic() - begun < 5
    assert answer.startswith(b"HTTP/1.1 408 ") and b'"timeout"' in answer


def test_many_bodies_at_once(model_folder):
    """Each may be as large as allowed, and together they may not fill the memory."""
    with running(settings_for(model_folder, max_body_bytes=2000)) as server:
        halves = [server.connect(HEAD + b"Content-Length: 2000\r\n\r\n" + b" " * 1999) for _ in range(20)]
        refused = [server.post("/v1/chat/completions", SHORT).status_code for _ in range(3)]
        assert refused == [503] * 3
        assert server.get("/health").status_code == 200
        for half in halves:
            half.close()
        assert wait_until(lambda: server.post("/v1/chat/completions", SHORT).status_code == 200) < FREED
        for _ in range(40):  # and what was answered is held no longer
            assert server.post("/v1/chat/completions", {**SHORT, "user": "ü" * 900}).status_code == 200


@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc"])
def test_half_a_head_is_given_up(crowded, sent):
    begun = time.monotonic()
    assert received(crowded.connect(sent) if sent else crowded.connect()) == b""
    assert 0.9 < time.monotonic() - begun < 5


def test_a_head_that_drips_is_given_up(crowded):
    begun = time.monotonic()
    with crowded.connect(b"GET /health HTTP/1.1\r\n") as connection, pytest.raises(ConnectionError):
        while time.monotonic() - begun < 20:
            connection.sendall(b"X: y\r\n")
            time.sleep(0.05)
    assert time.monotonic() - begun < 5


def test_who_asks_on_is_not_cut_off(crowded):
    """A connection is idle whenever somebody looks, if its requests are short; it is used all the same."""
    connection = HTTPConnection("127.0.0.1", crowded.port, timeout=PATIENCE)
    begun = time.monotonic()
    with contextlib.closing(connection):
        while time.monotonic() - begun < 3.5:
            connection.request("GET", "/health")
            assert connection.getresponse().read() == b'{"status":"ok"}'
            time.sleep(0.03)
        assert connection.sock.recv(10) == b""  # and afterwards it is


def test_two_requests_in_one_piece(crowded):
    pair = request(SHORT) + request({**SHORT, "max_tokens": 2}).replace(b"Host:", b"Connection: close\r\nHost:")
    answer = received(crowded.connect(pair))
    assert answer.count(b"HTTP/1.1 200 ") == 2 and answer.count(b'"completion_tokens":3') == 1


def test_answers_that_take_too_long(model_folder):
    with running(settings_for(model_folder, request_timeout=0.5)) as server, slowed(server):
        answer = server.post("/v1/chat/completions", LONG)
        assert answer.status_code == 408 and answer.json()["error"]["code"] == "timeout"
        stream = server.post("/v1/chat/completions", {**LONG, "stream": True}).text.strip().split("\n\n")
        assert stream[-1] == "data: [DONE]" and json.loads(stream[-2][6:])["error"]["code"] == "timeout"
        events = server.post("/v1/responses", {"input": "Erzähl!", "stream": True}).text
        assert "event: response.failed" in events and "within 0.5 seconds" in events
        assert wait_until(lambda: is_idle(server)) < FREED


def test_a_computation_that_fails(crowded):
    """As for a lack of memory: one line, no more, and the next request is answered."""
    model = crowded.engine.compute_model
    original = model.hidden_states
    model.hidden_states = lambda *a, **k: (_ for _ in ()).throw(RuntimeError("kein Speicher\nsecond line"))
    try:
        answer = crowded.post("/v1/chat/completions", SHORT)
        stream = crowded.post("/v1/chat/completions", {**SHORT, "stream": True}).text
    finally:
        model.hidden_states = original
        del model.hidden_states
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    assert "kein Speicher" in answer.json()["error"]["message"] and "second line" not in answer.text
    assert '"computation_failed"' in stream and stream.endswith("data: [DONE]\n\n")
    assert crowded.post("/v1/chat/completions", SHORT).status_code == 200


def test_more_connections_than_there_may_be(model_folder):
    with running(settings_for(model_folder, max_connections=5)) as server, contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(server.connect())
        with httpx2.Client() as client:
            answer = client.post(f"{server.url}/v1/chat/completions", json=SHORT)
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "too_many_connections"
        assert server.get("/health").status_code == 200
        idle = [stack.enter_context(server.connect()) for _ in range(20)]
        lost = 0
        for connection in idle:
            connection.settimeout(0.05)
            with contextlib.suppress(TimeoutError):
                try:
                    lost += connection.recv(10) == b""
                except ConnectionError:
                    lost += 1
        assert 12 <= lost <= 18
        stack.close()
        assert wait_until(lambda: server.get("/v1/models").status_code == 200) < FREED
