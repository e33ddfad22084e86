"""One segment again with another seed: what stays, what is judged, and that nothing is lost on the way."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.engine import RunningEngine, choose_engine, running_engine
from pipeline.errors import GraphError, InvalidRequest, JobCancelled
from pipeline.frames import check_video, read_frames
from pipeline.job import JobDirectory
from pipeline.plan import Plan, Segment
from pipeline.progress import JobProgress
from pipeline.redo import Redone, redo
from pipeline.render import render_video
from pipeline.request import RenderRequest
from pipeline.seam import SeamReport
from pipeline.seam_metrics import GOOD, excess
from pipeline.settings import Settings
from pipeline.timeline_recorder import stored_timeline
from pipeline.workflow import load
from tests.engine_renderers import engine_renderers
from tests.free_ports import free_ports

FRAMES = 110
PLAN = Plan(
    FRAMES,
    tuple(Segment(i, start, start + 54, (57,), i) for i, start in enumerate((0, 28, 56))),
    81,
    9,
)
"""Three segments of a window each, overlaps of 26."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEngine]:
    settings = Settings(engine="draft", scratch_dir=tmp_path_factory.mktemp("scratch"), ports=free_ports(10))
    with running_engine(choose_engine(settings), settings) as running:
        yield running


@pytest.fixture(scope="module")
def made(
    engine: RunningEngine,
    portrait: Path,
    speech_of: Callable[[int], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A finished job in ``job``, its video beside it."""
    folder = tmp_path_factory.mktemp("made")
    request = RenderRequest.checked(image=portrait, audio=speech_of(FRAMES), width=128, height=128)
    render_video(
        request,
        JobDirectory(folder / "job"),
        "draft",
        load("talk_single"),
        engine_renderers(engine.url),
        folder / "talk.mp4",
        max_attempts=1,
        on_progress=lambda _: None,
        make_plan=lambda _frames, _lanes: PLAN,
    )
    return folder


@pytest.fixture
def job(made: Path, tmp_path: Path) -> JobDirectory:
    """A copy of that job, which a test may change."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    copy = JobDirectory(tmp_path / "job")
    result = json.loads(copy.result.read_text())
    copy.write_json(copy.result, {**result, "video_path": str(tmp_path / "talk.mp4")})
    return copy


def again(job: JobDirectory, engine: RunningEngine, **choice: Any) -> Redone:
    def quiet(_: JobProgress) -> None:
        pass

    fields = {"max_attempts": 1, "on_progress": quiet, **choice}
    return redo(job, "draft", load("talk_single"), engine_renderers(engine.url, 1), **fields)


def contents(folder: Path) -> dict[str, str]:
    """The digest of every file that a job must not lose, or get without need.

    (Its working folder and lock are no such, and its timeline tells of every try.)
    """
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "work" not in path.parts and path.name not in ("lock", "timeline.json")
    }


def frames_of(video: Path) -> np.ndarray:
    return np.stack(list(read_frames(video)))


def test_a_segment_is_rendered_with_another_seed(engine: RunningEngine, job: JobDirectory) -> None:
    """Its frames are others, those away from it the same; the job knows the new seams and serves a redo."""
    video = job.path.parent / "talk.mp4"
    before = frames_of(video)
    others = contents(job.segment(0)), contents(job.segment(2))
    done = again(job, engine, segment=1, seed=99)
    assert (done.segment, done.seed, done.kept) == (1, 99, "new")
    check_video(video, FRAMES, 25)
    after = frames_of(video)
    assert (contents(job.segment(0)), contents(job.segment(2))) == others
    assert np.array_equal(before[:28], after[:28])
    assert np.array_equal(before[82:], after[82:])
    assert np.abs(before[54:56].astype(int) - after[54:56]).max() > 20  # only segment 1 shows these
    seams = [SeamReport(**entry) for entry in json.loads(job.result.read_text())["seams"]]
    assert [change.after for change in done.changes] == seams
    assert not job.take(1, 0).exists()
    again_spans = [span for span in stored_timeline(job).spans if span.start == 1]
    assert {"preparing", "starting", "joining"} <= {span.kind for span in again_spans}
    runs = [span for span in again_spans if span.kind in ("segment", "window")]
    assert [(span.kind, span.segment, span.gpu, span.outcome) for span in runs] == [
        ("segment", 1, 0, "done"),
        ("window", 1, 0, "done"),
    ]
    same = again(job, engine, segment=1, seed=99)
    assert np.array_equal(frames_of(video), after)  # the seed makes the take
    assert [change.before for change in same.changes] == [change.after for change in same.changes]


def test_the_better_take_stays(engine: RunningEngine, job: JobDirectory) -> None:
    """By the sum over both seams of the segment: over some seeds each outcome is what the numbers say."""
    kept = []
    for _ in range(3):
        state, video = contents(job.path), contents(job.path.parent)["talk.mp4"]
        done = again(job, engine, seam=0)
        assert done.segment == 1
        assert [change.seam for change in done.changes] == [0, 1]
        before, after = done.excess
        assert done.kept == ("new" if after < before else "old")
        total = sum(excess(SeamReport(**entry)) for entry in json.loads(job.result.read_text())["seams"])
        assert total == pytest.approx(min(before, after))
        assert (contents(job.path) == state) == (done.kept == "old")
        assert (contents(job.path.parent)["talk.mp4"] == video) == (done.kept == "old")
        kept.append(done)
    assert len({done.seed for done in kept}) == 3


def test_a_bad_take_is_replaced(engine: RunningEngine, job: JobDirectory) -> None:
    """Where the job's own reports are bad at a seam, the new take stays and the reports are good."""
    result = json.loads(job.result.read_text())
    result["seams"][1] |= {"ghosting": 0.5, "verdict": "bad"}
    job.write_json(job.result, result)
    done = again(job, engine, seam=1)
    assert (done.segment, done.kept) == (2, "new")
    assert done.excess[0] > 20 > done.excess[1]
    result["seams"][0] |= {"ghosting": 0.6, "verdict": "bad"}
    job.write_json(job.result, result)
    assert again(job, engine, seam=1).segment == 1  # whose other seam is bad, too


def test_whatever_fails_leaves_the_job_as_it_was(engine: RunningEngine, job: JobDirectory) -> None:
    """An engine that is gone, an error while joining, a process killed there: every file is the same."""
    before = contents(job.path.parent)

    def broken(progress: JobProgress) -> None:
        if progress.stage == "joining":
            raise GraphError("", "no more")

    with pytest.raises(GraphError, match="no more"):
        again(job, engine, segment=1, on_progress=broken)
    assert contents(job.path.parent) == before
    child = get_context("spawn").Process(target=killed_while_joining, args=(job.path, engine.url))
    child.start()
    child.join(60)
    assert child.exitcode == 9
    left = contents(job.path.parent)
    assert {name: left[name] for name in before} == before
    assert all(name.startswith("job/segments/0001-") for name in left.keys() - before.keys())
    assert again(job, engine, segment=1).kept == "new"


def killed_while_joining(path: Path, url: str) -> None:
    """In a process of its own: it ends without a word when the new take is rendered."""

    def end(progress: JobProgress) -> None:
        if progress.stage == "joining":
            os._exit(9)

    redo(
        JobDirectory(path),
        "draft",
        load("talk_single"),
        engine_renderers(url, 1),
        segment=1,
        max_attempts=1,
        on_progress=end,
    )


def test_what_can_not_be_redone_is_said(engine: RunningEngine, job: JobDirectory, tmp_path: Path) -> None:
    """No such seam or segment, another engine, no job, one that is not finished or not whole."""
    for choice, word in (
        ({"seam": 2}, "not one of 0 to 1"),
        ({"seam": -1}, "not one of 0 to 1"),
        ({"segment": 3}, "not one of 0 to 2"),
        ({}, "either a seam or a segment"),
    ):
        with pytest.raises(InvalidRequest, match=word):
            again(job, engine, **choice)
    with pytest.raises(InvalidRequest, match="by the draft engine, not by comfyui"):
        redo(
            job,
            "comfyui",
            load("talk_single"),
            engine_renderers(engine.url),
            seam=0,
            max_attempts=1,
            on_progress=lambda _: None,
        )
    with pytest.raises(InvalidRequest, match="no folder"):
        again(JobDirectory(tmp_path / "nothing"), engine, seam=0)
    body = next(job.segment(1).glob("body.*"))
    body.write_bytes(body.read_bytes()[:-1])
    with pytest.raises(InvalidRequest, match="not whole"):
        again(job, engine, seam=0)
    job.result.unlink()
    with pytest.raises(InvalidRequest, match="no finished job"):
        again(job, engine, seam=0)


def test_excess_of_one_is_the_limit_of_good() -> None:
    """The measure that decides is the verdict's own."""
    report = SeamReport(0, 12, "morph", 2.6, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.1, None, "good")
    assert excess(report) == pytest.approx(1.0)
    limits = (("ghosting", 0.97), ("sharpness", 0.8), ("colour_step", 0.6), ("jump", 2.7), ("speed", 1.2))
    for field, value in limits:
        assert GOOD[field]
        assert excess(SeamReport(**{**vars_of(report), field: value})) > 1


def vars_of(report: SeamReport) -> dict[str, Any]:
    return {name: getattr(report, name) for name in SeamReport.__slots__}


def test_a_cancel_comes_in_time_or_changes_nothing(engine: RunningEngine, job: JobDirectory) -> None:
    """While the new video's frames are counted it stops the redo; when the new take counts, it is late."""
    before, joining = contents(job.path.parent), []

    def cancelled(progress: JobProgress) -> None:
        joining.append(progress.stage == "joining")
        if sum(joining) == 2:  # the first one is told before the joining
            raise JobCancelled("job")

    with pytest.raises(JobCancelled):
        again(job, engine, segment=1, on_progress=cancelled)
    left = contents(job.path.parent)
    assert {name: left[name] for name in before} == before

    def late(progress: JobProgress) -> None:
        if progress.stage == "finished":
            raise JobCancelled("job")

    assert again(job, engine, segment=1, on_progress=late).kept == "new"
