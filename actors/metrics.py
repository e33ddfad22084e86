"""Metrics, as Ray's exporter shows them to Prometheus: all definitions, and a function for each thing told.

Ray puts ``ray_`` before the names and gives them out at every node's metrics port, with or without its
dashboard (docs/metrics.md).  What is recorded where no Ray runs is lost, which costs nothing.  Counters begin
at zero in each process, so sums over a label are made of rates.  A gauge that is not set again for twenty
seconds disappears: nobody sees the number of a runner that is gone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ray.util.metrics import Counter, Gauge, Histogram, Metric

if TYPE_CHECKING:  # renderers need no database: 0.3 s of each one's start
    from pipeline.job_records import JobState

PREFIX = "infinitetalk_"
TICK_SECONDS = 1.0
"""Between two additions to a GPU's seconds."""

_RENDER_SECONDS: list[float] = [1, 2, 5, 10, 20, 30, 45, 60, 90, 120, 180, 300, 600]
_JOB_SECONDS: list[float] = [5, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 43200, 86400]
_HTTP_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2.5, 5, 10, 30, 60]

JOBS = Gauge(PREFIX + "jobs", "Jobs in the index, by state; those queued are the queue.", ("state",))
GPUS = Gauge(PREFIX + "gpus", "GPUs of the runner: ready (the engine answers) or starting.", ("state",))
STORED = Gauge(PREFIX + "stored_bytes", "Bytes on disk of the jobs that are over.")
JOB_WAIT = Histogram(
    PREFIX + "job_wait_seconds", "From a job's creation to its first start.", boundaries=_JOB_SECONDS
)
JOB = Histogram(
    PREFIX + "job_seconds",
    "From a job's first start to its end, by how it ended.",
    boundaries=_JOB_SECONDS,
    tag_keys=("outcome",),
)
SEAMS = Counter(PREFIX + "seams_total", "Seams of finished videos, by verdict.", ("verdict",))

WINDOW = Histogram(
    PREFIX + "window_seconds",
    "What one window took on a GPU.",
    boundaries=_RENDER_SECONDS,
    tag_keys=("gpu", "node", "profile"),
)
ALIVE = Counter(
    PREFIX + "gpu_alive_seconds_total",
    "Seconds in which a GPU had a renderer.",
    ("gpu", "node"),
)
BUSY = Counter(
    PREFIX + "gpu_busy_seconds_total", "Those of them in which it rendered a segment.", ("gpu", "node")
)
RETRIES = Counter(
    PREFIX + "segment_retries_total",
    "Segments whose renderer was lost, taken up again.",
    ("gpu", "node"),
)
RESTARTS = Counter(
    PREFIX + "engine_restarts_total", "Engines started in another one's place.", ("gpu", "node", "reason")
)

HTTP = Histogram(
    PREFIX + "http_answer_seconds",
    "From a request's first byte, its body included, to the first of the answer.",
    boundaries=_HTTP_SECONDS,
    tag_keys=("route", "method", "status"),
)
RECEIVED = Counter(PREFIX + "http_received_bytes_total", "Bytes of requests' bodies.", ("route",))
SENT = Counter(PREFIX + "http_sent_bytes_total", "Bytes of answers' bodies.", ("route",))

ALL: tuple[Metric, ...] = (
    *(JOBS, GPUS, STORED, JOB_WAIT, JOB, SEAMS),
    *(WINDOW, ALIVE, BUSY, RETRIES, RESTARTS),
    *(HTTP, RECEIVED, SENT),
)


# --- the runner --------------------------------------------------------------------------------------


def jobs_now(states: Mapping[JobState, int], stored_bytes: int) -> None:
    """How many jobs there are in each state, and what those that are over take on the disk."""
    for state, count in states.items():
        JOBS.set(count, {"state": state})
    STORED.set(stored_bytes)


def gpus_now(ready: int, starting: int) -> None:
    """The runner's GPUs."""
    GPUS.set(ready, {"state": "ready"})
    GPUS.set(starting, {"state": "starting"})


def job_started(waited_seconds: float) -> None:
    """A runner has taken a job for the first time."""
    JOB_WAIT.observe(max(0.0, waited_seconds))


def job_over(outcome: str, seconds: float) -> None:
    """A job in work is over: ``completed, failed, cancelled``."""
    JOB.observe(max(0.0, seconds), {"outcome": outcome})


def seams_made(verdicts: Mapping[str, int]) -> None:
    """Seams of a new video by their verdicts."""
    for verdict, count in verdicts.items():
        SEAMS.inc(count, {"verdict": verdict})


# --- renderers and their pool ------------------------------------------------------------------------


def window_done(gpu: int, node: str, profile: str, seconds: float) -> None:
    """A renderer has finished a window."""
    WINDOW.observe(seconds, {**_where(gpu, node), "profile": profile})


def segment_retried(gpu: int, node: str) -> None:
    """A segment goes back into the queue because its renderer on this GPU was lost."""
    RETRIES.inc(1, _where(gpu, node))


def engine_restarted(gpu: int, node: str, reason: str) -> None:
    """An engine is started in another one's place.

    ``lost``: it died or did not answer; ``memory``: with less on the GPU; ``packs``: with other nodes.
    """
    RESTARTS.inc(1, {**_where(gpu, node), "reason": reason})


class LaneClock:
    """The seconds of one GPU's renderer: all of them, and those in which it renders.

    A thread adds them every second, so that a window that takes minutes counts while it is rendered.
    """

    def __init__(self, gpu: int, node: str) -> None:
        self._labels = _where(gpu, node)
        self._lock = threading.Lock()
        self._busy = 0
        self._last = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="lane clock", daemon=True)
        self._thread.start()

    @contextmanager
    def busy(self) -> Iterator[None]:
        """The renderer renders."""
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def stop(self) -> None:
        """The renderer is no more."""
        self._ended.set()
        self._thread.join()

    def _tick(self) -> None:
        while not self._ended.wait(TICK_SECONDS):
            self._count(0)
        self._count(0)

    def _count(self, change: int) -> None:
        with self._lock:
            now = time.monotonic()
            gone, self._last = now - self._last, now
            if gone > 0:
                ALIVE.inc(gone, self._labels)
                if self._busy:
                    BUSY.inc(gone, self._labels)
            self._busy += change


def _where(gpu: int, node: str) -> dict[str, str]:
    return {"gpu": str(gpu), "node": node}


# --- the HTTP service --------------------------------------------------------------------------------


def http_answered(route: str, method: str, status: str, seconds: float, received: int, sent: int) -> None:
    """A request was answered; ``route`` is the path with its parameters' names."""
    HTTP.observe(seconds, {"route": route, "method": method, "status": status})
    if received:
        RECEIVED.inc(received, {"route": route})
    if sent:
        SENT.inc(sent, {"route": route})
