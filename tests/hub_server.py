"""A hub on this machine, and the host it redirects large files to: what huggingface_hub needs of them."""

from __future__ import annotations

import hashlib
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_right"


@dataclass
class Hub:
    """Files by ``REPOSITORY/PATH``; what was asked; how to misbehave."""

    files: dict[str, bytes] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    """Repositories that need the token."""
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path, Range."""
    leaked: list[str] = field(default_factory=list)
    """Authorization headers that reached the other host."""
    break_after: int | None = None
    """The next transfer closes its connection after so many bytes."""
    hold_after: int | None = None
    """The next transfer stops there, sets ``holding`` and waits for ``release``."""
    ignores_range: bool = False
    claimed: dict[str, str] = field(default_factory=dict)
    """ETags other than the content's."""
    holding: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    url: str = ""
    storage: str = ""

    def ranges(self) -> list[str | None]:
        """The Range of each transfer."""
        return [wanted for method, path, wanted in self.asked if method == "GET" and path.startswith("/lfs/")]


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Both servers, on free ports of 127.0.0.1."""
    hub = Hub()
    servers = [_Server(("127.0.0.1", 0), kind, hub) for kind in (_Hub, _Storage)]
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    hub.url, hub.storage = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    try:
        yield hub
    finally:
        hub.release.set()
        for server in servers:
            server.shutdown()
            server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], kind: type[BaseHTTPRequestHandler], hub: Hub) -> None:
        self.hub = hub
        super().__init__(address, kind)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        raise NotImplementedError

    def note(self) -> Hub:
        self.server.hub.asked.append((self.command, unquote(self.path), self.headers["Range"]))
        return self.server.hub

    def say(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Hub(_Handler):
    def answer(self) -> None:
        hub = self.note()
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/main/(.+)", unquote(self.path))
        if match is None:
            return self.say(404)
        repository, path = match.groups()
        if repository in hub.gated and self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.say(401, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        name = f"{repository}/{path}"
        if name not in hub.files:
            return self.say(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
        content = hub.files[name]
        etag = hub.claimed.get(name) or hashlib.sha256(content).hexdigest()
        return self.say(
            302,
            Location=f"{hub.storage}/lfs/{name}",
            X_Repo_Commit=COMMIT,
            X_Linked_Size=str(len(content)),
            X_Linked_ETag=f'"{etag}"',
            ETag='"pointer"',
        )


class _Storage(_Handler):
    def answer(self) -> None:
        hub = self.note()
        if self.headers["Authorization"]:
            hub.leaked.append(self.headers["Authorization"])
        content = hub.files[unquote(self.path).removeprefix("/lfs/")]
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        start = int(wanted[1]) if wanted and not hub.ignores_range else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        stop, hub.break_after = hub.break_after, None
        hold, hub.hold_after = hub.hold_after, None
        if stop is None and hold is None:
            self.wfile.write(content[start:])
            return
        self.wfile.write(content[start : start + (stop or hold or 0)])
        self.wfile.flush()
        if hold is not None:
            hub.holding.set()
            hub.release.wait()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True
