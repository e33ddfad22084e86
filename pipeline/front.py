"""What can be done with a job's finished front while the rest renders: seams are joined, players see it.

Works in the background, in the job's process; no GPU waits for it.  What goes wrong here is told in the log
and never ends the job: a seam that is missing at the end is made then, a stream that broke off is
tried again then.  How a seam is made is ``kept_seams``' business, what players read ``stream``'s.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, nullcontext
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from pipeline.errors import MediaError, PipelineError
from pipeline.job import JobDirectory
from pipeline.kept_seams import Joint, KeptSeam, Timed, forget_seams, keep_seam, seam_workers
from pipeline.plan import Plan
from pipeline.seam import Method
from pipeline.segment_files import SegmentFiles
from pipeline.sound import encode_track
from pipeline.stitch import joints, video_parts
from pipeline.stream import Stream

TICK_SECONDS = 0.25
"""How often who waits for seams looks whether it shall stop."""

TRIES = 3
"""Looks in a row that may find files gone, and tries of a seam."""

log = logging.getLogger(__name__)

Track = tuple[Path, int]
"""A stream ``(path, index)``, of ``sound.make_track``."""


@dataclass(frozen=True, slots=True)
class Joining:
    """How a job's segments become its video."""

    method: Method
    speech: tuple[Path, ...]
    """The speakers' prepared tracks."""
    watched: bool
    """Whether players may see the front: only a job that is kept."""


