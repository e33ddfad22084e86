"""The ASGI application: routes, and errors as answers.  Started by ``serve_app`` in each Serve replica."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from pipeline.errors import PipelineError
from pipeline.job_store import JobStore
from service import api_v1
from service.errors import Failure, Refused, failure_of

log = logging.getLogger(__name__)


def create_app(open_store: Callable[[], JobStore], on_start: Callable[[], None] = lambda: None) -> FastAPI:
    """The application on the store that ``open_store`` opens in this process.

    ``on_start`` makes sure that somebody renders the jobs (Serve: the runner actor).
    """

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        app.state.store = open_store()
        on_start()
        yield
        app.state.store.index.close()

    app = FastAPI(title="InfiniteTalk", version="1", lifespan=life)
    app.include_router(api_v1.router)
    _answer_errors(app)
    return app


def _answer_errors(app: FastAPI) -> None:
    def answer(failure: Failure) -> JSONResponse:
        return JSONResponse(failure.body(), failure.status, headers=failure.headers)

    @app.exception_handler(PipelineError)
    @app.exception_handler(Refused)
    async def ours(_request: Request, error: Exception) -> JSONResponse:
        return answer(failure_of(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        first: dict[str, Any] = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:]) or None
        return answer(Failure(422, "invalid_request", first["msg"], field))

    @app.exception_handler(HTTPException)
    async def http(_request: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "refused")
        return answer(Failure(error.status_code, code, str(error.detail)))

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        log.error(
            "%s %s failed in a way that nobody foresaw", request.method, request.url.path, exc_info=error
        )
        return answer(failure_of(error))
