"""The server's life: it answers /health at once, loads its models, serves, and drains when it is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import uvicorn
from sse_starlette.sse import AppStatus

from tinylm.commandline.exit_status import StopRequest
from tinylm.server.app import make_app
from tinylm.server.connections import Connection
from tinylm.server.served_models import ServedModels
from tinylm.server.settings import ServeSettings


async def serve(settings: ServeSettings, at: socket.socket, say: Callable[[str], Any]) -> int:
    """Serve until SIGTERM or Ctrl-C; then take no more requests, answer what was accepted, and return.

    A second signal ends the process at once.

    Returns:
        The number of the signal.

    Raises:
        FileNotFoundError, ValueError: a model cannot be served.
    """
    app = make_app(settings)
    AppStatus.disable_automatic_graceful_drain()  # streams may end by themselves
    server = _server(app, settings)

    def drain() -> None:  # in a thread
        server.should_exit = True
        say(f"ends when the open answers are complete, or in {settings.drain_timeout:g} s; a second signal ends it now")

    models = None
    with StopRequest(drain) as stop:
        serving = asyncio.create_task(server.serve(sockets=[at]))
        loading = _in_thread(lambda: ServedModels(settings, say))
        try:
            await asyncio.wait([serving, loading], return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                models = loading.result()
                app.state.server.use(models)
                root = _address(at)
                say(f"ready: open {root} in a browser; programs use {root}v1, {root}docs lists its routes; Ctrl-C ends")
            await asyncio.wait([serving])
        finally:
            server.should_exit = True
            await asyncio.wait([serving])
            if models is not None:
                await asyncio.to_thread(models.close, settings.drain_timeout)
    serving.result()
    return stop.signum


class _Server(uvicorn.Server):
    """uvicorn's server, which leaves the signals to us."""

    def capture_signals(self) -> Any:
        return contextlib.nullcontext()


def _server(app: Any, settings: ServeSettings) -> _Server:
    config = uvicorn.Config(
        app,
        http=type("_Connection", (Connection,), {"limits": settings}),
        ws="none",
        lifespan="off",
        log_level="warning",
        timeout_keep_alive=max(1, round(settings.receive_timeout)),
        timeout_graceful_shutdown=max(1, round(settings.drain_timeout)),
        server_header=False,
    )
    return _Server(config)


def _in_thread(function: Callable[[], Any]) -> asyncio.Future[Any]:
    """Its result, from a thread that a signal need not wait for."""
    result: Future[Any] = Future()

    def work() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=work, name="loading", daemon=True).start()
    return asyncio.wrap_future(result)


def _address(at: socket.socket) -> str:
    host, port = at.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
