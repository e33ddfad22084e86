"""The story of one video: prepare, plan, render every segment, join.

Which renderer takes which segment is ``dispatch``'s business.  No Ray, no HTTP, no drawing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from pipeline.checkpoints import KeptWindows, missing_segments
from pipeline.dispatch import Held, Renderers, render_all
from pipeline.engine import EngineKind
from pipeline.front import Front, Joining
from pipeline.job import JobDirectory, storage_errors
from pipeline.logs import log_about
from pipeline.messages import NodeRuns, RendererInfo, SegmentProgress, SegmentTask
from pipeline.plan import Plan, Segment, calculate_segments, chain_segments, latents
from pipeline.preparation import Preparation, prepare
from pipeline.progress import JobProgress, SegmentState
from pipeline.request import RenderRequest
from pipeline.result import RenderResult
from pipeline.segment_files import SegmentFiles
from pipeline.speech import find_pauses
from pipeline.stitch import stitch
from pipeline.stragglers import Run, held_up
from pipeline.timeline_recorder import TimelineRecorder, recording
from pipeline.vocals import VocalSeparator
from pipeline.workflow import Workflow

log = logging.getLogger(__name__)

EQUAL = 0.9
"""GPUs whose speeds differ by less than this are planned as equal: single segments differ by as much."""

OnProgress = Callable[[JobProgress], None]
T = TypeVar("T")


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
    separator: VocalSeparator | None = None,
    watched: bool = False,
) -> RenderResult:
    """Make one video; called again with the same job, it goes on with what is missing.

    ``watched``: its finished front can be played meanwhile (``JobDirectory.stream``), and afterwards.
    ``make_plan(total_frames, gpu_count)`` replaces the planner (the bench's baseline does).
    ``separator``: for a request that wants the vocals separated.
    Raises ``PipelineError``; what is finished stays in the job directory.
    """
    clock = _Clock()
    with log_about(job=job.name), job.locked(), recording(job) as timeline:
        timeline.stage("preparing")
        tick = partial(on_progress, JobProgress(job.name, "preparing"))
        tick()
        job.write_json(job.path / "request.json", request.model_dump(mode="json"))
        prepared = prepare(request, job, separator, tick)
        with storage_errors(job.work):
            job.work.mkdir(exist_ok=True)
        clock.lap("prepare")
        speech = tuple(track.path for track in prepared.speech)
        joining = Joining(request.seam, speech, watched)
        with (
            _in_background(partial(prepared.make_sound, job.work / "sound.mp4")) as track,
            Front(job, joining, track, timeline.seam) as front,
        ):
            # The whole track is encoded, and seams are joined, while the GPUs render.
            def seen(progress: JobProgress) -> None:
                if track.done():
                    track.result()  # its error is told now, not after the last window
                on_progress(progress)

            known = job.stored_plan()
            missing = None if known is None else missing_segments(job, known)
            if known is not None and not missing:
                plan, done = known, _Done({segment.gpu for segment in known.segments})
                front.follow(plan)
            else:
                timeline.stage("starting")
                starting = partial(seen, JobProgress(job.name, "starting"))
                starting()
                with open_renderers() as renderers:
                    infos = renderers.start(starting)
                    timeline.know(infos)
                    _log_devices(infos)
                    clock.lap("start")
                    plan = known or _plan(request, prepared, infos, make_plan, workflow)
                    if missing is None:
                        job.forget_segments()  # of a plan that is gone
                        job.write_json(job.plan, plan.to_json())
                        missing = missing_segments(job, plan)
                    _log_plan(plan, job, infos)
                    front.follow(plan)
                    if request.continuity == "exact":
                        _log_exact(plan, len(infos), job)
                    recipe = prepared.recipe(request, job.name, workflow, plan)

                    def task_for(segment: Segment, attempt: int, kept: KeptWindows) -> SegmentTask:
                        return prepared.task(recipe, plan, segment, attempt, kept.count, kept.motion)

                    timeline.stage("waiting")  # until the first task goes out
                    done = _render_missing(
                        job,
                        plan,
                        missing,
                        task_for,
                        renderers,
                        infos,
                        max_attempts,
                        seen,
                        front.look,
                        timeline,
                    )
                    timeline.rendered()
                    clock.lap("render")

            def joining_still() -> None:
                on_progress(JobProgress(job.name, "joining", 0, states))

            timeline.stage("joining")
            states = _states(plan, job, {}, {}, on=done.on)
            joining_still()
            files = [SegmentFiles.in_folder(job.segment(segment.index)) for segment in plan.segments]
            shown = prepared.frames_at(request.fps)
            front.settle(joining_still)
            seams = stitch(
                plan,
                files,
                track.result(),
                target,
                job.work,
                fps=request.fps,
                shown=shown,
                seam=request.seam,
                speech=speech,
                seams=job.seams,
                tick=joining_still,
            )
            front.finish(plan)
        timeline.stage(None)
        clock.lap("join")
        result = RenderResult(
            job=job.name,
            video_path=str(target),
            engine=engine,
            gpu_count=len(done.lanes),
            segments_processed=len(plan.segments),
            frames=shown,
            width=prepared.width,
            height=prepared.height,
            seams=seams,
            timings={**timeline.numbers(), **clock.laps()},
            nodes=done.nodes,
            fps=request.fps,
        )
        job.write_json(job.result, result.as_dict())
        log.info(
            "%s processing finished successfully, GPUs used: %d",
            "multi-GPU" if len(done.lanes) > 1 else "single-GPU",
            len(done.lanes),
            extra={
                "job": job.name,
                "engine": engine,
                "frames": shown,
                "output": str(target),
            },
        )
        on_progress(JobProgress(job.name, "finished", 0, states))
        return result


@contextmanager
def _in_background(work: Callable[[threading.Event], T]) -> Iterator[Future[T]]:
    """Do ``work`` in a thread; whatever ends the block early sets its event, and waits for it."""
    stop = threading.Event()
    with ThreadPoolExecutor(1, thread_name_prefix="background") as thread:
        try:
            yield thread.submit(work, stop)
        except BaseException:
            stop.set()
            raise


def _plan(
    request: RenderRequest,
    prepared: Preparation,
    infos: Sequence[RendererInfo],
    make_plan: Callable[[int, int], Plan] | None,
    workflow: Workflow,
) -> Plan:
    lanes, speeds = len(infos), [round(max(info.speed, 0.01), 2) for info in infos]
    if make_plan is not None:
        return make_plan(prepared.total_frames, lanes)
    if request.continuity == "exact":
        return chain_segments(
            prepared.total_frames,
            lanes if request.use_multi_gpu else 1,
            max_frames=request.max_chain_frames,
            overlap_frames=request.overlap_frames,
        )
    return calculate_segments(
        prepared.total_frames,
        lanes,
        speeds=speeds if min(speeds) < EQUAL * max(speeds) else None,
        overlap_frames=request.overlap_frames,
        partial_windows=not workflow.whole_segments,  # its node has no shorter windows
        use_multi_gpu=request.use_multi_gpu,
        pauses=find_pauses([track.path for track in prepared.speech], prepared.total_frames),
    )


def _render_missing(
    job: JobDirectory,
    plan: Plan,
    missing: dict[int, KeptWindows],
    task_for: Callable[[Segment, int, KeptWindows], SegmentTask],
    renderers: Renderers,
    infos: Sequence[RendererInfo],
    max_attempts: int,
    on_progress: OnProgress,
    on_kept: Callable[[], None],
    timeline: TimelineRecorder,
) -> _Done:
    """Render what is not there yet, storing each window as it comes; ``on_kept`` hears of it."""
    seconds: dict[int, tuple[float, ...]] = {}
    done = _Done()
    paces = _Paces()

    def tick(held: Held) -> Iterable[int]:
        running: dict[int, SegmentProgress] = {}
        progress = renderers.progress()
        timeline.seen(progress)
        for seen in progress:  # of two runs of a segment, the one that is ahead
            if seen.index not in running or seen.windows_done > running[seen.index].windows_done:
                running[seen.index] = seen
        for index, lane in held:
            kept = missing[index]
            if index in running and running[index].windows_done > kept.count:
                for window in renderers.windows(lane, index, kept.count):
                    kept.keep(window)
                on_kept()
        states = _states(plan, job, dict(reversed(held)), running, seconds, missing, done.on)
        on_progress(JobProgress(job.name, "rendering", len(infos), states))
        return held_up(paces.runs(states, missing), paces.of_finished(states))

    def next_task(segment: Segment, attempt: int) -> SegmentTask:
        kept = missing[segment.index]
        if kept.count:
            log.info(
                "segment %d goes on after window %d of %d",
                segment.index,
                kept.count,
                len(segment.windows),
                extra={"job": job.name, "segment": segment.index},
            )
        return task_for(segment, attempt, kept)

    todo = [segment for segment in plan.segments if segment.index in missing]
    planned = [info.lane for info in infos]
    for rendered in render_all(todo, next_task, renderers, max_attempts, tick, planned, timeline.sent):
        for window in rendered.windows:
            missing[rendered.index].keep(window)
        on_kept()
        seconds[rendered.index] = seconds.get(rendered.index, ()) + rendered.window_seconds
        done.lanes.add(rendered.lane)
        for name, runs in rendered.nodes.items():
            done.nodes[name] = done.nodes.get(name, NodeRuns()) + runs
        if rendered.left:
            continue
        missing[rendered.index].become_segment()
        done.on[rendered.index] = rendered.lane
        on_kept()
        log.info(
            "segment %d processed successfully",
            rendered.index,
            extra={
                "job": job.name,
                "segment": rendered.index,
                "gpu": rendered.lane,
                "node": rendered.node,
                "attempt": rendered.attempt,
            },
        )
    return done


class _Paces:
    """How fast the segments in work are, from what a tick sees of them."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[tuple[int, int | None], float]] = {}

    def runs(self, states: Sequence[SegmentState], missing: dict[int, KeptWindows]) -> list[Run]:
        found, now = [], time.monotonic()
        for state in states:
            index, lengths = state.segment.index, state.segment.windows
            if state.stage != "rendering" or state.windows_done >= len(lengths):
                continue
            mark = (state.windows_done, state.lane)
            if self._last.get(index, (None, 0.0))[0] != mark:
                self._last[index] = (mark, now)
            left = float(sum(latents(n) for n in lengths[missing[index].count :]))
            window = float(latents(lengths[state.windows_done]))
            found.append(Run(index, left, window, now - self._last[index][1], _pace(state)))
        return found

    @staticmethod
    def of_finished(states: Sequence[SegmentState]) -> list[float]:
        paces = (_pace(state) for state in states if state.stage == "finished")
        return [pace for pace in paces if pace is not None]


def _pace(state: SegmentState) -> float | None:
    """Seconds for a latent frame in the segment's windows that were timed."""
    first = state.windows_done - len(state.window_seconds)
    timed = sum(latents(n) for n in state.segment.windows[max(0, first) : state.windows_done])
    return sum(state.window_seconds) / timed if timed else None


@dataclass(slots=True)
class _Done:
    """What the renderers did for this start of a job."""

    lanes: set[int] = field(default_factory=set)
    on: dict[int, int] = field(default_factory=dict)
    """The lane of each segment that was finished."""
    nodes: dict[str, NodeRuns] = field(default_factory=dict)


def _states(
    plan: Plan,
    job: JobDirectory,
    lanes: dict[int, int],
    running: dict[int, SegmentProgress],
    seconds: dict[int, tuple[float, ...]] | None = None,
    missing: dict[int, KeptWindows] | None = None,
    on: dict[int, int] | None = None,
) -> tuple[SegmentState, ...]:
    states = []
    for segment in plan.segments:
        index = segment.index
        times = (seconds or {}).get(index, ())
        count = missing[index].count if missing and index in missing else 0
        if job.segment(index).exists():
            lane = (on or {}).get(index)  # not known of an earlier start
            state = SegmentState(segment, "finished", lane, len(segment.windows), 0.0, times)
        elif index in lanes:
            seen = running.get(index, SegmentProgress(index, count, 0.0, ()))
            times += seen.window_seconds
            state = SegmentState(segment, "rendering", lanes[index], seen.windows_done, seen.fraction, times)
        else:
            state = SegmentState(segment, "waiting", None, count, 0.0, times)
        states.append(state)
    return tuple(states)


def _log_devices(infos: Sequence[RendererInfo]) -> None:
    log.info("found %d %s", len(infos), "GPU device" if len(infos) == 1 else "GPU devices")
    for info in infos:
        log.info(
            "GPU %d: %s (%.1f GB)",
            info.lane,
            info.device,
            info.memory_gb,
            extra={
                "gpu": info.lane,
                "node": info.node,
                "engine": f"{info.engine} {info.engine_version}".strip(),
                "profile": info.profile,
                "port": info.port,
            },
        )


def _log_plan(plan: Plan, job: JobDirectory, infos: Sequence[RendererInfo]) -> None:
    lanes = dict(enumerate(info.lane for info in infos))
    log.info(
        "created %d %s for processing",
        len(plan.segments),
        "segment" if len(plan.segments) == 1 else "segments",
    )
    for segment in plan.segments:
        log.info(
            "GPU %d: frames %d-%d (%d frames)",
            lanes.get(segment.gpu, segment.gpu),
            segment.start,
            segment.stop,
            segment.frames,
            extra={
                "job": job.name,
                "segment": segment.index,
                "gpu": lanes.get(segment.gpu, segment.gpu),
                "windows": len(segment.windows),
            },
        )


def _log_exact(plan: Plan, lanes: int, job: JobDirectory) -> None:
    """Say what exactness costs: a chain is rendered window after window."""
    chains = len(plan.segments)
    log.info(
        "continuity exact: %s, each on one GPU, window after window; %d of %d %s to do at a time%s",
        "1 chain" if chains == 1 else f"{chains} chains",
        min(chains, lanes),
        lanes,
        "GPU has something" if lanes == 1 else "GPUs have something",
        "" if chains >= lanes else " (max_chain_seconds makes shorter chains, for more GPUs)",
        extra={"job": job.name, "chains": chains},
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
