"""The ASGI application: routes, health, and errors as answers.  Started by ``serve_app`` in each replica."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from pipeline.errors import PipelineError
from pipeline.job_store import JobStore
from pipeline.service_settings import ServiceSettings
from service import api_openai, api_runpod, api_v1, api_watch
from service.errors import Failure, Refused, failure_of
from service.news import News
from service.observed import Observed, Told
from service.page_routes import add_page
from service.reads import JobReads
from service.tokens import Tokens

ENSURE_SECONDS = 5.0
"""How often each replica makes sure that there is a runner."""

log = logging.getLogger(__name__)


class Backend(Protocol):
    """Whoever renders the jobs."""

    def ensure(self) -> None:
        """Make sure that it is there; called again and again."""

    def state(self) -> dict[str, Any]:
        """``gpus`` that answer, ``starting``, and ``trouble``, a sentence or None.  Raises nothing."""

    def pool(self) -> dict[str, Any] | None:
        """``lanes`` and ``jobs`` of the cluster's pool of GPUs; None where there is none."""


def create_app(settings: ServiceSettings, backend: Backend, told: Told | None = None) -> FastAPI:
    """The application; ``told`` hears of every answer.

    Raises ``ConfigurationError`` for tokens that are none.
    """

    tokens = Tokens.read(settings)
    if not tokens.secrets:
        log.warning("no tokens are set (INFINITETALK_SERVE_TOKENS): only this machine itself is answered")

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        app.state.store = JobStore(settings)
        app.state.tokens = tokens
        app.state.news = News(app.state.store.index)
        app.state.reads = JobReads(settings.index_url)
        app.state.backend = backend
        await asyncio.to_thread(backend.ensure)
        tasks = [asyncio.create_task(app.state.news.watch()), asyncio.create_task(_keep_ensuring(backend))]
        yield
        for task in tasks:
            task.cancel()
        app.state.reads.close()
        app.state.store.index.close()

    app = FastAPI(
        title="InfiniteTalk",
        version="1",
        description="A picture and a speech in, one long talking video out, rendered on every GPU at once.",
        lifespan=life,
    )
    for api in (api_v1, api_watch, api_runpod, api_openai):
        app.include_router(api.router)
    if settings.cors_origins:
        origins = [origin.strip() for origin in settings.cors_origins.split(",")]
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    if told is not None:
        app.add_middleware(Observed, told=told)
    _add_health(app)
    add_page(app)
    _answer_errors(app)
    return app


async def _keep_ensuring(backend: Backend) -> None:
    while True:
        await asyncio.sleep(ENSURE_SECONDS)
        try:
            await asyncio.to_thread(backend.ensure)
        except Exception:  # whatever it is, the next look may find it mended
            log.exception("the runner can't be reached")


def _add_health(app: FastAPI) -> None:
    @app.get("/health", tags=["service"])
    async def health() -> dict[str, str]:
        """Whether this process answers."""
        return {"status": "ok"}

    @app.get("/ready", tags=["service"], responses={503: {"description": "not now; `reasons` says why"}})
    def ready(request: Request) -> JSONResponse:
        """Whether a job that is sent now would be rendered: an engine answers and there is room to wait."""
        store: JobStore = request.app.state.store
        state = request.app.state.backend.state()
        counts = store.index.counts()
        reasons = [] if state["gpus"] else [state["trouble"] or "no engine answers yet"]
        if counts["queued"] >= store.settings.max_queued:
            reasons.append("the queue is full")
        body = {
            "ready": not reasons,
            "reasons": reasons,
            "gpus": state["gpus"],
            "starting": state["starting"],
            "queued": counts["queued"],
            "in_progress": counts["in_progress"],
        }
        return JSONResponse(body, 503 if reasons else 200)


def _answer_errors(app: FastAPI) -> None:
    def answer(request: Request, failure: Failure) -> JSONResponse:
        shapes: dict[str, Callable[[Failure], Any]] = {
            "/v1/videos": api_openai.error_body,
            "/v2/": api_runpod.error_body,
        }
        path = request.url.path
        shape = next((body for prefix, body in shapes.items() if path.startswith(prefix)), Failure.body)
        return JSONResponse(shape(failure), failure.status, headers=failure.headers)

    @app.exception_handler(PipelineError)
    @app.exception_handler(Refused)
    async def ours(request: Request, error: Exception) -> JSONResponse:
        failure = failure_of(error)
        if failure.status == 500:
            log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return answer(request, failure)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first: dict[str, Any] = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:]) or None
        return answer(request, Failure(422, "invalid_request", first["msg"], field))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "refused")
        return answer(request, Failure(error.status_code, code, str(error.detail)))

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed unforeseen", request.method, request.url.path, exc_info=error)
        return answer(request, failure_of(error))
