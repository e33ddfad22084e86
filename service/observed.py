"""Every request in numbers: an ASGI layer that tells how long an answer took and how large it was.

Who counts them is the caller's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

Told = Callable[[str, str, str, float, int, int], None]
"""Route, method, status, seconds to the answer's first byte, bytes received, bytes sent."""

OTHER = "other"
"""The route of all paths that are none, and of the page's files: there is no end of them."""
GONE = "gone"
"""The status where the client did not wait for one."""


class Observed:
    """The application inside, and ``told`` after each of its answers."""

    def __init__(self, app: ASGIApp, told: Told) -> None:
        self._app, self._told = app, told

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        seconds: float | None = None
        status = GONE
        received = sent = 0

        async def receive_counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message

        async def send_counted(message: Message) -> None:
            nonlocal seconds, status, sent
            if message["type"] == "http.response.start":
                seconds, status = time.perf_counter() - began, str(message["status"])
            sent += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive_counted, send_counted)
        except Exception:
            status = "500" if seconds is None else status
            raise
        finally:
            if seconds is None:
                seconds = time.perf_counter() - began
            self._told(_route(scope), scope["method"], status, seconds, received, sent)


def _route(scope: Scope) -> str:
    path = getattr(scope.get("route"), "path", OTHER)
    return path if "endpoint" in scope and path else OTHER
