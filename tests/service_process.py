"""A whole service, as an operator starts it: ``infinitetalk serve`` in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from tests.draft_process import ROOT
from tests.free_ports import free_port

READY_SECONDS = 300.0
TOKEN = "anna:secret-of-anna"
HEADERS = {"Authorization": "Bearer secret-of-anna"}


@dataclass(frozen=True)
class Service:
    """A running service."""

    url: str
    process: subprocess.Popen[bytes]
    data: Path
    mark: str
    """In the environment of all its processes."""
    metrics: str
    """URL of Ray's page for Prometheus."""

    def post(self, path: str, **more: Any) -> requests.Response:
        """POST with Anna's token."""
        return requests.post(self.url + path, timeout=120, **{"headers": HEADERS} | more)

    def get(self, path: str, **more: Any) -> requests.Response:
        """GET with Anna's token."""
        return requests.get(self.url + path, timeout=120, **{"headers": HEADERS} | more)

    def submit(self, frames: int, speech_of: Callable[[int], Path], **more: Any) -> str:
        """A small job of so many frames; its id."""
        with (
            (ROOT / "examples" / "portrait.png").open("rb") as picture,
            speech_of(frames).open("rb") as sound,
        ):
            values = {"width": 64, "height": 64, **more}
            answer = self.post("/v1/jobs", files={"image": picture, "audio": sound}, data=values)
        assert answer.status_code == 202, answer.text
        job: str = answer.json()["id"]
        return job

    def job(self, job: str) -> dict[str, Any]:
        """How it is."""
        found: dict[str, Any] = self.get(f"/v1/jobs/{job}").json()
        return found

    def until(
        self, job: str, holds: Callable[[dict[str, Any]], bool], seconds: float = 300
    ) -> dict[str, Any]:
        """Wait for something to hold; fails with the job as it is then."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with suppress(requests.ConnectionError):
                found = self.job(job)
                if holds(found):
                    return found
            time.sleep(0.1)
        raise AssertionError(f"not within {seconds} s: {self.job(job)}")

    def until_over(self, job: str, seconds: float = 300) -> dict[str, Any]:
        """Wait for the end."""
        return self.until(job, lambda found: found["state"] in ("completed", "failed", "cancelled"), seconds)


@contextmanager
def running_service(
    data: Path, mark: str, log: Path, *, at: int | None = None, **settings: str
) -> Iterator[Service]:
    """Start, wait until engines answer, and end with SIGTERM (or what is left of it with SIGKILL)."""
    port, metrics = free_port(), free_port()
    env = {
        **os.environ,
        "INFINITETALK_ENGINE": "draft",
        "INFINITETALK_SERVE_DATA_DIR": str(data),
        "INFINITETALK_SERVE_TOKENS": TOKEN + ",bert:secret-of-bert",
        "INFINITETALK_SERVE_METRICS_PORT": str(metrics),
        "RAY_metrics_report_interval_ms": "2000",
        "TEST_MARK": mark,
        **settings,
    }
    port = at or port
    command = [sys.executable, "-m", "infinitetalk", "serve", "--port", str(port)]
    with log.open("ab") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out, start_new_session=True)
    pages = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics}/metrics"
    service = Service(pages[0], process, data, mark, pages[1])
    try:
        deadline = time.monotonic() + READY_SECONDS
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            with suppress(requests.ConnectionError, requests.Timeout):  # a busy machine is slow at first
                if requests.get(service.url + "/ready", timeout=120).status_code == 200:
                    break
            time.sleep(0.2)
        yield service
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(45)
            except subprocess.TimeoutExpired:
                kill_all(mark)
                process.wait()


def kill_all(mark: str) -> list[int]:
    """SIGKILL to every process of a service, as a power cut does; their pids."""
    killed = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                if f"TEST_MARK={mark}".encode() in (entry / "environ").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)
                    killed.append(int(entry.name))
    return killed
