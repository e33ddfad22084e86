"""From a request's fields and files to a job in the store: what every API shares.

An API brings names and values in its own words; here they become ``RenderRequest`` fields and ``Source``s.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import InvalidRequest
from pipeline.job_records import Job, NewJob
from pipeline.job_store import JobStore, Source, source_row
from pipeline.request import RenderRequest

FILE_FIELDS = ("image", "video", "audio", "audio_2", "mask_1", "mask_2")


@dataclass(frozen=True, slots=True)
class Submission:
    """A request as an API understood it."""

    api: str
    owner: str
    fields: dict[str, Any]
    """Of ``RenderRequest``, without the files."""
    sources: dict[str, Source]
    """By file field; those of kind ``file`` are named as in ``files``."""
    files: dict[str, Path] = field(default_factory=dict)
    """Arrived files in ``incoming`` by the name they get in the job."""
    priority: int = 0
    idempotency_key: str | None = None
    queue_seconds: float | None = None
    execution_seconds: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def submit(store: JobStore, submission: Submission) -> tuple[Job, bool]:
    """Check and store; on return the job is durable.  False: its idempotency key was known.

    Raises ``InvalidRequest``, ``QueueFull``, ``JobConflict``, ``StorageError``; arrived files are gone then.
    """
    try:
        check(submission)
        new = NewJob(
            api=submission.api,
            owner=submission.owner,
            fields=submission.fields,
            sources=source_row(submission.sources),
            fingerprint=_fingerprint(submission),
            priority=submission.priority,
            idempotency_key=submission.idempotency_key,
            queue_seconds=submission.queue_seconds or store.settings.queue_seconds,
            execution_seconds=submission.execution_seconds or store.settings.job_seconds,
            extra=submission.extra,
        )
    except BaseException:
        for path in submission.files.values():
            path.unlink(missing_ok=True)
        raise
    return store.submit(new, submission.files)


def check(submission: Submission) -> RenderRequest:
    """All that can be checked without opening a file.  Raises ``InvalidRequest`` naming the field."""
    unknown = sorted(set(submission.sources) - set(FILE_FIELDS))
    if unknown:
        raise InvalidRequest(unknown[0], "no file is taken here")
    files = {name: Path(source.value) for name, source in submission.sources.items()}
    return RenderRequest.checked(**submission.fields, **files)


def _fingerprint(submission: Submission) -> str:
    digest = hashlib.sha256()
    told = {name: source.value for name, source in submission.sources.items() if source.kind != "file"}
    digest.update(json.dumps([submission.fields, told], sort_keys=True, default=str).encode())
    for name in sorted(submission.files):
        with submission.files[name].open("rb") as file:
            digest.update(name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
