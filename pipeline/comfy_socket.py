"""An engine's WebSocket, which tells progress and nothing that must not be missed.

The only caller of ``websocket``.  Its errors become "closed" here: whoever needs the truth asks over HTTP.
What the messages mean is in ``comfy_events``.
"""

from __future__ import annotations

import json
import socket
import time
from urllib.parse import urlsplit

import websocket

CONNECT_SECONDS = 1.0
RETRY_SECONDS = 2.0


class ProgressSocket:
    """The WebSocket of one client id; silence and errors are all the same to it: no message."""

    def __init__(self, url: str, client_id: str) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname, parts.port or 80)
        self._url = f"ws://{parts.netloc}/ws?clientId={client_id}"
        self._socket: websocket.WebSocket | None = None
        self._tried_at = -RETRY_SECONDS

    @property
    def is_open(self) -> bool:
        """False before ``open``, and after the engine has closed the socket."""
        return self._socket is not None

    def open(self) -> None:
        """Try to connect, if the last try is not too fresh.

        Only while closed: of two sockets with one id the older goes deaf, and its end deafens the newer.
        """
        if time.monotonic() - self._tried_at < RETRY_SECONDS:
            return
        self._tried_at = time.monotonic()
        try:
            # A connection of our own: websocket-client would ask a proxy of the environment for 127.0.0.1.
            connection = socket.create_connection(self._address, timeout=CONNECT_SECONDS)
        except OSError:
            return
        try:
            self._socket = websocket.create_connection(
                self._url, timeout=CONNECT_SECONDS, socket=connection, suppress_origin=True
            )
        except (websocket.WebSocketException, OSError, ValueError, IndexError):
            connection.close()  # the last two: an answer that is no HTTP

    def next(self, seconds: float) -> object | None:
        """The next text message, decoded, or None when there is none within ``seconds``."""
        if self._socket is None:
            return None
        try:
            self._socket.settimeout(seconds)
            message = self._socket.recv()
        except websocket.WebSocketTimeoutException:
            return None
        except (websocket.WebSocketException, OSError):
            self.close()
            return None
        if not isinstance(message, str):
            return None  # a preview picture
        try:
            decoded: object = json.loads(message)
        except ValueError:
            return None
        return decoded

    def close(self) -> None:
        """Close without waiting for the other side."""
        if self._socket is not None:
            self._socket.shutdown()  # type: ignore[no-untyped-call]
            self._socket = None
