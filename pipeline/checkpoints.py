"""The windows of an unfinished segment, kept in the job directory until the segment is whole.

A finished window is a folder of files (``SegmentFiles``: its parts of head, body and tail) and the frames
that the next window continues.  Whoever renders next, now or in another start of the job, needs only the
number of windows that are here and the last one's motion frames.  Where they lie is ``job``'s business, how
they come from a renderer ``render``'s.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from pathlib import Path

import numpy as np

from pipeline.errors import MediaError
from pipeline.job import JobDirectory, finished, storage_errors
from pipeline.messages import Blob, WindowCheckpoint
from pipeline.plan import Plan, Segment
from pipeline.segment_files import SegmentFiles, join_windows

KEPT_MOTION = 2
"""So many windows keep their motion frames, which are much larger than the rest: the last, and the one before
should the last be damaged."""

log = logging.getLogger(__name__)


def missing_segments(job: JobDirectory, plan: Plan) -> dict[int, KeptWindows]:
    """The segments of ``plan`` that are not finished, by index, with the windows of theirs that are.

    Everything is read and compared with its SHA-256; what is damaged will be made again.
    Raises ``MediaError``, ``StorageError``.
    """
    missing = {}
    for segment in plan.segments:
        kept = KeptWindows(job, segment)
        if _is_finished(job.segment(segment.index)):
            kept.forget()
        elif kept.complete:
            kept.become_segment()
        else:
            missing[segment.index] = kept
    return missing


def _is_finished(folder: Path) -> bool:
    """Whether a segment is there and whole; a damaged one is removed."""
    if not folder.exists():
        return False
    try:
        SegmentFiles.in_folder(folder).verify()
    except MediaError as error:
        log.warning("a kept segment is damaged and rendered again: %s", error)
        _remove(folder)
        return False
    return True


class KeptWindows:
    """The first windows of one segment, as far as they are finished."""

    def __init__(self, job: JobDirectory, segment: Segment) -> None:
        """Look at what is there.

        A damaged window is told in the log, and goes with all after it: they would continue other frames.
        Raises ``StorageError``.
        """
        self._job, self._segment = job, segment
        self._windows: list[SegmentFiles] = []
        try:
            while (folder := self._folder(self.count)).exists():
                files = SegmentFiles.in_folder(folder)
                files.verify()
                self._windows.append(files)
        except MediaError as error:
            self._warn(f"window {self.count} is damaged ({error})")
        found = self.count
        while self._windows and not self.complete and self._read_motion() is None:
            self._windows.pop()
        if self.count < found:
            self._warn(f"the last frames of window {found - 1} are missing or damaged")
        for folder in job.windows(segment.index).glob("[0-9]*"):
            if int(folder.name[:6]) >= self.count:
                _remove(folder)
        self._motion = None if self.complete else self._read_motion()

    def _warn(self, what: str) -> None:
        log.warning(
            "segment %d is rendered again from window %d on: %s",
            self._segment.index,
            self.count,
            what,
            extra={"job": self._job.name, "segment": self._segment.index},
        )

    @property
    def count(self) -> int:
        """Windows that need not be rendered again."""
        return len(self._windows)

    @property
    def complete(self) -> bool:
        """Whether all frames of the segment are here."""
        return sum(sum(files.frames.values()) for files in self._windows) == self._segment.frames

    @property
    def motion(self) -> Blob | None:
        """The frames that the next window continues, as ``WindowCheckpoint.motion``."""
        return self._motion

    def keep(self, checkpoint: WindowCheckpoint) -> None:
        """Store the next window, all or nothing; one that is here already is left alone.

        Raises ``MediaError`` where it was damaged on its way or is not the next one, ``StorageError``.
        """
        number = checkpoint.window
        if number < self.count:
            return
        if number > self.count:
            raise MediaError(f"segment {self._segment.index} got window {number} instead of {self.count}")
        # First the motion frames: a window that is there has them.
        if checkpoint.motion is not None:
            content = np.ascontiguousarray(checkpoint.motion).data
            with finished(self._motion_file(number)) as partial:
                partial.write_bytes(hashlib.sha256(content).digest() + content)
        self._windows.append(SegmentFiles.store(self._folder(number), checkpoint.files))
        # A copy: the view would hold the object in Ray's store for as long as the segment is in work.
        self._motion = None if checkpoint.motion is None else np.array(checkpoint.motion)
        if number >= KEPT_MOTION:
            with storage_errors(self._motion_file(number)):
                self._motion_file(number - KEPT_MOTION).unlink(missing_ok=True)

    def become_segment(self, folder: Path | None = None) -> None:
        """Join all windows to the finished segment (in ``folder``, for another take), and forget them.

        Raises ``MediaError``, ``StorageError``.
        """
        join_windows(self._windows, folder or self._job.segment(self._segment.index), self._job.work)
        self.forget()

    def forget(self) -> None:
        """Remove all windows."""
        shutil.rmtree(self._job.windows(self._segment.index), ignore_errors=True)
        self._windows, self._motion = [], None

    def _folder(self, window: int) -> Path:
        return self._job.window(self._segment.index, window)

    def _motion_file(self, window: int) -> Path:
        return self._job.window_motion(self._segment.index, window)

    def _read_motion(self) -> Blob | None:
        """The motion frames of the last window; None where they are gone or damaged."""
        if not self._windows:
            return None
        try:
            content = self._motion_file(self.count - 1).read_bytes()
        except OSError:
            return None
        digest, motion = content[:32], content[32:]
        return np.frombuffer(motion, np.uint8) if hashlib.sha256(motion).digest() == digest else None


def _remove(path: Path) -> None:
    with storage_errors(path):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
