"""From a job in the store to a request that can be rendered: every source becomes a checked file here.

What is fetched lands in the job's ``received`` folder once, so a job that goes on needs no network.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from pipeline.errors import InvalidRequest, JobCancelled
from pipeline.job_records import Job
from pipeline.job_store import JobStore, sources_of
from pipeline.media_check import MediaLimits, check_media
from pipeline.request import RenderRequest
from pipeline.safe_fetch import FetchLimits, fetch
from pipeline.service_settings import ServiceSettings


def resolve(store: JobStore, job: Job, stop: threading.Event) -> RenderRequest:
    """The job's request with every file in place and looked at; ``stop`` ends it early.

    Raises ``InvalidRequest`` naming the field, ``StorageError``, ``JobCancelled``.
    """
    settings = store.settings
    files: dict[str, Path] = {}
    for field, source in sources_of(job).items():
        if stop.is_set():
            raise JobCancelled(job.id)
        if source.kind == "path":
            path = allowed_path(settings, field, source.value)
        elif source.kind == "file":
            path = store.received(job.id) / source.value
        else:
            path = store.received(job.id) / field
            if not path.exists():
                limits = FetchLimits(settings.max_upload_bytes, settings.fetch_seconds, settings.allowed)
                fetch(source.value, path, field, limits, stop)
        check_media(field, path, MediaLimits(settings.max_pixels, settings.max_seconds))
        files[field] = path
    return RenderRequest.checked(**job.fields, **files)


def allowed_path(settings: ServiceSettings, field: str, text: str) -> Path:
    """A file below one of the roots, symlinks resolved.  Raises ``InvalidRequest``.

    What is outside is told in the same words as what does not exist.
    """
    if not settings.roots:
        raise InvalidRequest(field, "paths are not taken here: INFINITETALK_SERVE_INPUT_ROOTS is not set")
    try:
        path = Path(text).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):
        path = None
    if path is None or not path.is_file() or not any(path.is_relative_to(root) for root in settings.roots):
        roots = os.pathsep.join(str(root) for root in settings.roots)
        raise InvalidRequest(field, f"no such file below {roots}")
    return path
