"""The story of one video: prepare, plan, render every segment, join.

``render_video`` tells it; ``render_all`` is the part that maps segments to renderers.  Renderers are
behind a protocol, so this runs with Ray actors and, in tests, with threads.  No Ray, no HTTP, no drawing.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from pipeline.engine import EngineKind
from pipeline.errors import PipelineError, RendererLost, RenderFailed, StorageError
from pipeline.job import JobDirectory, storage_errors
from pipeline.messages import RenderedSegment, RendererInfo, SegmentProgress, SegmentTask
from pipeline.plan import Plan, Segment, calculate_segments
from pipeline.preparation import Preparation, prepare
from pipeline.progress import JobProgress, SegmentState
from pipeline.request import RenderRequest
from pipeline.seam import SeamReport
from pipeline.segment_files import SegmentFiles
from pipeline.sound import make_track
from pipeline.stitch import stitch
from pipeline.timeline import FPS, seconds_of
from pipeline.workflow import Workflow

TICK_SECONDS = 0.25
"""How often progress is asked for while nothing finishes."""

log = logging.getLogger(__name__)

OnProgress = Callable[[JobProgress], None]


class Renderers(Protocol):
    """Lanes that take one segment at a time; a lane whose renderer is lost gets a new one."""

    def start(self) -> Sequence[RendererInfo]:
        """Wait until the engines answer; one entry for each lane, lane 0 first."""

    def submit(self, task: SegmentTask, lane: int) -> Future[RenderedSegment]:
        """Render on a lane; fails with ``RendererLost`` where another try makes sense."""

    def progress(self) -> Sequence[SegmentProgress]:
        """How far the segments in work are."""

    def cancel(self) -> None:
        """Stop what is in work and wait for it."""


@dataclass(frozen=True, slots=True)
class RenderResult:
    """What a job gives; ``as_dict`` is the object of the API and of ``--json``."""

    job: str
    video_path: str
    engine: str
    gpu_count: int
    segments_processed: int
    frames: int
    width: int
    height: int
    seams: tuple[SeamReport, ...]
    timings: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        plural = "" if self.gpu_count == 1 else "s"
        return {
            "success": True,
            "video_path": self.video_path,
            "gpu_count": self.gpu_count,
            "segments_processed": self.segments_processed,
            "message": f"video created successfully using {self.gpu_count} GPU{plural}"
            + (" (draft engine: a preview, not the model)" if self.engine == "draft" else ""),
            "engine": self.engine,
            "job": self.job,
            "frames": self.frames,
            "fps": FPS,
            "duration": seconds_of(self.frames),
            "width": self.width,
            "height": self.height,
            "seams": [asdict(seam) for seam in self.seams],
            "timings": {name: round(seconds, 3) for name, seconds in self.timings.items()},
        }


def render_video(
    request: RenderRequest,
    job: JobDirectory,
    engine: EngineKind,
    workflow: Workflow,
    open_renderers: Callable[[], AbstractContextManager[Renderers]],
    target: Path,
    *,
    max_attempts: int,
    on_progress: OnProgress,
    make_plan: Callable[[int, int], Plan] | None = None,
) -> RenderResult:
    """Make one video; called again with the same job, it goes on with what is missing.

    ``make_plan(total_frames, gpu_count)`` replaces the planner (the bench's baseline does).
    Raises ``PipelineError``; what is finished stays in the job directory.
    """
    clock = _Clock()
    with job.locked():
        on_progress(JobProgress(job.name, "preparing"))
        job.write_json(job.path / "request.json", request.model_dump(mode="json"))
        prepared = prepare(request, job)
        with storage_errors(job.work):
            job.work.mkdir(exist_ok=True)
        clock.lap("prepare")
        with ThreadPoolExecutor(1, thread_name_prefix="sound") as background:
            # The whole track is encoded while the GPUs render.
            track = background.submit(
                make_track, prepared.sound, prepared.total_frames, job.work / "sound.mp4"
            )
            if (known := job.stored_plan()) and not _missing(known, job):
                plan, used = known, {segment.gpu for segment in known.segments}
            else:
                on_progress(JobProgress(job.name, "starting"))
                with open_renderers() as renderers:
                    infos = renderers.start()
                    _log_devices(infos)
                    clock.lap("start")
                    plan = known or _plan(request, prepared, len(infos), make_plan)
                    if known is None:
                        job.write_json(job.plan, plan.to_json())
                    _log_plan(plan, job)
                    recipe = prepared.recipe(request, job.name, workflow, plan)
                    task_for = partial(prepared.task, recipe, plan)
                    used = _render_missing(
                        job, plan, task_for, renderers, len(infos), max_attempts, on_progress
                    )
                    clock.lap("render")
            on_progress(JobProgress(job.name, "joining", 0, _states(plan, job, {}, {})))
            files = [SegmentFiles.in_folder(job.segment(segment.index)) for segment in plan.segments]
            seams = stitch(plan, files, track.result(), target, job.work)
        clock.lap("join")
        result = RenderResult(
            job.name,
            str(target),
            engine,
            len(used),
            len(plan.segments),
            plan.total_frames,
            prepared.width,
            prepared.height,
            seams,
            clock.laps(),
        )
        job.write_json(job.result, result.as_dict())
        log.info(
            "%s processing finished successfully, GPUs used: %d",
            "multi-GPU" if len(used) > 1 else "single-GPU",
            len(used),
            extra={
                "job": job.name,
                "engine": engine,
                "frames": plan.total_frames,
                "output": str(target),
            },
        )
        on_progress(JobProgress(job.name, "finished", 0, _states(plan, job, {}, {})))
        return result


def _plan(
    request: RenderRequest, prepared: Preparation, lanes: int, make_plan: Callable[[int, int], Plan] | None
) -> Plan:
    if make_plan is not None:
        return make_plan(prepared.total_frames, lanes)
    return calculate_segments(
        prepared.total_frames,
        lanes,
        overlap_frames=request.overlap_frames,
        use_multi_gpu=request.use_multi_gpu,
    )


def _missing(plan: Plan, job: JobDirectory) -> list[Segment]:
    return [segment for segment in plan.segments if not job.segment(segment.index).exists()]


def _render_missing(
    job: JobDirectory,
    plan: Plan,
    task_for: Callable[[Segment, int], SegmentTask],
    renderers: Renderers,
    lanes: int,
    max_attempts: int,
    on_progress: OnProgress,
) -> set[int]:
    """Render what is not there yet, storing each segment as it comes; the lanes that did something."""
    seconds: dict[int, tuple[float, ...]] = {}
    used: set[int] = set()

    def tick(on_lanes: dict[int, int]) -> None:
        running = {seen.index: seen for seen in renderers.progress()}
        on_progress(JobProgress(job.name, "rendering", lanes, _states(plan, job, on_lanes, running, seconds)))

    for done in render_all(_missing(plan, job), task_for, renderers, lanes, max_attempts, tick):
        with storage_errors(job.segment(done.index)):
            SegmentFiles.store(job.segment(done.index), done.files)
        seconds[done.index] = done.window_seconds
        used.add(done.lane)
        log.info(
            "segment %d processed successfully",
            done.index,
            extra={
                "job": job.name,
                "segment": done.index,
                "gpu": done.lane,
                "node": done.node,
                "attempt": done.attempt,
            },
        )
        tick({})
    return used


@dataclass(frozen=True, slots=True)
class _Attempt:
    segment: Segment
    number: int = 1
    lost_on: frozenset[int] = frozenset()


def render_all(
    segments: Sequence[Segment],
    task_for: Callable[[Segment, int], SegmentTask],
    renderers: Renderers,
    lanes: int,
    max_attempts: int,
    tick: Callable[[dict[int, int]], None],
) -> Iterator[RenderedSegment]:
    """Yield segments as they finish: longest first, each on its planned lane, or on any that is idle.

    A segment whose renderer is lost gets another try on another lane, ``max_attempts`` in all; a lane
    that lost that many in a row is left alone.  Any other error ends the job: ``RenderFailed`` with the
    segment and what its renderer said.  Whatever ends the iteration cancels what is still in work.

    ``tick`` gets the segments in work and their lanes several times a second.
    """
    waiting = [_Attempt(segment) for segment in segments]
    running: dict[Future[RenderedSegment], tuple[_Attempt, int]] = {}
    losses: Counter[int] = Counter()
    try:
        while waiting or running:
            busy = {lane for _, lane in running.values()}
            for lane in range(lanes):
                if lane in busy or losses[lane] >= max_attempts:
                    continue
                if chosen := _choose(waiting, lane, lanes):
                    waiting.remove(chosen)
                    task = task_for(chosen.segment, chosen.number)
                    running[renderers.submit(task, lane)] = (chosen, lane)
            done, _ = wait(running, timeout=TICK_SECONDS, return_when=FIRST_COMPLETED)
            tick({attempt.segment.index: lane for attempt, lane in running.values()})
            for future in done:
                attempt, lane = running.pop(future)
                try:
                    rendered = future.result()
                except RendererLost as lost:
                    losses[lane] += 1
                    waiting.append(_another_try(attempt, lane, lost, max_attempts))
                    if all(losses[other] >= max_attempts for other in range(lanes)):
                        raise RenderFailed(
                            attempt.segment.index, f"no renderer is left; {lost.reason}"
                        ) from lost
                except StorageError:
                    raise
                except PipelineError as error:
                    raise RenderFailed(attempt.segment.index, f"GPU {lane}: {error}") from error
                else:
                    losses[lane] = 0
                    yield rendered
    finally:
        if running:
            renderers.cancel()


def _choose(waiting: Sequence[_Attempt], lane: int, lanes: int) -> _Attempt | None:
    """The longest segment planned for this lane, else the longest of all; not one that was lost here."""
    fit = [a for a in waiting if lane not in a.lost_on or len(a.lost_on) >= lanes]
    return max(fit, key=lambda a: (a.segment.gpu == lane, a.segment.rendered, -a.segment.index), default=None)


def _another_try(attempt: _Attempt, lane: int, lost: RendererLost, max_attempts: int) -> _Attempt:
    if attempt.number >= max_attempts:
        raise RenderFailed(attempt.segment.index, f"lost {attempt.number} renderers; {lost.reason}") from lost
    log.warning(
        "segment %d lost its renderer and gets another try: %s",
        attempt.segment.index,
        lost.reason,
        extra={"segment": attempt.segment.index, "gpu": lane, "attempt": attempt.number + 1},
    )
    return _Attempt(attempt.segment, attempt.number + 1, attempt.lost_on | {lane})


def _states(
    plan: Plan,
    job: JobDirectory,
    lanes: dict[int, int],
    running: dict[int, SegmentProgress],
    seconds: dict[int, tuple[float, ...]] | None = None,
) -> tuple[SegmentState, ...]:
    states = []
    for segment in plan.segments:
        if job.segment(segment.index).exists():
            times = (seconds or {}).get(segment.index, ())
            states.append(
                SegmentState(segment, "finished", windows_done=len(segment.windows), window_seconds=times)
            )
        elif segment.index in lanes:
            seen = running.get(segment.index, SegmentProgress(segment.index, 0, 0.0, ()))
            states.append(
                SegmentState(
                    segment,
                    "rendering",
                    lanes[segment.index],
                    seen.windows_done,
                    seen.fraction,
                    seen.window_seconds,
                )
            )
        else:
            states.append(SegmentState(segment, "waiting"))
    return tuple(states)


def _log_devices(infos: Sequence[RendererInfo]) -> None:
    log.info("found %d %s", len(infos), "GPU device" if len(infos) == 1 else "GPU devices")
    for info in infos:
        log.info(
            "GPU %d: %s (%.1f GB)",
            info.lane,
            info.device,
            info.memory_gb,
            extra={"gpu": info.lane, "node": info.node, "engine": info.engine, "port": info.port},
        )


def _log_plan(plan: Plan, job: JobDirectory) -> None:
    log.info(
        "created %d %s for processing",
        len(plan.segments),
        "segment" if len(plan.segments) == 1 else "segments",
    )
    for segment in plan.segments:
        log.info(
            "GPU %d: frames %d-%d (%d frames)",
            segment.gpu,
            segment.start,
            segment.stop,
            segment.frames,
            extra={
                "job": job.name,
                "segment": segment.index,
                "gpu": segment.gpu,
                "windows": len(segment.windows),
            },
        )


class _Clock:
    """Seconds of each step of a job."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self._laps[f"{name}_seconds"] = now - self._last
        self._last = now

    def laps(self) -> dict[str, float]:
        return {**self._laps, "total_seconds": time.monotonic() - self._began}
