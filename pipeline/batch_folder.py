"""The folder of a batch: the name of every file in it, and ``results.jsonl``, the truth about what is done.

    results.jsonl           a line for each job that ended, in the order of their ends
    talk-1.mp4 ...          the videos
    timelines/talk-1.json   what the GPUs did for each (``infinitetalk timeline OUT/timelines/*.json``)
    .infinitetalk/          jobs in work
        lock
        talk-1-0f3a.../     of one job: fetched/ (files that came over the network), job/ (pipeline.job)

Where the results go to a bucket, the folder is on this machine all the same; videos leave it when they are
stored, and ``results.jsonl`` is copied to the bucket, so that a rerun on another machine goes on from there.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipeline.batch_manifest import BatchJob
from pipeline.errors import InvalidRequest, StorageError
from pipeline.job import JobDirectory, finished, storage_errors
from pipeline.remote_files import read_whole, upload

RESULTS = "results.jsonl"
COPY_SECONDS = 10.0
"""Between two copies of ``results.jsonl`` to a bucket; the last one is made at the end."""

_JOB = re.compile(r"(.+)-[0-9a-f]{12}")

Record = dict[str, Any]
"""A line of ``results.jsonl``: docs/batch.md tells the fields."""

log = logging.getLogger("batch")


@dataclass(frozen=True, slots=True)
class BatchFolder:
    """Where a batch lives."""

    path: Path
    address: str | None = None
    """``s3://bucket/prefix`` where the results are to go there."""

    @property
    def results(self) -> Path:
        return self.path / RESULTS

    @property
    def work(self) -> Path:
        return self.path / ".infinitetalk"

    def job(self, job: BatchJob, digest: str) -> Path:
        """The folder of a job while it is not done; a line that was changed gets another one."""
        return self.work / f"{job.id}-{digest[:12]}"

    def video(self, job: BatchJob) -> Path:
        """Where the finished video appears on this machine."""
        return self.path / job.output

    def keep_timeline(self, job: BatchJob, made: JobDirectory) -> None:
        """A job's timeline stays when the rest of its folder goes.  Raises ``StorageError``."""
        with finished(self.path / "timelines" / f"{job.id}.json") as partial:
            shutil.copyfile(made.timeline, partial)

    def place(self, job: BatchJob) -> str:
        """Where the video is to be found in the end: a path or an address."""
        return str(self.video(job)) if self.address is None else f"{self.address}/{quote(job.output)}"

    def left_over(self) -> dict[str, list[Path]]:
        """Folders of jobs in work, by job; several where its line was changed meanwhile."""
        found: dict[str, list[Path]] = {}
        for folder in self.work.iterdir():
            if mark := _JOB.fullmatch(folder.name):
                found.setdefault(mark[1], []).append(folder)
        return found

    def holds(self, place: str) -> bool:
        """Whether something is the folder or in it, or goes to its address."""
        roots = [str(self.path), *([] if self.address is None else [self.address])]
        return any(place == root or place.startswith(f"{root}/") for root in roots)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder: a second batch on it gets an ``InvalidRequest``.  Raises ``StorageError``."""
        with storage_errors(self.work):
            self.work.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.work / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InvalidRequest("out", f"another batch is at work in {self.path}") from None
            yield
        finally:
            os.close(lock)


class Results:
    """``results.jsonl``: what it says, and new lines at its end.  May be called from several threads."""

    def __init__(self, folder: BatchFolder) -> None:
        """Read it, from the bucket too.  Raises ``StorageError``."""
        self._path, self._address = folder.results, None
        self._lock = threading.Lock()
        self._copied, self._next_copy = True, 0.0
        with storage_errors(self._path):
            _repair(self._path)
            lines = _split(self._path.read_bytes()) if self._path.exists() else []
        if folder.address is not None:
            self._address = f"{folder.address}/{RESULTS}"
            lines = self._with_those_of_the_bucket(lines)
        self.last: dict[str, Record] = {}
        """The last line of each job."""
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                self.last[str(record["id"])] = record
            except (ValueError, KeyError, TypeError):
                log.warning("line %d of %s is none of ours and is left alone", number, self._path)

    def append(self, record: Record) -> None:
        """Add a line: all of it or nothing, on the disk when this returns.  Raises ``StorageError``."""
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        with self._lock:
            with storage_errors(self._path):
                file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
                try:
                    size = os.fstat(file).st_size
                    if (written := os.write(file, line)) < len(line):  # one call: no kill comes in between
                        os.ftruncate(file, size)
                        raise StorageError(str(self._path), f"only {written} of {len(line)} bytes fit")
                    os.fsync(file)
                finally:
                    os.close(file)
            self.last[record["id"]] = record
            self._copied = False
            if self._address is not None and time.monotonic() >= self._next_copy:
                self._copy()

    def close(self) -> None:
        """Copy what the bucket does not have yet.  Raises ``StorageError``."""
        with self._lock:
            if self._address is not None and not self._copied:
                self._copy()

    def _copy(self) -> None:
        assert self._address is not None
        upload(self._path, self._address, "application/x-ndjson")
        self._copied, self._next_copy = True, time.monotonic() + COPY_SECONDS

    def _with_those_of_the_bucket(self, lines: list[str]) -> list[str]:
        assert self._address is not None
        there = _split(read_whole(self._address) or b"")
        known = set(there)
        merged = sorted(there + [line for line in lines if line not in known], key=_ended)
        if merged != lines:
            with finished(self._path) as partial:
                partial.write_text("".join(line + "\n" for line in merged))
        self._copied = merged == there
        return merged


def _repair(path: Path) -> None:
    """Cut a line off that a power cut or a full disk left half written: its job is done again."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        log.warning("the last line of %s is not whole and is cut off", path)
        os.truncate(path, whole)


def _split(content: bytes) -> list[str]:
    """Lines as JSON lines has them: other characters that end a line may stand in a text."""
    return [line for line in content.decode(errors="replace").split("\n") if line]


def _ended(line: str) -> str:
    try:
        return str(json.loads(line)["ended"])
    except (ValueError, KeyError, TypeError):
        return ""
