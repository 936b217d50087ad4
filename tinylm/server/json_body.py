"""Bodies are strict JSON: what has two meanings, or would take much memory, is refused."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.routing import APIRoute

from tinylm.files.untrusted import parse_json

MAX_VALUES = 1 << 17
"""Most values in a body (see `parse_json`): token ids are that many in no context of a tiny model."""


def json_router() -> APIRouter:
    """A router whose routes read their bodies so."""
    return APIRouter(route_class=_JsonRoute)


class _JsonRequest(Request):
    async def json(self) -> Any:
        try:
            return parse_json(await self.body(), MAX_VALUES)
        except ValueError as error:
            raise HTTPException(400, f"the body is not JSON ({error}); expected an object") from None


class _JsonRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_JsonRequest(request.scope, request.receive, request._send))

        return handle
