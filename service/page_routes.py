"""The page at ``/``: static files of ``service/page``, which use the API like any other client."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse
from starlette.staticfiles import StaticFiles

FOLDER = Path(__file__).resolve().parent / "page"
POLICY = "default-src 'self'; img-src 'self' blob:; media-src 'self' blob:; style-src 'self' 'unsafe-inline'"
"""Nothing from elsewhere; inline style is how a window's share is drawn."""


def add_page(app: FastAPI) -> None:
    """Serve the page."""

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}
        return FileResponse(FOLDER / "index.html", headers=headers)

    app.mount("/page", StaticFiles(directory=FOLDER), name="page")
