"""The server's life: it answers /health at once, loads its models, serves, and drains when it is told to end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from sse_starlette.sse import AppStatus
from uvicorn.protocols.http.h11_impl import H11Protocol

from tinylm.server.app import make_app
from tinylm.server.served_models import ServedModels
from tinylm.server.settings import ServeSettings


async def serve(settings: ServeSettings, at: socket.socket, say: Callable[[str], Any]) -> None:
    """Serve until SIGTERM or Ctrl-C; then take no more requests, answer what was accepted, and return.

    Raises:
        FileNotFoundError, ValueError: a model cannot be served.
    """
    app = make_app(settings)
    AppStatus.disable_automatic_graceful_drain()  # streams may end by themselves
    config = uvicorn.Config(
        app,
        http=_impatient(settings.receive_timeout),
        ws="none",
        lifespan="off",
        log_level="warning",
        limit_concurrency=settings.max_connections,
        timeout_graceful_shutdown=max(1, round(settings.drain_timeout)),
        server_header=False,
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[at]))
    try:
        models = await asyncio.to_thread(ServedModels, settings, say)
        app.state.server.use(models)
        host, port = at.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        say(f"ready at http://{shown}:{port}/v1 (Ctrl-C ends it; /docs lists the routes)")
        await serving
        await asyncio.to_thread(models.close, settings.drain_timeout)
    finally:
        server.should_exit = True
        await asyncio.wait([serving])


def _impatient(seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, which also closes connections whose next request does not begin or end its head in time."""

    class Protocol(H11Protocol):
        waited = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._look_later()

        def _look_later(self) -> None:
            self.loop.call_later(seconds, self._look)

        def _look(self) -> None:
            if self.transport.is_closing():
                return
            is_idle = self.cycle is None or self.cycle.response_complete
            if is_idle and self.waited:
                self.transport.close()
                return
            self.waited = is_idle
            self._look_later()

    return Protocol
