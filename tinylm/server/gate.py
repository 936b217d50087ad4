"""What every request passes before a route sees it: host, origin, key, and a body of bounded size and time.

A page in a browser can send requests to this machine, and by DNS rebinding even read the answers. So a request must
call the server by a known name, and one from a page of another origin is refused unless that is allowed.
"""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import secrets
from urllib.parse import urlsplit

import anyio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinylm.files.untrusted import shown
from tinylm.server.errors import ApiError
from tinylm.server.settings import ServeSettings, listed

BODIES_AT_ONCE = 16
"""Times the largest body: the memory for what all clients have sent and have no answer to."""
OPEN_ROUTE = "/health"
"""Needs no key: a supervisor asks it."""


class Gate:
    """The ASGI application `app`, for requests that pass."""

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self.app, self.settings = app, settings
        self._key = settings.key.encode()
        self._hosts = {"localhost", settings.host.lower(), *listed(settings.allowed_hosts)}
        self._origins = set(listed(settings.cors_origins))
        self._held = 0  # bytes of the bodies of all requests that are not answered yet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = _Body(receive)
        try:
            if await self._admits(scope, body, send):
                await self.app(scope, body.replay, send)
        finally:
            self._held -= body.size

    async def _admits(self, scope: Scope, body: _Body, send: Send) -> bool:
        """Whether the request passes, with its body received; one that does not is answered."""
        try:
            await self._check(scope, body)
        except ApiError as error:
            response = error.response
            response.headers["Connection"] = "close"  # the rest of its body is not read
            await response(scope, body.replay, send)
            return False
        except ConnectionError:  # it left while it sent
            return False
        return True

    async def _check(self, scope: Scope, body: _Body) -> None:
        headers = Headers(scope=scope)
        self._check_caller(headers)
        if scope["path"] != OPEN_ROUTE and scope["method"] != "OPTIONS":
            self._check_key(headers)
        self._check_length(headers)
        if scope["method"] in ("POST", "PUT", "PATCH"):
            await self._receive(body)

    def _check_caller(self, headers: Headers) -> None:
        host = headers.get("host", "")
        name = _hostname(f"//{host}")
        if "*" not in self._hosts and name not in self._hosts and not _is_address(name):
            message = f"this server is not known as {shown(host, 100)}; add the name to --allowed_hosts"
            raise ApiError(403, message, code="unknown_host")
        origin = headers.get("origin")
        if origin is None or "*" in self._origins or origin.lower() in self._origins:
            return
        if urlsplit(origin).netloc.lower() != host.lower():
            message = f"pages of {shown(origin, 100)} may not use this server; add them to --cors_origins"
            raise ApiError(403, message, code="unknown_origin")

    def _check_key(self, headers: Headers) -> None:
        if not self._key:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        keys = {"bearer": given.encode("latin-1"), "basic": _password(given)}
        if not secrets.compare_digest(keys.get(scheme.lower(), b""), self._key):
            message = "the API key is wrong or missing; send it as `Authorization: Bearer KEY`"
            raise ApiError(401, message, code="invalid_api_key")

    def _check_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 15 or int(length) > self.settings.max_body_bytes:
            raise self._too_large()

    async def _receive(self, body: _Body) -> None:
        """Receive the whole body."""
        try:
            with anyio.fail_after(self.settings.receive_timeout):
                while not body.is_whole:
                    self._held += await body.more()
                    if body.size > self.settings.max_body_bytes:
                        raise self._too_large()
                    if self._held > BODIES_AT_ONCE * self.settings.max_body_bytes:
                        raise ApiError(503, "too much is sent at the same time; try again later", code="overloaded")
        except TimeoutError:
            seconds = self.settings.receive_timeout
            raise ApiError(408, f"the body did not arrive within {seconds:g} seconds", code="timeout") from None

    def _too_large(self) -> ApiError:
        most = self.settings.max_body_bytes
        return ApiError(413, f"the body is larger than {most:,} bytes; send a smaller one", code="body_too_large")


class _Body:
    """The body of a request: read part by part, then given in one piece."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._parts: list[bytes] = []
        self.size, self.is_whole = 0, False

    async def more(self) -> int:
        """Read a part; returns its bytes."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError
        part = message.get("body", b"")
        self._parts.append(part)
        self.size += len(part)
        self.is_whole = not message.get("more_body", False)
        return len(part)

    async def replay(self) -> Message:
        """First the body, if it was read, then what else comes: that the client has gone."""
        if not self._parts:
            return await self._receive()
        whole, self._parts = b"".join(self._parts), []
        return {"type": "http.request", "body": whole, "more_body": False}


def _password(given: str) -> bytes:
    """The password of HTTP's basic authentication, by which a browser asks a person for the key."""
    with contextlib.suppress(ValueError):
        return base64.b64decode(given, validate=True).partition(b":")[2]
    return b""


def _hostname(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    """Whether it is an IP address: no page can make a browser call this server by one in place of its own name."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
