"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from tinylm.files.untrusted import shown
from tinylm.generation.request import PromptTooLong, QueueFull, RequestError, SchedulerClosed

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ErrorDetails(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer with an error status."""

    error: ErrorDetails


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "the request is refused; the message says why"},
    "5XX": {"model": ErrorBody, "description": "the server is loading, ending, overloaded, or it failed"},
}
"""For the description of the routes."""


STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "the answer, or with `stream` its events"}
}
"""For the description of a route that can stream."""


class ApiError(Exception):
    """An answer with an error status.

    Args:
        message: one line: what was got, what is expected, what to do.
        param: the field that is wrong, such as `messages[0].content`.
        code: a word for programs.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def content(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """The answer; it says to try again later where that may help."""
        response = JSONResponse(self.content, self.status, {"Retry-After": "1"} if self.status in (429, 503) else {})
        if self.status == 401:  # two headers: Chromium does not find the first way in one of both
            response.headers.append("WWW-Authenticate", 'Basic realm="tinylm"')
            response.headers.append("WWW-Authenticate", "Bearer")
        return response


def refused(error: Exception, param: str | None = None) -> ApiError:
    """What a client is told about an error of the scheduler, or about a value that our own code refused."""
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full")
    if isinstance(error, SchedulerClosed):
        return ApiError(503, "the server is shutting down; use another", code="shutting_down")
    if isinstance(error, PromptTooLong):
        return ApiError(400, str(error), param, "context_length_exceeded")
    assert isinstance(error, RequestError | ValueError), error
    return ApiError(400, str(error), param, "invalid_value")


def add_handlers(app: FastAPI) -> None:
    """Let every error of `app` have OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def _api_error(request: Request, error: ApiError) -> JSONResponse:
        return error.response

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return invalid_body(error).response

    @app.exception_handler(HTTPException)
    async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 404:
            message = f"no route {shown(request.url.path)}; see /docs"
        elif error.status_code == 405:
            message = f"{request.method} is not a method of {shown(request.url.path)}; see /docs"
        else:
            message = str(error.detail)
        code = {400: "invalid_json", 404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        response = ApiError(error.status_code, message, code=code).response
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def _fault(request: Request, error: Exception) -> JSONResponse:
        return ApiError(500, "the server failed; its log says how", code="internal_error").response


def invalid_body(error: RequestValidationError) -> ApiError:
    """About the error that lies deepest: of the shapes that a field may have, it is in the one that was meant."""

    def depth(found: dict[str, Any]) -> tuple[int, list[int]]:
        return len(found["loc"]), [part for part in found["loc"] if isinstance(part, int)]

    worst = max(error.errors(), key=depth)
    kind, given = worst["type"], worst.get("input")
    place = _place(worst["loc"])
    if kind in ("model_attributes_type", "missing") and not place:
        return ApiError(400, "the body is not a JSON object; send one as application/json", code="invalid_json")
    if kind == "missing":
        return ApiError(400, f"{place} is missing; see /docs", place, "missing_required_parameter")
    if kind == "extra_forbidden":  # a stranger's name: it may be anything
        place = ".".join(part for part in (_place(worst["loc"][:-1]), _name(worst["loc"][-1])) if part)
    is_empty_list = kind == "too_long" and worst["ctx"]["max_length"] == 0
    if kind in ("extra_forbidden", "none_required") or is_empty_list:
        message = f"{place} is not supported here; leave it out; /docs lists what is"
        return ApiError(400, message, place, "unsupported_parameter")
    expected = str(worst["msg"])
    return ApiError(400, f"{place} is {_json(given)}: {expected[:1].lower()}{expected[1:]}", place, "invalid_value")


def _json(given: Any) -> str:
    """A value as the client wrote it, if it is short."""
    try:
        text = json.dumps(given, ensure_ascii=True)
    except (TypeError, ValueError, RecursionError):
        return shown(given)
    return text if len(text) <= 60 else shown(given)


def _name(name: int | str) -> str:
    return name if isinstance(name, str) and name.isascii() and name.isidentifier() else shown(name)


def _place(loc: tuple[int | str, ...]) -> str:
    """`messages[0].content` for ("body", "messages", 0, "content", "str"): the names of types are left out."""
    place = ""
    for before, part in zip(loc, loc[1:], strict=False):
        if before in ("format", "response_format"):  # which of several forms was meant
            continue
        if isinstance(part, int):
            place += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int", "float", "bool"):
            place += f".{part}" if place else part
    return place
