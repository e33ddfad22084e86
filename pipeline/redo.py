"""One segment of a finished job again, with another seed: a bad seam is often a bad take on one side.

The new take is joined into a whole new video first.  Only then is decided which take stays, by the reports of
the seams that it touches, and only then does anything of the job change, by three renames: the video, the
small file that says which take counts, the result.  No Ray: renderers are behind ``dispatch.Renderers``.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pipeline.checkpoints import KeptWindows
from pipeline.dispatch import Held, Renderers, render_all
from pipeline.errors import InvalidRequest, JobCancelled, MediaError
from pipeline.front import Front, Joining
from pipeline.job import JobDirectory, finished, storage_errors
from pipeline.messages import SegmentProgress, SegmentTask
from pipeline.plan import Plan, Segment
from pipeline.preparation import prepare
from pipeline.progress import JobProgress, SegmentState
from pipeline.request import RenderRequest
from pipeline.seam import SeamReport
from pipeline.seam_metrics import excess
from pipeline.segment_files import SegmentFiles
from pipeline.stitch import stitch
from pipeline.timeline_recorder import TimelineRecorder, recording
from pipeline.workflow import Workflow

log = logging.getLogger(__name__)

Side = Literal["earlier", "later"]


@dataclass(frozen=True, slots=True)
class SeamChange:
    """One seam with the old take and with the new one."""

    seam: int
    before: SeamReport
    after: SeamReport


@dataclass(frozen=True, slots=True)
class Redone:
    """What a redo did."""

    segment: int
    seed: int
    kept: Literal["new", "old"]
    changes: tuple[SeamChange, ...]
    """Of the seams that the segment has."""
    video_path: str

    @property
    def excess(self) -> tuple[float, float]:
        """Sum over these seams of ``seam_metrics.excess``, with the old take and with the new one."""
        return _total(change.before for change in self.changes), _total(c.after for c in self.changes)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        before, after = self.excess
        return {
            "success": True,
            "segment": self.segment,
            "seed": self.seed,
            "kept": self.kept,
            "excess_before": round(before, 3),
            "excess_after": round(after, 3),
            "seams": [asdict(change) for change in self.changes],
            "video_path": self.video_path,
        }


def redo(
    job: JobDirectory,
    engine: str,
    workflow: Workflow,
    open_renderers: Callable[[], AbstractContextManager[Renderers]],
    *,
    seam: int | None = None,
    side: Side | None = None,
    segment: int | None = None,
    seed: int | None = None,
    max_attempts: int,
    on_progress: Callable[[JobProgress], None],
) -> Redone:
    """Render one segment of a finished job with another seed, and join the video again.

    With ``seam``, the segment on one ``side`` of it (default: the later one, or the earlier one if that has
    the worse seam at its other end), and the better take stays, judged by all seams of the segment together.
    With ``segment``, that one, and the new take stays.  ``seed``: default, one that was not tried yet.
    Raises ``InvalidRequest`` for a job that is not finished, was made by another ``engine``, or has no such
    seam or segment; ``PipelineError``.  Whatever fails, the job is as it was, but for its timeline.
    """
    if (seam is None) == (segment is None):
        raise InvalidRequest("seam", "give either a seam or a segment")
    if not job.path.is_dir():
        raise InvalidRequest("job", f"{job.path} is no folder")
    with job.locked():
        request, plan, result = _finished_job(job, engine)
        reports = [SeamReport(**entry) for entry in result["seams"]]
        index = _segment_at(seam, side, reports) if seam is not None else segment
        assert index is not None
        if not 0 <= index < len(plan.segments):
            raise InvalidRequest("segment", f"{index} is not one of 0 to {len(plan.segments) - 1}")
        number = _next_take(job, index)
        seed = request.seed + number if seed is None else seed
        with recording(job) as timeline:
            timeline.stage("preparing")
            on_progress(JobProgress(job.name, "preparing"))
            prepared = prepare(request, job)
            with storage_errors(job.work):
                job.work.mkdir(exist_ok=True)
            recipe = replace(prepared.recipe(request, job.name, workflow, plan), seed=seed)

            def task_for(part: Segment, attempt: int, kept: KeptWindows) -> SegmentTask:
                return prepared.task(recipe, plan, part, attempt, kept.count, kept.motion)

            new = job.take(index, number)
            chosen = False
            try:
                _render(job, plan, index, new, task_for, open_renderers, max_attempts, on_progress, timeline)
                timeline.stage("joining")
                joining = JobProgress(job.name, "joining", 0, _states(plan, {}))
                on_progress(joining)
                folders = [new if part.index == index else job.segment(part.index) for part in plan.segments]
                video = job.work / "again.mp4"
                track: Future[tuple[Path, int]] = Future()
                track.set_result(prepared.make_sound(job.work / "sound.mp4"))
                speech = tuple(spoken.path for spoken in prepared.speech)
                after = stitch(
                    plan,
                    [SegmentFiles.in_folder(folder) for folder in folders],
                    track.result(),
                    video,
                    job.work,
                    fps=request.fps,
                    shown=prepared.frames_at(request.fps),
                    seam=request.seam,
                    speech=speech,
                    seams=job.seams,
                    tick=lambda: on_progress(joining),
                )
                on_progress(joining)  # the last moment to stop: from here on the new take may count
                touched = [k for k in (index - 1, index) if 0 <= k < len(reports)]
                changes = tuple(SeamChange(k, reports[k], after[k]) for k in touched)
                done = Redone(index, seed, "new", changes, str(result["video_path"]))
                if seam is not None and done.excess[1] >= done.excess[0]:
                    done = replace(done, kept="old")
                else:
                    old = job.segment(index)
                    _adopt(
                        job, index, number, video, {**result, "seams": [asdict(report) for report in after]}
                    )
                    chosen = True
                    shutil.rmtree(old, ignore_errors=True)
                # Players get the takes that count, whichever these are.
                with Front(job, Joining(request.seam, speech, watched=job.stream.exists()), track) as front:
                    front.finish(plan)
            finally:
                if not chosen and number != job.takes().get(index, 0):
                    _forget(new)
            before, now = done.excess
            log.info(
                "segment %d with seed %d: %s take kept, excess %.2f before and %.2f with the new take",
                index,
                seed,
                done.kept,
                before,
                now,
                extra={"job": job.name, "segment": index},
            )
            with suppress(JobCancelled):  # too late
                on_progress(JobProgress(job.name, "finished", 0, _states(plan, {})))
            return done


def _finished_job(job: JobDirectory, engine: str) -> tuple[RenderRequest, Plan, dict[str, Any]]:
    request, plan = job.kept_request(), job.stored_plan()
    try:
        result: dict[str, Any] = json.loads(job.result.read_text())
        for entry in result["seams"]:
            SeamReport(**entry)
        made_by, _ = result["engine"], result["video_path"]
    except FileNotFoundError:
        result, plan = {}, None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidRequest("job", f"{job.path} was joined by another version of this program") from error
    if plan is None or len(result["seams"]) != len(plan.segments) - 1:
        raise InvalidRequest("job", f"{job.path} holds no finished job; finish it with the render command")
    if made_by != engine:
        raise InvalidRequest("job", f"{job.path} was rendered by the {made_by} engine, not by {engine}")
    for segment in plan.segments:
        folder = job.segment(segment.index)
        try:
            SegmentFiles.in_folder(folder).verify()
        except MediaError as error:
            reason = f"{job.path} is not whole ({error}); the render command renders what is missing"
            raise InvalidRequest("job", reason) from error
    return request, plan, result


def _segment_at(seam: int, side: Side | None, reports: Sequence[SeamReport]) -> int:
    """The segment on a side of a seam; without one, that whose other seam is the worse, or the later."""
    if not reports:
        raise InvalidRequest("seam", "the job is one segment and has no seam")
    if not 0 <= seam < len(reports):
        raise InvalidRequest("seam", f"{seam} is not one of 0 to {len(reports) - 1}")
    if side is None:
        before, after = (excess(reports[k]) if 0 <= k < len(reports) else 0.0 for k in (seam - 1, seam + 1))
        # A seam that is good already (1 or less) promises nothing.
        side = "earlier" if max(before, 1.0) > max(after, 1.0) else "later"
    return seam + (side == "later")


def _next_take(job: JobDirectory, index: int) -> int:
    """Counts rejected takes too: each leaves an empty folder, so that its seed is not tried again."""
    tried = [int(path.name.rpartition("-")[2]) for path in job.take(index, 0).parent.glob(f"{index:04d}-*")]
    return max([0, job.takes().get(index, 0), *tried]) + 1


def _forget(folder: Path) -> None:
    """The files of a rejected take go; its number stays used, if it came so far."""
    if folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)


def _render(
    job: JobDirectory,
    plan: Plan,
    index: int,
    folder: Path,
    task_for: Callable[[Segment, int, KeptWindows], SegmentTask],
    open_renderers: Callable[[], AbstractContextManager[Renderers]],
    max_attempts: int,
    on_progress: Callable[[JobProgress], None],
    timeline: TimelineRecorder,
) -> None:
    segment = plan.segments[index]
    kept = KeptWindows(job, segment)
    kept.forget()  # of a take that was broken off: it had another seed
    timeline.stage("starting")
    starting = partial(on_progress, JobProgress(job.name, "starting"))
    starting()
    with open_renderers() as renderers:
        infos = renderers.start(starting)
        timeline.know(infos)

        def tick(held: Held) -> Iterable[int]:
            on_lanes = dict(held)
            progress = renderers.progress()
            timeline.seen(progress)
            seen = {entry.index: entry for entry in progress}.get(index)
            seen = seen or SegmentProgress(index, kept.count, 0.0, ())
            if index in on_lanes and seen.windows_done > kept.count:
                for window in renderers.windows(on_lanes[index], index, kept.count):
                    kept.keep(window)
            state = SegmentState(
                segment,
                "rendering",
                on_lanes.get(index),
                seen.windows_done,
                seen.fraction,
                seen.window_seconds,
            )
            on_progress(JobProgress(job.name, "rendering", len(infos), _states(plan, {index: state})))
            return ()

        def next_task(part: Segment, attempt: int) -> SegmentTask:
            return task_for(part, attempt, kept)

        timeline.stage("waiting")  # until the task goes out
        for rendered in render_all([segment], next_task, renderers, max_attempts, tick, sent=timeline.sent):
            for window in rendered.windows:
                kept.keep(window)
        timeline.rendered()
    kept.become_segment(folder)


def _states(plan: Plan, working: dict[int, SegmentState]) -> tuple[SegmentState, ...]:
    return tuple(working.get(part.index) or SegmentState(part, "finished") for part in plan.segments)


def _adopt(job: JobDirectory, index: int, number: int, video: Path, result: dict[str, Any]) -> None:
    """Three renames with nothing in between: the video, the take that counts, the result."""
    with finished(Path(result["video_path"])) as partial:
        shutil.copyfile(video, partial)
    job.choose_take(index, number)
    job.write_json(job.result, result)


def _total(reports: Any) -> float:
    return float(sum(excess(report) for report in reports))
