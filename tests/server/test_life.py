"""From the start to the last answer: /health while models load, signals, and the status that the process ends with."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from tests.processes import PATIENCE, end_of, start
from tests.server.serving import running, settings_for, wait_until
from tinylm import cli
from tinylm.commands.serve import warn
from tinylm.server import served_models
from tinylm.server.settings import ServeSettings

ASK = {"messages": [{"role": "user", "content": "Erzähl! 讲 🐉"}], "temperature": 0, "stream": True}
TOKENS = 40


def serve(folder: str, seconds: float, load_seconds: float, *flags: str) -> int:
    """`tinylm serve` with a model that takes so long for a step, and so long to load; in a process of its own."""
    from tinylm.model.model_tinylm import TinyLMForCausalLM

    compute, load = TinyLMForCausalLM.hidden_states, served_models.load_for_use

    def slow(self: Any, *arguments: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return compute(self, *arguments, **options)

    def slow_load(*arguments: Any, **options: Any) -> Any:
        time.sleep(load_seconds)
        return load(*arguments, **options)

    TinyLMForCausalLM.hidden_states = slow  # type: ignore[method-assign]
    served_models.load_for_use = slow_load
    return cli.main(["serve", folder, "--port", "0", "--dtype", "float32", "--cache_bytes", "20000000", *flags])


@dataclass
class Command:
    """A process of the command, and what it said so far."""

    process: BaseProcess
    log: Path
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self) -> int:
        return end_of(self.process, self.log)

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")


@pytest.fixture
def started(model_folder: Path, tmp_path: Path) -> Iterator[Callable[..., Command]]:
    processes = []

    def begin(*flags: str, seconds: float = 0.0, load_seconds: float = 0.0) -> Command:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        log = tmp_path / f"log{len(processes)}"
        process = start(serve, str(model_folder), seconds, load_seconds, *flags, "--port", str(port), log=log)
        processes.append(process)
        command = Command(process, log, port)
        wait_until(lambda: health(command) is not None or process.exitcode is not None)
        if not load_seconds:
            wait_until(lambda: health(command) == 200 or process.exitcode is not None)
        return command

    yield begin
    for process in processes:
        process.kill()
        process.join()


def health(command: Command) -> int | None:
    with contextlib.suppress(httpx2.TransportError):
        return httpx2.get(f"{command.url}/health").status_code
    return None


def open_stream(command: Command, tokens: int = TOKENS) -> tuple[threading.Thread, list[str]]:
    """A client that has begun to read an answer, and the lines that it has read when its thread ends."""
    lines: list[str] = []
    begun = threading.Event()

    def read() -> None:
        body = {**ASK, "max_tokens": tokens}
        with contextlib.suppress(httpx2.TransportError):
            with httpx2.stream("POST", f"{command.url}/v1/chat/completions", json=body, timeout=PATIENCE) as answer:
                for line in answer.iter_lines():
                    lines.extend([line] if line else [])
                    if len(lines) > 3:
                        begun.set()

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    assert begun.wait(PATIENCE)
    return thread, lines


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_drains(started, number, status):
    command = started(seconds=0.05)
    thread, lines = open_stream(command)
    command.signal(number)
    wait_until(lambda: health(command) is None)  # nobody new
    assert thread.is_alive(), "the answer was complete before the test looked"
    thread.join(PATIENCE)
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line[6:]) for line in lines[:-1]]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert sum(bool(chunk["choices"][0]["delta"].get("content")) for chunk in chunks) > TOKENS // 2
    assert command.end() == status
    assert "Traceback" not in command.said and "stopped" in command.said and "ends when" in command.said


def test_a_second_signal_ends_at_once(started):
    command = started(seconds=0.2)
    open_stream(command, tokens=200)
    command.signal(signal.SIGTERM)
    wait_until(lambda: "second signal" in command.said)
    begun = time.monotonic()
    command.signal(signal.SIGTERM)
    assert command.end() == 143 and time.monotonic() - begun < 2


def test_draining_has_an_end(started):
    command = started("--drain_timeout", "1", seconds=0.2)
    thread, lines = open_stream(command, tokens=200)
    begun = time.monotonic()
    command.signal(signal.SIGTERM)
    assert command.end() == 143 and time.monotonic() - begun < 10
    thread.join(PATIENCE)
    assert "data: [DONE]" not in lines


def test_idle_connections_hold_nothing_up(started):
    command = started()
    with httpx2.Client() as client, socket.create_connection(("127.0.0.1", command.port)):
        assert client.get(f"{command.url}/v1/models").status_code == 200
        begun = time.monotonic()
        command.signal(signal.SIGTERM)
        assert command.end() == 143 and time.monotonic() - begun < 5


def test_a_signal_while_models_are_loaded(started):
    command = started(load_seconds=120)
    assert health(command) == 503
    begun = time.monotonic()
    command.signal(signal.SIGTERM)
    assert command.end() == 143 and time.monotonic() - begun < 10
    assert "Traceback" not in command.said


def test_health_while_models_are_loaded(model_folder, monkeypatch):
    go_on = threading.Event()
    load = served_models.load_for_use
    monkeypatch.setattr(served_models, "load_for_use", lambda *a, **k: go_on.wait(PATIENCE) and load(*a, **k))
    with running(settings_for(model_folder), is_ready=False) as server:
        wait_until(lambda: server.get("/health").status_code == 503)
        assert server.get("/health").json() == {"status": "loading"}
        for path in ("/v1/models", "/v1/models/tiny", "/metrics"):
            answer = server.get(path)
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "loading"
            assert answer.headers["retry-after"]
        assert server.post("/v1/chat/completions", ASK).status_code == 503
        assert server.get("/openapi.json").status_code == 200
        go_on.set()
        wait_until(lambda: server.get("/health").status_code == 200)
        assert server.get("/v1/models").json()["data"][0]["id"] == "tiny"


def test_it_says_where_it_is(started):
    command = started("--host", "127.0.0.1")
    root = rf"http://127\.0\.0\.1:{command.port}/"
    assert re.search(rf"ready: open {root} in a browser; programs use {root}v1, ", command.said.replace("\n", " "))
    assert "warning" not in command.said


@pytest.mark.parametrize(
    ("host", "key", "is_said"), [("0.0.0.0", "", True), ("0.0.0.0", "k", False), ("::1", "", False)]
)
def test_it_says_what_it_lets_in(host, key, is_said):
    said: list[str] = []
    warn(ServeSettings(model_path="m", host=host, api_key=key), SimpleNamespace(print=said.append))
    assert is_said == any("there is no API key" in line for line in said)
