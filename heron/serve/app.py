"""The routes of the server, and what stands around them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from heron import __version__
from heron.config.serve import ServeConfig
from heron.data import template as templates
from heron.data.template import Template
from heron.errors import HeronError
from heron.serve import chat, completions, responses, states
from heron.serve.embeddings import Embeddings
from heron.serve.engines import Engines, Offer
from heron.serve.limits import Guard
from heron.serve.link import Link
from heron.serve.metrics import CONTENT_TYPE
from heron.serve.models import Models
from heron.serve.openai import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingsRequest,
    LoadRequest,
    ResponsesRequest,
    StateName,
    StateRequest,
    TokenizeRequest,
)
from heron.serve.refusals import Refusal, engine_failed, forgotten, of_error
from heron.serve.service import Service
from heron.serve.static import INDEX, Page
from heron.serve.streaming import EventStream, when_gone


def application(link: Link, offers: Mapping[str, Offer], config: ServeConfig, template: Template | None) -> FastAPI:
    """The ASGI application that :func:`heron.serve.create_app` gives, of the engines behind `link`."""
    models = Models(offers, config.queue, link)
    service = Service(config, models, template or templates.load(config.template))

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        models.start()
        yield
        await models.stop(config.grace)

    app = FastAPI(title="Heron", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.stop = models.stop
    app.router.redirect_slashes = False
    _add_texts(app, service)
    _add_models(app, service)
    _add_states(app, service)
    _add_pages(app, service)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(HeronError, _refused)
    app.add_exception_handler(Exception, _failed)
    if config.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=config.origins, allow_methods=["GET", "POST", "DELETE"], allow_headers=["*"]
        )
    app.add_middleware(Guard, config=config, metrics=service.metrics)
    return app


# -- routes -----------------------------------------------------------------------------------------------------------


def _add_texts(app: FastAPI, service: Service) -> None:
    """What writes."""

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        asked = await chat.ask(service, body)
        if body.stream:
            return EventStream(chat.stream(asked, bool(body.logprobs), body.with_usage), asked.cancel)
        return await _whole(request, chat.whole(asked, bool(body.logprobs)), asked.cancel)

    @app.post("/v1/completions")
    async def text_completions(body: CompletionRequest, request: Request) -> Response:
        asked = await completions.ask(service, body)
        if body.stream:
            return EventStream(completions.stream(asked, body.logprobs is not None, body.with_usage), asked.cancel)
        return await _whole(request, completions.whole(asked, body.logprobs is not None), asked.cancel)

    @app.post("/v1/responses")
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        asked = await responses.ask(service, body)
        if body.stream:
            return EventStream(responses.stream(asked), asked.cancel)
        return await _whole(request, responses.whole(asked), asked.cancel)

    @app.get("/v1/responses/{response_id}")
    async def show_response(response_id: str) -> Response:
        kept = service.conversations.find(response_id)
        if kept is None or not kept.response:
            raise forgotten(f"response {response_id!r:.80}")
        return Response(kept.response, media_type="application/json")

    @app.delete("/v1/responses/{response_id}")
    async def forget_response(response_id: str) -> dict[str, Any]:
        if not service.conversations.forget(response_id):
            raise forgotten(f"response {response_id!r:.80}")
        return {"id": response_id, "object": "response", "deleted": True}


def _add_models(app: FastAPI, service: Service) -> None:
    """What tells about models, and what they make of a text without writing."""

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(name) for name in service.models.names]}

    @app.get("/v1/models/{name}")
    async def describe_model(name: str) -> dict[str, Any]:
        return _model(service.models.get(name).name)

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingsRequest, request: Request) -> Response:
        asked = Embeddings(service, body)
        return await _whole(request, asked.whole(), asked.cancel)

    @app.post("/v1/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        tokenizer = service.models.get(body.model).tokenizer
        ids = await asyncio.to_thread(tokenizer.encode, body.text)
        return {"ids": ids, "count": len(ids)}

    @app.post("/v1/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        tokenizer = service.models.get(body.model).tokenizer
        return {"text": await asyncio.to_thread(tokenizer.decode, body.ids)}


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "heron"}


def _add_states(app: FastAPI, service: Service) -> None:
    """What is kept under names."""

    @app.get("/v1/states")
    async def list_states() -> dict[str, Any]:
        names = await service.link.ask(Engines.saved_states)
        return {"object": "list", "data": [states.on_wire(name) for name in names]}

    @app.post("/v1/states")
    async def save_state(body: StateRequest) -> dict[str, Any]:
        return await states.save(service, body)

    @app.post("/v1/states/{name}/load")
    async def load_state(name: StateName, body: LoadRequest) -> dict[str, Any]:
        return await states.load(service, name, body)

    @app.delete("/v1/states/{name}")
    async def delete_state(name: StateName) -> dict[str, Any]:
        await service.link.ask(Engines.delete_state, name)
        return {**states.on_wire(name), "deleted": True}


def _add_pages(app: FastAPI, service: Service) -> None:
    """What machines that watch the server ask for, and the page for people."""
    page = Page()

    @app.get("/health")
    async def health() -> Response:
        if service.models.has_failed:
            raise engine_failed(503)
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        if not service.models.are_ready:
            raise Refusal(503, "the server takes no requests now", code="not_ready", retry_after=1)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def metrics() -> Response:
        levels = await service.link.ask(Engines.cache_levels)
        return Response(service.metrics.text(levels), media_type=CONTENT_TYPE)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return page.response(INDEX)

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        return page.response(name)


async def _whole(request: Request, answer: Awaitable[dict[str, Any]], cancel: Callable[[], None]) -> Response:
    """The answer once it is there; it is cancelled where the client leaves before."""
    watch = asyncio.create_task(when_gone(request.receive, cancel))
    try:
        return JSONResponse(await answer)
    finally:
        watch.cancel()


# -- errors -----------------------------------------------------------------------------------------------------------


async def _refused(_: Request, error: Exception) -> Response:
    refusal = of_error(error) if isinstance(error, HeronError) else Refusal(500, "")
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


async def _invalid(request: Request, error: Exception) -> Response:
    """What pydantic found, in one sentence."""
    first = error.errors()[0] if isinstance(error, RequestValidationError) else {}
    place = [str(part) for part in first.get("loc", ())[1:]]
    if first.get("type") == "extra_forbidden":
        message = f"Unrecognized request argument supplied: {place[-1][:80]}"
    else:
        message = f"{'.'.join(place)[:200]}: {first.get('msg', 'not valid')[:300]}"
    return await _refused(request, Refusal(400, message, place[0][:80] if place else None))


async def _no_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    message = {404: "there is no such path", 405: "this path does not take this method"}.get(status, "not served")
    return await _refused(request, Refusal(status, message))


async def _failed(request: Request, _: Exception) -> Response:  # which goes on to the ASGI server's log
    return await _refused(request, Refusal(500, "the server has failed; its log says why"))
