"""What a service forgets: finished jobs that are too old or too many, and uploads that nobody claimed."""

from __future__ import annotations

import logging
import shutil
import time
from contextlib import suppress

from pipeline.errors import JobConflict, JobNotFound
from pipeline.job_store import JobStore

INCOMING_SECONDS = 24 * 3600
"""An upload that takes longer has broken off."""
LEFT_SECONDS = 3600
"""So long after the last write nothing makes a job of a folder, or writes into one that has none."""

log = logging.getLogger(__name__)


def clean_up(store: JobStore) -> list[str]:
    """Delete what the settings no longer keep, oldest first; the ids of the deleted jobs.

    Jobs that wait or are in progress are never touched.
    """
    settings = store.settings
    now = time.time()
    for path in store.incoming.iterdir():
        with suppress(FileNotFoundError):  # it has become a job's
            if now - path.stat().st_mtime > INCOMING_SECONDS:
                path.unlink()
    for folder in store.left_behind():
        with suppress(FileNotFoundError):
            if now - folder.stat().st_mtime > LEFT_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
    # What no runner has weighed: cancelled or too late while it waited, or its runner was killed.
    over = [(job, ended, size or store.weigh(job)) for job, ended, size in store.index.finished_sizes()]
    total = sum(size for _, _, size in over)
    deleted = []
    for job, finished, size in over:
        too_old = now - finished > settings.keep_days * 86_400
        if not too_old and total <= settings.keep_bytes:
            break
        try:
            store.delete(job)
        except (JobNotFound, JobConflict):  # a client was faster: deleted, or queued again
            continue
        total -= size
        deleted.append(job)
        log.info("deleted: %s", "too old" if too_old else "the oldest of too many", extra={"job": job})
    return deleted
