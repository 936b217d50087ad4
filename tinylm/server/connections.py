"""Connections: uvicorn's, with bounds on their number and on the time without a request.

Their errors have OpenAI's shape, and they close so that a client reads the answer to what it was still sending.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tinylm.server.errors import ApiError
from tinylm.server.gate import OPEN_ROUTE
from tinylm.server.settings import ServeSettings

LINGERING = 2.0
"""Seconds in which a client may send on what nobody reads, before it reads the answer that refuses it."""


class Connection(H11Protocol):
    """One client's connection.

    Attributes:
        limits: of the server.
    """

    limits: ServeSettings
    _seen: Any = None  # the request that was the last one at the last look
    _was_idle = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_Transport(transport, self))  # type: ignore[arg-type]
        if len(self.connections) > 2 * self.limits.max_connections:
            transport.abort()  # even a refusal has its price
        elif len(self.connections) > self.limits.max_connections:
            self.app = self._too_many
        self._look_later()

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():  # else it is read only so that the answer arrives
            super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        """What cannot be read as HTTP is refused."""
        response = ApiError(400, "the request is not HTTP/1.1; send one that is", code="invalid_http").response
        headers = [*response.raw_headers, (b"connection", b"close")]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            head = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    async def _too_many(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == OPEN_ROUTE:  # or a supervisor would end a server that is merely busy
            await self.config.loaded_app(scope, receive, send)
            return
        message = f"{self.limits.max_connections} connections are open; no more may be; try again later"
        response = ApiError(503, message, code="too_many_connections").response
        response.headers["Connection"] = "close"
        await response(scope, receive, send)

    def _look_later(self) -> None:
        self.loop.call_later(self.limits.receive_timeout, self._look)

    def _look(self) -> None:
        """Close the connection if no request has come since the last look."""
        if self.transport.is_closing():
            return
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and self._was_idle and self.cycle is self._seen:
            self.transport.close()
            return
        self._was_idle, self._seen = is_idle, self.cycle
        self._look_later()


class _Transport:
    """A transport whose `close` waits for a client that is still sending: closed at once, it would never read why."""

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
        self._transport, self._connection = transport, connection
        self._lingers = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._lingers or self._transport.is_closing()

    def close(self) -> None:
        is_sending = self._connection.conn.their_state in (h11.SEND_BODY, h11.ERROR)
        if self.is_closing() or not is_sending:
            self._transport.close()
            return
        self._lingers = True
        self._transport.write_eof()
        self._transport.resume_reading()
        self._connection.loop.call_later(LINGERING, self._transport.close)
