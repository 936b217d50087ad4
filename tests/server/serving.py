"""A server in a thread of this process: real sockets, and models that a test may look into."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from tests.processes import PATIENCE
from tinylm.commands.serve import listening
from tinylm.generation.engine import Engine
from tinylm.server import listen
from tinylm.server.served_models import ServedModels
from tinylm.server.settings import ServeSettings


@dataclass
class Server:
    """A server that runs."""

    port: int
    settings: ServeSettings
    said: list[str] = field(default_factory=list)
    models: ServedModels | None = None
    loop: asyncio.AbstractEventLoop | None = None
    client: httpx2.Client = field(default_factory=lambda: httpx2.Client(timeout=PATIENCE))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def engine(self) -> Engine:
        """That of the first model: what it computes alone is what the server must answer."""
        return self.models.named(None).engine

    def get(self, path: str, **options: Any) -> httpx2.Response:
        return self.client.get(self.url + path, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx2.Response:
        if body is not None:
            options["json"] = body
        return self.client.post(self.url + path, **options)

    def figure(self, name: str) -> float:
        """The sum of a figure of /metrics over its models."""
        lines = [line for line in self.get("/metrics").text.splitlines() if line.startswith(name)]
        assert lines, name
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def connect(self, *parts: bytes) -> socket.socket:
        """A connection on which these bytes were sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        for part in parts:
            connection.sendall(part)
        return connection


def settings_for(model_path: Path | str, **changes: Any) -> ServeSettings:
    """In float32 on a free port, with room for few."""
    values = {"port": 0, "device": "cpu", "dtype": "float32", "max_streams": 8, "cache_bytes": 64 * 2**20}
    return ServeSettings(model_path=str(model_path), **{**values, **changes})


@contextlib.contextmanager
def running(settings: ServeSettings, is_ready: bool = True) -> Iterator[Server]:
    """A server, at first ready for requests unless told otherwise, and ended with the block."""
    at = listening(settings)
    server = Server(at.getsockname()[1], settings)
    kept: dict[str, Any] = {}
    begun = threading.Event()

    class Kept(ServedModels):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            server.models = self

    async def main() -> None:
        server.loop, kept["task"] = asyncio.get_running_loop(), asyncio.current_task()
        begun.set()
        with contextlib.suppress(asyncio.CancelledError):
            await listen.serve(settings, at, server.said.append)

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            kept["error"] = error

    original, listen.ServedModels = listen.ServedModels, Kept
    thread = threading.Thread(target=run, name="server", daemon=True)
    try:
        thread.start()
        begun.wait(PATIENCE)
        if is_ready:
            wait_until(lambda: "error" in kept or any("ready" in line for line in server.said))
        if "error" in kept:
            raise kept["error"]
        yield server
    finally:
        listen.ServedModels = original
        server.client.close()
        if thread.is_alive():
            server.loop.call_soon_threadsafe(kept["task"].cancel)
        thread.join(PATIENCE)
    assert not thread.is_alive()
    if "error" in kept:
        raise kept["error"]


@contextlib.contextmanager
def slowed(server: Server, seconds: float = 0.05) -> Iterator[None]:
    """Inside the block, the first model takes so long for a step: an answer of this context takes seconds."""
    model = server.engine.compute_model
    original = model.hidden_states

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return original(*arguments, **options)

    model.hidden_states = slow
    try:
        yield
    finally:
        del model.hidden_states


def wait_until(is_true: Any, seconds: float = PATIENCE) -> float:
    """Wait until a condition holds; returns how long it took."""
    begun = time.monotonic()
    while not is_true():
        if time.monotonic() - begun > seconds:
            raise TimeoutError(f"not so within {seconds:g} s")
        time.sleep(0.01)
    return time.monotonic() - begun