class Front:
    """The finished front of one job, as a context manager; ``follow`` begins, ``look`` tells news."""

    def __init__(
        self,
        job: JobDirectory,
        joining: Joining,
        track: Future[Track],
        timed: Timed = lambda _: nullcontext(),
    ) -> None:
        self._job, self._joining, self._track, self._timed = job, joining, track, timed
        self._context = copy_context()  # logs say whose work it is
        self._plan: Plan | None = None
        self._seams: dict[int, Future[KeptSeam]] = {}
        self._failed: Counter[int] = Counter()
        """How often a seam could not be made."""
        self._news, self._over, self._aborted = threading.Event(), threading.Event(), threading.Event()
        self._lock = threading.RLock()  # a seam that is made at once is told while it is begun
        self._pool = ThreadPoolExecutor(seam_workers(), thread_name_prefix="seam")
        self._thread = threading.Thread(target=self._run, name="front", daemon=True)
        self._stack = ExitStack()
        self._stream: Stream | None = None
        track.add_done_callback(lambda _: self._news.set())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._aborted.set()
        self._end_thread()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._stack.close()

    def follow(self, plan: Plan) -> None:
        """Begin with what is finished of ``plan`` already."""
        self._plan = plan
        self._thread.start()
        self._news.set()

    def look(self) -> None:
        """A window or a segment is finished; returns at once."""
        self._news.set()

    def settle(self, tick: Callable[[], None]) -> None:
        """With all segments finished: wait for the seams.  ``tick`` is called meanwhile, and may raise."""
        assert self._plan is not None
        wanted = sum(frames > 0 for frames in self._plan.overlaps)
        while True:
            self._start_seams()
            with self._lock:
                seams = list(self._seams.values())
            left = wait(seams, timeout=TICK_SECONDS).not_done
            with self._lock:  # one that failed is begun again: nobody else may make it meanwhile
                if not left and len(self._seams) == wanted and all(seam.done() for seam in seams):
                    return
            tick()

    def finish(self, plan: Plan) -> None:
        """The video is joined: let players see all of it, and forget the seams of other takes."""
        self._end_thread()
        self._plan = plan
        self._told_only(self._finish)

    def _finish(self) -> None:
        assert self._plan is not None
        folders = [self._job.segment(segment.index) for segment in self._plan.segments]
        segments = [SegmentFiles.in_folder(folder) for folder in folders]
        wanted = joints(self._plan, segments, self._joining.method, self._joining.speech)
        seams = {joint.number: keep_seam(joint, self._job.seams) for joint in wanted}
        if stream := self._opened():
            stream.end(video_parts(segments, seams))
        forget_seams(self._job.seams, [seam.path for seam in seams.values()])

    def _run(self) -> None:
        self._told_only(self._work)

    def _work(self) -> None:
        tries = 0
        while True:
            self._news.wait()
            self._news.clear()
            if self._over.is_set():
                return
            try:
                self._start_seams()
                self._show()
                tries = 0
            except (MediaError, FileNotFoundError):
                # Windows that have just become a segment are gone, and the news of that comes.
                tries += 1
                if tries == TRIES:
                    raise

    def _told_only(self, work: Callable[[], None]) -> None:
        what = "the video can't be watched while it is made"
        try:
            work()
        except PipelineError as error:
            if not self._aborted.is_set():
                log.warning("%s: %s", what, error, extra={"job": self._job.name})
        except Exception:
            log.exception(what, extra={"job": self._job.name})

    def _end_thread(self) -> None:
        self._over.set()
        self._news.set()
        if self._thread.is_alive():
            self._thread.join()

    def _start_seams(self) -> None:
        """Begin with each seam whose two renderings are there."""
        assert self._plan is not None
        plan = self._plan
        with self._lock:
            for number, frames in enumerate(plan.overlaps):
                if not frames or number in self._seams:
                    continue
                earlier, later = self._finished(number), self._with_head(number + 1, frames)
                if earlier is None or later is None:
                    continue
                start = plan.segments[number + 1].start
                method, speech = self._joining.method, self._joining.speech
                joint = Joint(number, start, frames, earlier, later, method, speech)
                self._seams[number] = self._pool.submit(
                    self._context.copy().run, keep_seam, joint, self._job.seams, self._timed
                )
                self._seams[number].add_done_callback(partial(self._seam_is_made, number))

    def _seam_is_made(self, number: int, seam: Future[KeptSeam]) -> None:
        if not seam.cancelled() and (error := seam.exception()):
            with self._lock:
                self._failed[number] += 1
                again = self._failed[number] < TRIES
                if again:  # mostly the window that it read has just become a segment
                    del self._seams[number]
            extra = {"job": self._job.name}
            if again:
                log.debug("seam %d is tried again: %s", number, error, extra=extra)
            else:
                log.warning("seam %d will be made at the end: %s", number, error, extra=extra)
        self._news.set()

    def _show(self) -> None:
        parts = self._parts()
        if parts and (stream := self._opened()):
            stream.show(parts)

    def _opened(self) -> Stream | None:
        """The stream, once the sound is there; None for a job that nobody watches."""
        if self._stream is None and self._joining.watched and self._track.done() and self._plan is not None:
            path, _ = self._track.result()
            if path.parent != self._job.work:  # a video carries it as it is; for players it becomes AAC
                encode_track(path, self._plan.total_frames, self._job.work / "stream.mp4", self._aborted)
                path = self._job.work / "stream.mp4"
            self._stream = self._stack.enter_context(Stream(self._job.stream, path, self._plan.total_frames))
        return self._stream

    def _parts(self) -> list[tuple[Path, int]]:
        """The files ``(path, frames)`` that are finished, from the video's first frame on without a gap."""
        assert self._plan is not None
        overlaps = (*self._plan.overlaps, 0)
        parts: list[tuple[Path, int]] = []
        for index, overlap in enumerate(overlaps):
            segment = self._finished(index)
            pieces = self._windows(index) if segment is None else [segment]
            parts += [(files.path("body"), files.frames["body"]) for files in pieces if files.frames["body"]]
            if segment is None:
                break
            if overlap:
                seam = self._seams.get(index)
                if seam is None or not seam.done() or seam.exception() is not None:
                    break
                parts.append((seam.result().path, overlap))
        return parts

    def _finished(self, index: int) -> SegmentFiles | None:
        folder = self._job.segment(index)
        return SegmentFiles.in_folder(folder) if folder.exists() else None

    def _windows(self, index: int) -> list[SegmentFiles]:
        """The finished windows of an unfinished segment."""
        found: list[SegmentFiles] = []
        while (folder := self._job.window(index, len(found))).exists():
            found.append(SegmentFiles.in_folder(folder))
        return found

    def _with_head(self, index: int, frames: int) -> SegmentFiles | None:
        """A finished segment, or its first window, where that has the whole overlap."""
        segment = self._finished(index)
        windows = self._windows(index)[:1] if segment is None else [segment]
        return next((files for files in windows if files.frames["head"] == frames), None)
