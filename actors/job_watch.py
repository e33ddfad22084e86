"""What a runner tells the index about the job in work, and how it learns that it must stop.

A thread renews the hold on the job several times in its lease; a job that was cancelled, or took too long,
ends at the next tick of its progress.
"""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType
from typing import Any, Literal

from sqlalchemy.exc import SQLAlchemyError

from pipeline.errors import JobCancelled
from pipeline.job_index import JobIndex
from pipeline.job_records import EventKind, Job
from pipeline.progress import JobProgress

KEEP_SECONDS = 0.5
"""Between two writes of a job's progress: what a client sees is at most so old."""

Reason = Literal["running", "cancelled", "timed_out", "stopping"]

log = logging.getLogger(__name__)


class JobWatch:
    """One job in work.  A context manager: its thread and its log handler live as long."""

    def __init__(self, index: JobIndex, job: Job, runner: str) -> None:
        self._index, self._job, self._runner = index, job, runner
        self.stop = threading.Event()
        """The job is to end; ``reason`` says why."""
        self._ended = threading.Event()
        self._values: dict[str, Any] = {"stage": "preparing"}
        self._segments: dict[int, str] = {}
        self._percent = -1
        self._handler = _ToEvents(index, job.id)
        self._thread = threading.Thread(target=self._keep, name="keep", daemon=True)
        limit = job.execution_seconds
        self._deadline = None if limit is None else (job.started or time.time()) + limit
        self._reason: Reason = "running"

    @property
    def reason(self) -> Reason:
        """Why the job is to end."""
        return "stopping" if self.stop.is_set() and self._reason == "running" else self._reason

    def __enter__(self) -> JobWatch:
        for name in _LOGGERS:
            logging.getLogger(name).addHandler(self._handler)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        for name in _LOGGERS:
            logging.getLogger(name).removeHandler(self._handler)

    def progress(self, seen: JobProgress) -> None:
        """Called by the driver, several times a second.  Raises ``JobCancelled``."""
        if self.stop.is_set():
            raise JobCancelled(self._job.id)
        for state in seen.states:
            if state.stage != self._segments.get(state.segment.index, "waiting"):
                self._segments[state.segment.index] = state.stage
                said = {"segment": state.segment.index, "stage": state.stage, "gpu": state.lane}
                self._tell("segment", said)
        share = {"joining": 99.0, "finished": 99.0}.get(seen.stage, round(99 * seen.fraction, 1))
        share = max(share, float(self._values.get("progress", 0)))  # a lost window is no news for a bar
        self._values = {
            "stage": seen.stage,
            "progress": share,
            "eta_seconds": seen.eta_seconds if seen.stage == "rendering" else None,
            "detail": _detail(seen),
        }
        if int(share) != self._percent:
            self._percent = int(share)
            told = {"progress": share, "stage": seen.stage, "eta_seconds": self._values["eta_seconds"]}
            self._tell("progress", told)

    def _tell(self, kind: EventKind, said: dict[str, Any]) -> None:
        """What is news for people only ends no job, where the index is gone for a moment."""
        try:
            self._index.tell(self._job.id, kind, said)
        except SQLAlchemyError:
            log.exception("the index can't be written", extra={"job": self._job.id})

    def flush(self) -> None:
        """Store how far it is now."""
        self._index.keep(self._job.id, self._runner, **self._values)

    def _keep(self) -> None:
        while not self._ended.wait(KEEP_SECONDS):
            if self._deadline is not None and time.time() > self._deadline:
                self._reason = "timed_out"
                self.stop.set()
            try:
                held = self._index.keep(self._job.id, self._runner, **self._values)
            except SQLAlchemyError:
                log.exception("the index can't be written", extra={"job": self._job.id})
                continue  # the lease tells whether it matters
            if not held and self._reason == "running":
                self._reason = "cancelled"
                self.stop.set()


_LOGGERS = ("pipeline", "actors")


class _ToEvents(logging.Handler):
    """The log of one job as events."""

    def __init__(self, index: JobIndex, job: str) -> None:
        super().__init__(logging.INFO)
        self._index, self._job = index, job

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "job", None) != self._job:
            return
        said = {"level": record.levelname.lower(), "message": record.getMessage()}
        said |= {key: getattr(record, key) for key in ("segment", "gpu") if hasattr(record, key)}
        try:
            self._index.tell(self._job, "log", said)
        except SQLAlchemyError:
            self.handleError(record)


def _detail(seen: JobProgress) -> dict[str, Any]:
    return {
        "windows_done": seen.windows_done,
        "windows_total": seen.windows_total,
        "gpus": seen.lanes,
        "segments": [
            {
                "index": state.segment.index,
                "first_frame": state.segment.start,
                "frames": state.segment.frames,
                "stage": state.stage,
                "gpu": state.lane,
                "windows_done": len(state.segment.windows)
                if state.stage == "finished"
                else state.windows_done,
                "windows": len(state.segment.windows),
                "fraction": round(state.fraction, 3),
                "window_seconds": [round(seconds, 2) for seconds in state.window_seconds],
            }
            for state in seen.states
        ],
    }
