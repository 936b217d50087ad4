"""The application: all routes, behind the gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio.to_thread
from fastapi import FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, JSONResponse, Response

import tinylm
from tinylm.files.untrusted import shown
from tinylm.page.card import page_card
from tinylm.page.page import page
from tinylm.server import chat_completions, completions, responses
from tinylm.server.docs_page import docs_page
from tinylm.server.errors import ERRORS, ApiError, add_handlers, refused
from tinylm.server.gate import Gate
from tinylm.server.json_body import json_router
from tinylm.server.page_models import PAGE_HEADERS, packed_for_page
from tinylm.server.prompts import chat_prompt, text_prompt
from tinylm.server.replies import token_text
from tinylm.server.run_tree import run_tree
from tinylm.server.runs import rows_of, runs_in
from tinylm.server.schemas import DetokenizeRequest, TokenizeRequest
from tinylm.server.served_models import ServedModel
from tinylm.server.settings import ServeSettings, listed
from tinylm.server.state import ServerState, state_of
from tinylm.tokenizer.chat_template import encode_chat

router = json_router()


def make_app(settings: ServeSettings) -> FastAPI:
    """The ASGI application; `app.state.server.use(models)` makes it ready."""
    app = FastAPI(
        title="tinylm",
        version=tinylm.__version__,
        docs_url=None,
        redoc_url=None,
        description="OpenAI's API for tiny models",
    )
    app.state.server = ServerState(settings)
    for each in (router, chat_completions.router, completions.router, responses.router):
        app.include_router(each, responses=ERRORS)
    add_handlers(app)
    app.add_middleware(Gate, settings=settings)
    if origins := listed(settings.cors_origins):
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    return app


@router.get("/health", responses={503: {"description": "the models are being loaded"}})
async def health(request: Request) -> Response:
    """Whether requests can be answered."""
    is_ready = state_of(request).loaded is not None
    return JSONResponse({"status": "ok" if is_ready else "loading"}, 200 if is_ready else 503)


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Counters, in Prometheus' text format."""
    return Response(state_of(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/", response_class=HTMLResponse)
async def index() -> Response:
    """The page: a chat with the models, and what they compute."""
    return HTMLResponse(page("tinylm"), headers=PAGE_HEADERS)


@router.get("/page/models/{name:path}", response_class=Response)
async def packed(name: str, request: Request, step: int | None = None) -> Response:
    """A model in the page's own format, to be computed in a browser; with `step`, as it was in its training."""
    data = await packed_for_page(state_of(request).models.named(name), step)
    return Response(data, media_type="application/octet-stream")


@router.get("/page/runs")
async def runs(request: Request) -> dict[str, Any]:
    """The training runs in the server's folder of runs, with their parents and settings; null without such a folder."""
    folder = state_of(request).settings.runs_dir
    return await anyio.to_thread.run_sync(run_tree, Path(folder)) if folder else {"runs": None}


@router.get("/page/runs/{name:path}")
async def run(name: str, request: Request) -> dict[str, Any]:
    """The lines of a run's metrics."""
    folder = state_of(request).settings.runs_dir
    path = runs_in(Path(folder)).get(name) if folder else None
    if path is None:
        raise ApiError(404, f"there is no run {shown(name, 100)}", "name", "run_not_found")
    try:
        return await anyio.to_thread.run_sync(rows_of, path)
    except FileNotFoundError:
        raise ApiError(404, f"the run {shown(name, 100)} was removed", "name", "run_not_found") from None
    except ValueError as error:
        raise refused(error, "name") from None


@router.get("/docs", response_class=HTMLResponse)
async def docs(request: Request) -> str:
    """This page."""
    return docs_page(request.app.openapi())


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The models and adapters that a request may choose."""
    return {"object": "list", "data": [_card(model) for model in state_of(request).models]}


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> dict[str, Any]:
    """One of them."""
    return _card(state_of(request).models.named(name))


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    """The token ids of a text or a conversation."""
    state = state_of(request)
    model = state.models.named(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "expected one of prompt and messages; send one of them", "prompt", "invalid_value")
    if body.messages is not None:
        ids = await chat_prompt(model, body.messages, state.settings)
        if not body.add_generation_prompt:
            ids = encode_chat(model.tokenizer, [message.plain for message in body.messages])[0]
    else:
        ids = await text_prompt(model, body.prompt or "")
        if not body.add_special_tokens:
            ids = ids[len(model.engine.document_start) :]
    shown = [token_text(model.tokenizer, token_id) for token_id in ids] if body.return_token_strs else None
    return {"tokens": ids, "count": len(ids), "max_model_len": model.scheduler.context_length, "token_strs": shown}


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, str]:
    """The text of token ids, control tokens by their names."""
    tokenizer = state_of(request).models.named(body.model).tokenizer
    if wrong := [token_id for token_id in body.tokens if not 0 <= token_id < tokenizer.vocab_size][:1]:
        message = f"tokens has {wrong[0]}; expected 0 to {tokenizer.vocab_size - 1}"
        raise ApiError(400, message, "tokens", "invalid_value")
    return {"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)}


def _card(model: ServedModel) -> dict[str, Any]:
    why = "it is a base model" if model.is_base else model.why_no_chats
    return {
        "object": "model",
        "created": model.created,
        "owned_by": "tinylm",
        "root": model.parent or model.name,
        "parent": model.parent,
        "snapshots": list(model.snapshots),
        **page_card(model.name, model.num_parameters, model.scheduler.context_length, why, model.prompts),
    }
