"""Writes a job's timeline while the job runs, into its directory; a job that goes on appends to it.

The driver tells of its steps and its tasks as they come; nothing is asked of anybody.  What spans are, and
what they add up to, is in ``job_timeline``.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace

from pipeline.errors import InvalidRequest, JobCancelled, RendererLost, StorageError
from pipeline.job import JobDirectory
from pipeline.job_timeline import JobTimeline, Outcome, Span, Stage, numbers
from pipeline.messages import RenderedSegment, RendererInfo, SegmentProgress, SegmentTask

SAVE_SECONDS = 5.0
"""Between two writes: so much of a timeline a killed driver loses at most."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Run:
    """A task in work on a lane."""

    segment: int
    lane: int
    attempt: int
    first: int
    begin: float
    seconds: tuple[float, ...] = ()
    """Of its windows so far."""


class TimelineRecorder:
    """The timeline of one start of a job.  All methods may be called from any thread.

    Windows are known by how long they took: they stand end to end from the moment their task was sent, and
    what the task took beyond them, storing and transport, stands at its end.
    """

    def __init__(self, job: JobDirectory) -> None:
        """Goes on where the directory has a timeline already; one that is damaged is begun anew."""
        self._job = job
        self._lock = threading.RLock()
        self._clock = _Clock()
        earlier = _read(job)
        self._spans = list(earlier.spans)
        self._start = earlier.starts
        self._stage: tuple[Stage, float] | None = None
        self._rendering = False
        self._runs: dict[Future[RenderedSegment], _Run] = {}
        self._nodes: dict[int, str] = {}
        self._next_save = 0.0
        self._trouble = False

    def stage(self, stage: Stage | None) -> None:
        """The step that the job is at from now on; ``waiting`` is left whenever a GPU renders."""
        with self._lock:
            self._rendering = stage == "waiting"
            self._change(stage, self._clock.now())
        self.save()

    def _change(self, stage: Stage | None, now: float) -> None:
        if self._stage is not None:
            self._spans.append(Span(self._stage[0], self._stage[1], now, start=self._start))
        self._stage = None if stage is None else (stage, now)

    def rendered(self) -> None:
        """Every segment is there: what came after the last of them was storing, and no wait for a GPU."""
        with self._lock:
            self._rendering, self._stage = False, None

    def know(self, infos: Sequence[RendererInfo]) -> None:
        """On which nodes lanes are."""
        with self._lock:
            self._nodes.update({info.lane: info.node for info in infos})

    def sent(self, task: SegmentTask, lane: int, work: Future[RenderedSegment]) -> None:
        """A task went to a lane; its end is noted by itself."""
        with self._lock:
            now = self._clock.now()
            self._runs[work] = _Run(task.index, lane, task.attempt, task.first, now)
            if self._rendering and self._stage is not None:
                self._change(None, now)
        work.add_done_callback(self._ended)

    def seen(self, progress: Sequence[SegmentProgress]) -> None:
        """How far tasks are: all that is known of one whose renderer is lost later."""
        with self._lock:
            for entry in progress:
                runs = [run for run in self._runs.values() if run.segment == entry.index]
                if len(runs) == 1:  # of two runs of a segment nobody says which one speaks
                    runs[0].seconds = entry.window_seconds
            due = self._clock.now() >= self._next_save
        if due:
            self.save()

    def _ended(self, work: Future[RenderedSegment]) -> None:
        now = self._clock.now()
        with self._lock:
            run = self._runs.pop(work)
            outcome, node = _outcome(work), None
            if outcome == "done":
                rendered = work.result()
                run.seconds, node = rendered.window_seconds, rendered.node
                self._nodes[run.lane] = node
            self._spans += self._spans_of(run, now, outcome)
            if self._rendering and not self._runs and self._stage is None:
                self._stage = ("waiting", now)

    def _spans_of(self, run: _Run, end: float, outcome: Outcome) -> list[Span]:
        whole = Span(
            "segment",
            run.begin,
            end,
            gpu=run.lane,
            node=self._nodes.get(run.lane),
            segment=run.segment,
            attempt=run.attempt,
            outcome=outcome,
            start=self._start,
        )
        spans, begin = [whole], run.begin
        for number, seconds in enumerate(run.seconds, run.first):
            until = min(end, begin + seconds)
            spans.append(replace(whole, kind="window", begin=begin, end=until, number=number, outcome="done"))
            begin = until
        return spans

    @contextmanager
    def seam(self, number: int) -> Iterator[None]:
        """A seam is being made."""
        begin = self._clock.now()
        try:
            yield
        finally:
            with self._lock:
                end = self._clock.now()
                self._spans.append(Span("seam", begin, end, number=number, start=self._start))

    def timeline(self) -> JobTimeline:
        """All that is known by now, with what is still in work."""
        with self._lock:
            now = self._clock.now()
            spans = list(self._spans)
            for run in self._runs.values():
                spans += self._spans_of(run, now, "open")
            if self._stage is not None:
                stage, begin = self._stage
                spans.append(Span(stage, begin, now, outcome="open", start=self._start))
        spans.sort(key=lambda span: (span.begin, -span.end))
        return JobTimeline(self._job.name, tuple(spans))

    def numbers(self) -> dict[str, float]:
        """The main ones of ``job_timeline.numbers``, of this start."""
        found = numbers([self.timeline()], self._start)
        return {name: found[name] for name in ("gpu_seconds", "gpu_busy_share", "waiting_seconds")}

    def save(self) -> None:
        """Write it; what can't be written is told once, and costs nobody the video."""
        with self._lock:
            self._next_save = self._clock.now() + SAVE_SECONDS
            try:
                self._job.write_json(self._job.timeline, self.timeline().to_json())
            except StorageError as error:
                if not self._trouble:
                    log.warning("the timeline is not kept: %s", error, extra={"job": self._job.name})
                self._trouble = True


@contextmanager
def recording(job: JobDirectory) -> Iterator[TimelineRecorder]:
    """Record one start of the job; the timeline is stored however it ends."""
    recorder = TimelineRecorder(job)
    try:
        yield recorder
    finally:
        recorder.stage(None)


def stored_timeline(job: JobDirectory) -> JobTimeline:
    """The timeline in a job directory.  Raises ``InvalidRequest`` where there is none that can be read."""
    try:
        return JobTimeline.from_json(json.loads(job.timeline.read_text()))
    except FileNotFoundError:
        raise InvalidRequest("job", f"{job.path} has no timeline") from None
    except (OSError, ValueError) as error:
        raise InvalidRequest("job", f"{job.timeline} can't be read: {error}") from error


def _read(job: JobDirectory) -> JobTimeline:
    if job.timeline.exists():
        try:
            return stored_timeline(job)
        except InvalidRequest as error:
            log.warning("the job's timeline is begun anew: %s", error, extra={"job": job.name})
    return JobTimeline(job.name)


def _outcome(work: Future[RenderedSegment]) -> Outcome:
    if work.cancelled():
        return "cancelled"
    error = work.exception()
    if error is None:
        return "done"
    if isinstance(error, RendererLost):
        return "lost"
    return "cancelled" if isinstance(error, JobCancelled) else "failed"


class _Clock:
    """Seconds since 1970 that never jump while a job runs."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def now(self) -> float:
        return self._offset + time.monotonic()
