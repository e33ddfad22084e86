"""From a job in the store to a request that can be rendered: every source becomes a file here.

What is fetched lands in the job's ``received`` folder once, so a job that goes on needs no network.
"""

from __future__ import annotations

import threading
from pathlib import Path

from pipeline.errors import InvalidRequest
from pipeline.job_index import Job
from pipeline.job_store import JobStore, sources_of
from pipeline.request import RenderRequest


def resolve(store: JobStore, job: Job, stop: threading.Event) -> RenderRequest:
    """The job's request with every file in place; ``stop`` ends it early, with ``JobCancelled``.

    Raises ``InvalidRequest`` naming the field, ``StorageError``.
    """
    files: dict[str, Path] = {}
    for field, source in sources_of(job).items():
        if source.kind == "file":
            files[field] = store.received(job.id) / source.value
        elif source.kind == "path":
            files[field] = Path(source.value)
        else:
            raise InvalidRequest(field, "URLs are not taken yet")
    return RenderRequest.checked(**job.fields, **files)
