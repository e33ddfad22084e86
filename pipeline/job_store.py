"""A service's data directory: the index, and for each job what came in, its job directory, its video.

    index.sqlite             every job and what happened to it
    incoming/                files that are still arriving; nobody's yet
    jobs/<id>/received/      what the client gave, one file for each field
    jobs/<id>/work/          the job directory (``pipeline.job``)
    jobs/<id>/video.mp4      the result

Only this module joins these paths.  No Ray, no HTTP.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pipeline.errors import JobConflict, JobNotFound
from pipeline.job import JobDirectory, storage_errors
from pipeline.job_index import JobIndex
from pipeline.job_records import Job, NewJob
from pipeline.service_settings import ServiceSettings
from pipeline.stream import PLAYLIST


@dataclass(frozen=True, slots=True)
class Source:
    """Where one file of a request comes from."""

    kind: Literal["file", "url", "path"]
    """``file``: it came with the request and lies in the job's ``received``; ``url``: to be fetched before
    the job is rendered; ``path``: on a disk that the service may read, checked against its roots."""
    value: str
    """The file's name in ``received``, the URL, or the path."""


class JobStore:
    """The data directory."""

    def __init__(self, settings: ServiceSettings) -> None:
        self.settings = settings
        self.root = settings.data
        with storage_errors(self.root):
            for folder in (self.root, self.incoming, self.root / "jobs"):
                folder.mkdir(parents=True, exist_ok=True)
        self.index = JobIndex(settings.index_url)

    @property
    def incoming(self) -> Path:
        """For files that are still arriving; what nobody claims is removed after a day."""
        return self.root / "incoming"

    def job(self, job: str) -> Path:
        """All that belongs to a job."""
        return self.root / "jobs" / job

    def received(self, job: str) -> Path:
        """What the client gave."""
        return self.job(job) / "received"

    def work(self, job: str) -> Path:
        """The job directory."""
        return self.job(job) / "work"

    def playlist(self, job: str) -> Path:
        """Of what can be watched before the end; it exists when there is something, its pieces beside it."""
        return JobDirectory(self.work(job)).stream / PLAYLIST

    def video(self, job: str) -> Path:
        """The result; it exists when it is whole."""
        return self.job(job) / "video.mp4"

    def submit(self, new: NewJob, files: Mapping[str, Path]) -> tuple[Job, bool]:
        """Make a job of ``files`` (by their name in ``received``, moved from ``incoming``) and ``new``.

        On return all of it is on disk.  False: the idempotency key is known; that job is given.
        Raises ``QueueFull``, ``JobConflict``, ``StorageError``; the files are gone then.
        """
        folder = self.received(new.id)
        created = False
        try:
            with storage_errors(folder):
                folder.mkdir(parents=True)
                for name, path in files.items():
                    path.rename(folder / name)
                _flush(folder)
                _flush(folder.parent.parent)
            job, created = self.index.add(new, self.settings.max_queued)
        finally:
            if not created:
                shutil.rmtree(self.job(new.id), ignore_errors=True)
                for path in files.values():
                    path.unlink(missing_ok=True)
        return job, created

    def delete(self, job: str) -> None:
        """Forget a job and its files.  Raises ``JobNotFound``, ``JobConflict`` while it is in progress."""
        self.index.delete(job)
        shutil.rmtree(self.job(job), ignore_errors=True)

    def size(self, job: str) -> int:
        """Bytes of all that belongs to a job; files may go meanwhile."""
        total = 0
        for folder, _, names in os.walk(self.job(job)):
            for name in names:
                with suppress(FileNotFoundError):
                    total += Path(folder, name).lstat().st_size
        return total

    def weigh(self, job: str) -> int:
        """Note in the index what a job takes on the disk; the bytes."""
        if size := self.size(job):
            self.index.set_bytes(job, size)
        return size

    def let_go(self, job: str) -> None:
        """Its runner writes no more of a job: weigh it, or remove what was written after its deletion."""
        try:
            self.index.get(job)
        except JobNotFound:
            shutil.rmtree(self.job(job), ignore_errors=True)
        else:
            self.weigh(job)

    def left_behind(self) -> list[Path]:
        """Folders that were made again by what was still writing when their job was deleted.

        Only such without ``received``, which every job has: with another index, jobs are not taken for these.
        """
        bare = [folder for folder in (self.root / "jobs").iterdir() if not (folder / "received").exists()]
        known = self.index.states([folder.name for folder in bare])
        return [folder for folder in bare if folder.name not in known]

    def result(self, job: Job) -> Path:
        """The video of a completed job.  Raises ``JobConflict`` for any other."""
        path = self.video(job.id)
        if job.result is None or not path.exists():
            raise JobConflict(job.id, f"it is {job.state} and has no video")
        return path


def source_row(sources: Mapping[str, Source]) -> dict[str, dict[str, str]]:
    """For ``NewJob.sources``."""
    return {field: asdict(source) for field, source in sources.items()}


def sources_of(job: Job) -> dict[str, Source]:
    """The files of a job's request by field."""
    return {field: Source(**row) for field, row in job.sources.items()}  # type: ignore[arg-type]


def _flush(folder: Path) -> None:
    """Make a folder's new names survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
