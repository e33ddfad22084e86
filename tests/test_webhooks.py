"""Webhooks on a real receiver: signed, tried again, and never in a job's way."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from pipeline.job_records import NewJob
from pipeline.job_store import JobStore
from pipeline.service_settings import ServiceSettings
from pipeline.webhooks import WebhookSender

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


class Receiver(BaseHTTPRequestHandler):
    """Puts what arrives into a queue, and answers as it is told."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.put((dict(self.headers), body))  # type: ignore[attr-defined]
        self.send_response(self.server.answers.pop(0) if self.server.answers else 200)  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def receiver() -> Iterator[ThreadingHTTPServer]:
    """A server on loopback."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    server.received, server.answers = Queue(), []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    """A store whose jobs may tell loopback."""
    settings = ServiceSettings(data_dir=tmp_path, webhook_secret=SECRET, allowed_hosts="127.0.0.1")
    store = JobStore(settings)
    yield store
    store.index.close()


def finished_job(store: JobStore, url: str, api: str = "v1") -> str:
    new = NewJob(api, "me", {}, {}, "f", extra={"webhook": url})
    job = store.index.add(new, 10)[0]
    store.index.claim("r")
    assert store.index.finish(job.id, "r", "failed", error={"code": "x", "message": "y", "field": None})
    return job.id


def test_a_receiver_is_told_once_and_can_verify(store: JobStore, receiver: ThreadingHTTPServer) -> None:
    """The signature is Standard Webhooks'; after two failures the third try arrives, with the same id."""
    receiver.answers = [500, 503]  # type: ignore[attr-defined]
    job = finished_job(store, f"http://127.0.0.1:{receiver.server_port}/hook")
    sender = WebhookSender(store, pauses=(0.01, 0.01, 0.01))
    tries = [receiver.received.get(timeout=120) for _ in range(3)]  # type: ignore[attr-defined]
    sender.stop()
    assert store.index.due_webhook(0.0) is None
    assert receiver.received.empty()  # type: ignore[attr-defined]
    assert len({headers["webhook-id"] for headers, _ in tries}) == 1
    headers, body = tries[-1]
    told = Webhook(SECRET).verify(body, headers)
    assert (told["type"], told["data"]["id"]) == ("job.failed", job)
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(body.replace(b"failed", b"passed"), headers)


def test_runpods_webhook_is_the_status(store: JobStore, receiver: ThreadingHTTPServer) -> None:
    """Jobs of RunPod's API tell what /status tells."""
    job = finished_job(store, f"http://127.0.0.1:{receiver.server_port}/hook", "runpod")
    sender = WebhookSender(store)
    _, body = receiver.received.get(timeout=120)  # type: ignore[attr-defined]
    sender.stop()
    told = json.loads(body)
    assert (told["id"], told["status"], told["error"]) == (job, "FAILED", "y")


def test_a_receiver_that_is_gone_is_given_up(store: JobStore, receiver: ThreadingHTTPServer) -> None:
    """After the last try nothing is due any more, and the job is as it was."""
    receiver.answers = [500] * 9  # type: ignore[attr-defined]
    job = finished_job(store, f"http://127.0.0.1:{receiver.server_port}/hook")
    sender = WebhookSender(store, pauses=(0.01,))
    for _ in range(2):
        receiver.received.get(timeout=120)  # type: ignore[attr-defined]
    sender.stop()
    assert store.index.due_webhook(0.0) is None
    assert store.index.get(job).state == "failed"


def test_a_webhook_may_not_reach_private_addresses(tmp_path: Path, receiver: ThreadingHTTPServer) -> None:
    """Without the operator's leave, loopback is not told anything."""
    store = JobStore(ServiceSettings(data_dir=tmp_path))
    finished_job(store, f"http://127.0.0.1:{receiver.server_port}/hook")
    sender = WebhookSender(store, pauses=())
    deadline = time.monotonic() + 150
    while store.index.due_webhook(0.0) is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    sender.stop()
    assert receiver.received.empty()  # type: ignore[attr-defined]
    store.index.close()


def test_a_message_that_is_none_stops_no_other(store: JobStore, receiver: ThreadingHTTPServer) -> None:
    """A completed job of RunPod's API whose video is gone: given up after its tries, the next is told."""
    url = f"http://127.0.0.1:{receiver.server_port}/hook"
    lost = store.index.add(NewJob("runpod", "me", {}, {}, "f", extra={"webhook": url}), 10)[0].id
    store.index.claim("r")
    told = {"success": True, "gpu_count": 1, "segments_processed": 1, "message": ""}
    store.index.finish(lost, "r", "completed", result=told)
    sender = WebhookSender(store, pauses=())
    other = finished_job(store, url)
    _, body = receiver.received.get(timeout=120)  # type: ignore[attr-defined]
    sender.stop()
    assert json.loads(body)["data"]["id"] == other
    assert store.index.due_webhook(0.0) is None
