"""What every GPU did for a job, and when: spans of time, what they add up to, and the formats they leave in.

Pure: no clock, no files.  ``timeline_recorder`` makes the spans while a job runs, ``timeline_picture`` draws
them.  A *start* is one run of the driver; a job that was broken off and goes on has several.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from pipeline.errors import InvalidRequest

VERSION = 1

Stage = Literal["queued", "preparing", "starting", "waiting", "joining"]
"""Steps of the job as a whole: ``starting`` until engines answer, ``waiting`` while segments wait and no GPU
renders any of them.  ``queued``: before a runner took it, as the service's index knows."""
Kind = Literal["queued", "preparing", "starting", "waiting", "joining", "seam", "segment", "window"]
Outcome = Literal["done", "lost", "cancelled", "failed", "open"]
"""``lost``: its renderer was; ``open``: still in work when this was written."""

ON_GPU = ("segment", "window")
Place = tuple[str, int]
"""A GPU: its node, and its number in the pool."""


@dataclass(frozen=True, slots=True)
class Span:
    """Something that lasted; times are seconds since 1970 by the driver's clock."""

    kind: Kind
    begin: float
    end: float
    gpu: int | None = None
    """The lane; None for what no GPU does."""
    node: str | None = None
    segment: int | None = None
    """Of a segment and its windows."""
    number: int | None = None
    """Of a window in its segment, of a seam in the video."""
    attempt: int | None = None
    outcome: Outcome = "done"
    start: int = 0
    """Which start of the job it belongs to."""

    @property
    def seconds(self) -> float:
        return self.end - self.begin

    @property
    def place(self) -> Place | None:
        """The GPU that was at work."""
        return None if self.gpu is None else (self.node or "", self.gpu)


