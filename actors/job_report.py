"""What the runner tells of its jobs in numbers: how many there are, and how each of them ended.

The numbers are those of the index, the metrics are defined in ``metrics``.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from actors import metrics
from pipeline.errors import JobNotFound
from pipeline.job_index import JobIndex
from pipeline.job_records import Job

REPORT_SECONDS = 2.0
"""Ray forgets a gauge that was not set for two of its own intervals (10 s each, if nobody changed them)."""

log = logging.getLogger(__name__)


class JobReport:
    """A thread that tells the state of the queue and of the pool.  ``state`` is ``JobRunner.state``."""

    def __init__(self, index: JobIndex, state: Callable[[], dict[str, Any]]) -> None:
        self._index, self._state = index, state
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="report", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Tell no more."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                metrics.jobs_now(self._index.counts(), self._index.finished_bytes())
            except SQLAlchemyError:
                log.exception("the index can't be read")
            state = self._state()
            metrics.gpus_now(state["gpus"], state["starting"])
            self._ended.wait(REPORT_SECONDS)


def tell_start(job: Job, claimed: float) -> None:
    """A runner has taken the job, not before ``claimed``; counted once, at a job's first start."""
    if job.started is not None and job.started >= claimed and "again" not in job.task:
        metrics.job_started(job.started - job.created)


def tell_end(index: JobIndex, job: str) -> None:
    """A runner has let go of the job: it is over, or in the queue again."""
    try:
        found = index.get(job)
    except JobNotFound:  # cancelled and forgotten
        return
    if found.finished is None or found.started is None:
        return
    metrics.job_over(found.state, found.finished - found.started)
    if found.state == "completed" and found.task["kind"] == "render":
        seams = (found.result or {}).get("seams", [])
        metrics.seams_made(Counter(seam["verdict"] for seam in seams))
