"""RunPod's side of a worker on this machine: the HTTP that ``runpod``'s worker loop speaks to.

It hands out jobs, tells which are to stop, and keeps what workers send back.  Written from the SDK's source.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

HOLD_SECONDS = 1.0
"""How long a question for work is held open; RunPod's own are longer."""


@dataclass
class Platform:
    """What waits for the worker, and what came from it."""

    url: str = ""
    jobs: queue.Queue[dict[str, Any]] = field(default_factory=queue.Queue)
    stops: queue.Queue[str] = field(default_factory=queue.Queue)
    said: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    """Kind (``job-done``, ``job-stream``), job, body."""
    news: threading.Condition = field(default_factory=threading.Condition)

    @property
    def environment(self) -> dict[str, str]:
        """What RunPod sets for a worker."""
        return {
            "RUNPOD_POD_ID": "pod",
            "RUNPOD_AI_API_KEY": "key",
            "RUNPOD_WEBHOOK_GET_JOB": f"{self.url}/job-take/$ID?gpu=any",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{self.url}/job-done/$RUNPOD_POD_ID/$ID?gpu=any",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{self.url}/job-stream/$RUNPOD_POD_ID/$ID?gpu=any",
            "RUNPOD_WEBHOOK_PING": f"{self.url}/ping/$RUNPOD_POD_ID",
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",  # they want the internet and a CUDA
            "RUNPOD_SKIP_GPU_CHECK": "true",
        }

    def send(self, name: str, given: dict[str, Any]) -> None:
        """Hand out a job as soon as a worker asks."""
        self.jobs.put({"id": name, "input": given})

    def of(self, name: str) -> list[dict[str, Any]]:
        """All that was sent back of a job."""
        return [body for _, job, body in self.said if job == name]

    def wait(self, name: str, *, progress: bool, seconds: float) -> dict[str, Any]:
        """The first piece of progress that came from a job, or its answer; fails after so many seconds."""

        def found() -> list[dict[str, Any]]:
            return [body for body in self.of(name) if (body.get("status") == "IN_PROGRESS") == progress]

        with self.news:
            assert self.news.wait_for(found, seconds), f"nothing from {name}: {self.said}"
            return found()[0]


@contextmanager
def running_platform() -> Iterator[Platform]:
    """The platform on a free port of 127.0.0.1."""
    platform = Platform()
    server = _Server(("127.0.0.1", 0), _Handler)
    server.platform = platform
    platform.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield platform
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    platform: Platform


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        kind = urlsplit(self.path).path.split("/")[1]
        waiting: queue.Queue[Any] | None = {
            "job-take": self.server.platform.jobs,
            "job-stop": self.server.platform.stops,
        }.get(kind)
        try:
            found = waiting.get(timeout=HOLD_SECONDS) if waiting is not None else None
        except queue.Empty:
            found = None
        if found is None:
            self._answer(204, b"")
        else:
            self._answer(200, json.dumps({"jobsToStop": [found]} if kind == "job-stop" else found).encode())

    def do_POST(self) -> None:
        _, kind, _, job = urlsplit(self.path).path.split("/")
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.platform.news:
            self.server.platform.said.append((kind, job, body))
            self.server.platform.news.notify_all()
        self._answer(200, b"{}")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