@dataclass(frozen=True, slots=True)
class JobTimeline:
    """All spans of a job, of all its starts, by their begin."""

    job: str
    spans: tuple[Span, ...] = ()

    @property
    def began(self) -> float:
        """The first moment, seconds since 1970; 0 for a timeline without spans."""
        return min((span.begin for span in self.spans), default=0.0)

    @property
    def starts(self) -> int:
        """Starts so far."""
        return max((span.start + 1 for span in self.spans), default=0)

    def queued(self, since: float) -> JobTimeline:
        """With the time that the job waited in a queue before its first start."""
        if since >= self.began:
            return self
        return replace(self, spans=(Span("queued", since, self.began), *self.spans))

    def to_json(self) -> dict[str, Any]:
        """A JSON object, to the millisecond; ``at`` is a span's begin since the job's first moment."""
        spans = [replace(span, begin=round(span.begin, 3), end=round(span.end, 3)) for span in self.spans]
        told = replace(self, spans=tuple(spans))
        return {
            "version": VERSION,
            "job": told.job,
            "began": told.began,
            "numbers": numbers([told]),
            "spans": [_span_json(span, told.began) for span in spans],
        }

    @classmethod
    def from_json(cls, data: Any) -> JobTimeline:
        """What ``to_json`` made.  Raises ``InvalidRequest`` for anything else."""
        try:
            if data["version"] != VERSION:
                raise InvalidRequest("timeline", f"is of version {data['version']}, not {VERSION}")
            return cls(str(data["job"]), tuple(_span(entry) for entry in data["spans"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidRequest("timeline", f"is damaged ({type(error).__name__}: {error})") from error


def _span_json(span: Span, began: float) -> dict[str, Any]:
    told = {
        "kind": span.kind,
        "begin": span.begin,
        "end": span.end,
        "at": round(span.begin - began, 3),
        "seconds": round(span.seconds, 3),
        "gpu": span.gpu,
        "node": span.node,
        "segment": span.segment,
        "number": span.number,
        "attempt": span.attempt,
        "outcome": span.outcome,
        "start": span.start,
    }
    return {name: value for name, value in told.items() if value is not None}


def _span(entry: dict[str, Any]) -> Span:
    fields = {name: value for name, value in entry.items() if name not in ("at", "seconds")}
    span = Span(**fields)
    if span.kind not in get_args(Kind) or span.outcome not in get_args(Outcome):
        raise ValueError(f"there is no span {span.kind!r} that is {span.outcome!r}")
    if not float(span.begin) <= float(span.end):
        raise ValueError(f"a span ends at {span.end}, before it begins")
    return span


# --- sums --------------------------------------------------------------------------------------------


def numbers(jobs: Sequence[JobTimeline], start: int | None = None) -> dict[str, float]:
    """What one or several jobs come to; of one start only where it is given.

    ``gpu_busy_share`` is the time of all windows over that of all GPUs that appear, from the first segment's
    begin to the last one's end (with several jobs or starts: the union of those times, so that a night in
    which nothing ran does not count).  Transport, storing and lost work all count against it.
    ``lost_gpu_seconds`` are those of runs that were lost or cancelled, without their finished windows.

    >>> two = JobTimeline("j", (Span("segment", 0, 10, gpu=0), Span("window", 0, 9, gpu=0)))
    >>> numbers([two])["gpu_busy_share"]
    0.9
    """
    chosen = [[span for span in job.spans if start is None or span.start == start] for job in jobs]
    spans = [span for part in chosen for span in part]
    on_gpu = [span for span in spans if span.kind in ON_GPU]
    periods = [
        (min(span.begin for span in run), max(span.end for span in run))
        for part in chosen
        for number in sorted({span.start for span in part})
        if (run := [span for span in part if span.start == number and span.kind in ON_GPU])
    ]
    gpus = len({span.place for span in on_gpu})
    period = covered(periods)
    windows = sum(span.seconds for span in on_gpu if span.kind == "window")
    broken = {_run(span) for span in on_gpu if span.outcome not in ("done", "open")}
    lost = sum(
        span.seconds if span.kind == "segment" else -span.seconds for span in on_gpu if _run(span) in broken
    )
    told = {
        "gpus": gpus,
        "render_seconds": period,
        "gpu_seconds": windows,
        "gpu_busy_share": windows / (gpus * period) if gpus and period else 0.0,
        "lost_gpu_seconds": lost,
    }
    for kind in get_args(Stage):
        told[f"{kind}_seconds"] = sum(span.seconds for span in spans if span.kind == kind)
    return {name: round(value, 4) for name, value in told.items()}


def _run(span: Span) -> tuple[Place | None, int | None, int | None, int]:
    """The same for a segment's run and for its windows."""
    return span.place, span.segment, span.attempt, span.start


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union.

    >>> covered([(0, 2), (1, 3), (10, 11)])
    4.0
    """
    return sum((end - begin for begin, end in union(intervals)), 0.0)


def union(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same times without overlaps, in order."""
    merged: list[tuple[float, float]] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def with_nodes(jobs: Sequence[JobTimeline]) -> list[JobTimeline]:
    """The node of a GPU that a job lost before it heard of it, as the other spans know it."""
    known = {span.gpu: span.node for job in jobs for span in job.spans if span.node is not None}
    return [
        replace(
            job,
            spans=tuple(
                replace(span, node=known.get(span.gpu)) if span.gpu is not None and not span.node else span
                for span in job.spans
            ),
        )
        for job in jobs
    ]


def rows(spans: Sequence[Span]) -> list[list[Span]]:
    """Spans that overlap go into different rows; as few rows as possible."""
    made: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: (span.begin, span.end)):
        row = next((row for row in made if row[-1].end <= span.begin), None)
        if row is None:
            made.append(row := [])
        row.append(span)
    return made


# --- Chrome's trace format ---------------------------------------------------------------------------

FIRST_JOB = 1000
"""Processes from here on are jobs, those before it nodes."""


def chrome_trace(jobs: Sequence[JobTimeline]) -> dict[str, Any]:
    """The *JSON object format* of Chrome's trace events, which Perfetto and ``chrome://tracing`` load.

    A process for each node with a thread for each GPU, then one for each job with its steps and its seams.
    Times are microseconds since the first span.
    """
    jobs = with_nodes(jobs)
    origin = min((job.began for job in jobs if job.spans), default=0.0)
    events: list[dict[str, Any]] = []
    places = sorted({span.place for job in jobs for span in job.spans if span.place is not None})
    nodes = {node: number for number, node in enumerate(dict.fromkeys(node for node, _ in places), 1)}
    for node, pid in nodes.items():
        events.append(_named("process_name", pid, 0, node or "unknown node"))
    for node, gpu in places:
        events.append(_named("thread_name", nodes[node], gpu, f"GPU {gpu}"))
        here = [(job, span) for job in jobs for span in job.spans if span.place == (node, gpu)]
        runs = sorted((pair for pair in here if pair[1].kind == "segment"), key=lambda pair: pair[1].begin)
        # A lane goes on to the next job a moment before its last one has heard of the end.
        ends = [pair[1].begin for pair in runs[1:]] + [float("inf")]
        for (job, run), limit in zip(runs, ends, strict=True):
            end = min(run.end, limit)
            events.append(_event(job, replace(run, end=end), nodes[node], gpu, origin))
            events += [
                _event(job, replace(span, end=min(span.end, end)), nodes[node], gpu, origin)
                for other, span in here
                if other is job and span.kind == "window" and _within(span, run) and span.begin < end
            ]
    for pid, job in enumerate(jobs, FIRST_JOB):
        events.append(_named("process_name", pid, 0, f"job {job.job}"))
        steps = rows([span for span in job.spans if span.gpu is None and span.kind != "seam"])
        seams = rows([span for span in job.spans if span.kind == "seam"])
        for tid, row in enumerate((*steps, *seams)):
            events.append(_named("thread_name", pid, tid, "seams" if tid >= len(steps) else "steps"))
            events += [_event(job, span, pid, tid, origin) for span in row]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _within(window: Span, run: Span) -> bool:
    return _run(window) == _run(run) and run.begin <= window.begin <= run.end


def _named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def _event(job: JobTimeline, span: Span, pid: int, tid: int, origin: float) -> dict[str, Any]:
    return {
        "name": title(span),
        "cat": span.kind,
        "ph": "X",
        "ts": round(1e6 * (span.begin - origin)),
        "dur": round(1e6 * (span.end - origin)) - round(1e6 * (span.begin - origin)),
        "pid": pid,
        "tid": tid,
        "args": {"job": job.job, "start": span.start, "outcome": span.outcome, "attempt": span.attempt},
    }


def title(span: Span) -> str:
    """What a span is, in a few words."""
    lost = "" if span.outcome == "done" else f" ({span.outcome})"
    if span.kind == "segment":
        return f"segment {span.segment}{lost}"
    if span.kind == "window":
        return f"segment {span.segment} window {span.number}{lost}"
    return f"seam {span.number}" if span.kind == "seam" else span.kind
