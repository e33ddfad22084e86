"""The WebSockets of the draft engine: who listens under which client id, and what goes to whom.

Messages are put in from any thread and sent from the event loop in the order they came.
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from typing import Any

from aiohttp import ClientError, WSMsgType, web

log = logging.getLogger(__name__)

FEATURES = {
    "supports_preview_metadata": True,
    "supports_model_type_tags": True,
    "max_upload_size": 104857600,
    "extension": {"manager": {"supports_v4": True}},
    "node_replacements": True,
    "assets": False,
}

Message = dict[str, Any]


class Sockets:
    """All open WebSockets by client id, with ComfyUI's ways.

    One socket per client id: a second one with the same id takes over, and when either of the two closes
    the id is forgotten, so that the other one goes silent though it is still open.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._sockets: dict[str, web.WebSocketResponse] = {}
        self._muted: set[web.WebSocketResponse] = set()
        self._messages: asyncio.Queue[tuple[Message, str | None]] = asyncio.Queue()

    def send(self, kind: str, data: Message, client_id: str | None) -> None:
        """Queue a message for one client, or for everybody (None); from any thread."""
        self._loop.call_soon_threadsafe(self._messages.put_nowait, ({"type": kind, "data": data}, client_id))

    def mute(self) -> None:
        """The sockets that are open now get nothing more, though they stay open; from any thread."""
        self._loop.call_soon_threadsafe(lambda: self._muted.update(self._sockets.values()))

    async def publish(self) -> None:
        """Send what is queued, for ever."""
        while True:
            message, client_id = await self._messages.get()
            text = json.dumps(message)
            if client_id is None:
                targets = list(self._sockets.values())
            else:
                targets = [self._sockets[client_id]] if client_id in self._sockets else []
            for socket in targets:
                await self._deliver(socket, text)

    async def serve(
        self, request: web.Request, status: Message, running_node: tuple[str | None, str | None]
    ) -> web.WebSocketResponse:
        """Serve one socket until it closes.

        ``running_node`` is (client id, node) of the prompt being executed: that client is told on reconnect.
        """
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        sid = request.query.get("clientId", "") or uuid.uuid4().hex
        self._sockets[sid] = socket
        try:
            await self._deliver(socket, _text("status", {**status, "sid": sid}))
            client_id, node = running_node
            if node is not None and client_id == sid:
                await self._deliver(socket, _text("executing", {"node": node}))
            first = True
            async for message in socket:
                if message.type == WSMsgType.TEXT:
                    if first and _asks_for_features(message.data):
                        await self._deliver(socket, _text("feature_flags", FEATURES))
                    first = False
        finally:
            self._sockets.pop(sid, None)
            self._muted.discard(socket)
        return socket

    async def _deliver(self, socket: web.WebSocketResponse, text: str) -> None:
        if socket in self._muted:
            return
        try:
            await socket.send_str(text)
        except (ClientError, ConnectionError) as exc:
            log.warning("send error: %s", exc)


def _text(kind: str, data: Message) -> str:
    return json.dumps({"type": kind, "data": data})


def _asks_for_features(text: str) -> bool:
    try:
        message = json.loads(text)
    except ValueError:
        log.warning("a client sent invalid JSON")
        return False
    return isinstance(message, dict) and message.get("type") == "feature_flags"
