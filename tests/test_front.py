"""``pipeline.front``: what is finished can be seen at once, seams are made once, nothing here ends a job."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.errors import JobCancelled
from pipeline.front import Front, Joining, Track
from pipeline.job import JobDirectory
from pipeline.kept_seams import keep_seam, seam_workers
from pipeline.segment_files import SegmentFiles, SegmentWriter, join_windows
from pipeline.sound import encode_track
from pipeline.stitch import joints, stitch
from pipeline.stream import PLAYLIST
from tests.test_stitch import HEIGHT, THREE, WIDTH, clicks, picture, plan_of, planes, save
from tests.test_stream import listed

PLAN = plan_of(THREE)
JOINING = Joining("morph", (), watched=True)
WINDOW_BODY = 10
"""Frames of each segment's body that its first window gives."""


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    """A job of which nothing is rendered; beside it are the windows of its segments, and the segments."""
    job = JobDirectory(tmp_path / "job")
    job.work.mkdir(parents=True)
    overlaps = (0, *PLAN.overlaps, 0)
    for index, (start, stop) in enumerate(THREE):
        head, tail = overlaps[index], overlaps[index + 1]
        body = stop - start - head - tail
        windows, first = [], start + 2 * index
        for number, frames in enumerate(((head, WINDOW_BODY, 0), (0, body - WINDOW_BODY, tail))):
            path = tmp_path / "windows" / f"{index}-{number}"
            with SegmentWriter(path, *frames, WIDTH, HEIGHT) as writer:
                for t in range(first, first + sum(frames)):
                    writer.write(picture(t))
            first += sum(frames)
            windows.append(SegmentFiles.in_folder(path))
        join_windows(windows, tmp_path / "segments" / str(index), tmp_path)
    return job


@pytest.fixture
def track(job: JobDirectory, tmp_path: Path) -> Future[Track]:
    """Its sound, encoded."""
    encode_track(save(tmp_path / "s.wav", clicks(6, 48_000), 48_000), 150, job.work / "sound.mp4")
    track: Future[Track] = Future()
    track.set_result((job.work / "sound.mp4", 0))
    return track


def finish_segment(job: JobDirectory, index: int) -> None:
    shutil.copytree(job.path.parent / "segments" / str(index), job.segment(index))
    shutil.rmtree(job.windows(index), ignore_errors=True)


def finish_window(job: JobDirectory, index: int) -> None:
    shutil.copytree(job.path.parent / "windows" / f"{index}-0", job.window(index, 0))


def until(job: JobDirectory, wanted: tuple[int, bool]) -> None:
    """Wait for the playlist to say so."""
    deadline = time.monotonic() + 150
    while not (job.stream / PLAYLIST).exists() or listed(job.stream) != wanted:
        assert time.monotonic() < deadline, wanted
        time.sleep(0.02)


def threads() -> set[str]:
    return {thread.name.partition("_")[0] for thread in threading.enumerate()} & {"front", "seam"}


def test_exactly_the_finished_front_is_shown(job: JobDirectory, track: Future[Track]) -> None:
    """Windows, then segments, then seams, in whatever order they come; the end is the final video."""
    seen = ""
    with Front(job, JOINING, track) as front:
        front.follow(PLAN)
        for step, frames in (
            (lambda: finish_window(job, 0), WINDOW_BODY),
            (lambda: finish_segment(job, 0), 34),
            (lambda: finish_segment(job, 2), 34),  # not the next one
            (lambda: finish_window(job, 1), 34 + 26 + WINDOW_BODY),  # its head is enough for the seam
            (lambda: finish_segment(job, 1), 150),
        ):
            step()
            front.look()
            until(job, (frames, False))
            text = (job.stream / PLAYLIST).read_text()
            assert text.startswith(seen)
            seen = text
        front.settle(lambda: None)
        made = {path: path.stat().st_mtime_ns for path in job.seams.iterdir()}
        assert len(made) == 4  # two seams and their reports
        files = [SegmentFiles.in_folder(job.segment(index)) for index in range(3)]
        talk = job.path.parent / "talk.mp4"
        stitch(PLAN, files, track.result(), talk, job.work, seams=job.seams)
        assert {path: path.stat().st_mtime_ns for path in job.seams.iterdir()} == made
        front.finish(PLAN)
    assert listed(job.stream) == (150, True)
    assert planes(job.stream / PLAYLIST) == planes(talk)
    assert not threads()


def test_a_stream_that_breaks_is_told_and_costs_nothing(
    job: JobDirectory, track: Future[Track], caplog: pytest.LogCaptureFixture
) -> None:
    """Where no file can be written, the log says so; the seams are made all the same."""
    job.stream.write_text("in the way")
    with caplog.at_level(logging.WARNING), Front(job, JOINING, track) as front:
        for index in range(3):
            finish_segment(job, index)
        front.follow(PLAN)
        front.settle(lambda: None)
        front.finish(PLAN)
    assert "can't be watched" in caplog.text
    assert str(job.stream) in caplog.text
    assert len(list(job.seams.glob("*.mp4"))) == 2


def test_nobody_watches_a_job_that_is_not_kept(job: JobDirectory, track: Future[Track]) -> None:
    """Its seams are made early, and no piece is written."""
    finish_segment(job, 0)
    finish_segment(job, 1)
    with Front(job, Joining("cut", (), watched=False), track) as front:
        front.follow(PLAN)
        deadline = time.monotonic() + 150
        while not list(job.seams.glob("0000-*.json")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert not job.stream.exists()


def test_a_cancelled_job_ends_its_front(job: JobDirectory, track: Future[Track]) -> None:
    """What the tick raises comes through, no thread is left, and what was shown stays."""
    for index in range(3):
        finish_segment(job, index)

    def cancelled() -> None:
        raise JobCancelled("job")

    with pytest.raises(JobCancelled), Front(job, JOINING, track) as front:
        front.follow(PLAN)
        front.settle(cancelled)
        cancelled()  # where the seams were faster
    assert not threads()
    assert not job.stream.exists() or not listed(job.stream)[1]


def test_a_seam_whose_window_goes_is_made_again(job: JobDirectory, track: Future[Track]) -> None:
    """The window that it reads becomes a segment at that moment: the stream goes on all the same."""
    finish_segment(job, 0)
    finish_window(job, 1)
    begun: list[int] = []

    @contextmanager
    def timed(number: int) -> Iterator[None]:
        begun.append(number)
        if len(begun) == 1:
            finish_segment(job, 1)
        yield

    with Front(job, JOINING, track, timed) as front:
        front.follow(PLAN)
        until(job, (34 + 26 + 14, False))  # all of segment 1's body, of which the window has 10
    assert begun == [0, 0]


def test_a_process_makes_few_seams_at_a_time(job: JobDirectory, tmp_path: Path) -> None:
    """However many jobs join theirs at once."""
    finish_segment(job, 0)
    finish_segment(job, 1)
    files = [SegmentFiles.in_folder(job.segment(index)) for index in range(2)]
    (joint,) = joints(plan_of(THREE[:2]), files, "cut", ())
    now, most, lock = [0], [0], threading.Lock()

    @contextmanager
    def counted(_: int) -> Iterator[None]:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        yield
        with lock:
            now[0] -= 1

    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda n: keep_seam(joint, tmp_path / f"{n}", counted), range(8)))
    assert all(seam.path.exists() for seam in made)
    assert 1 <= most[0] <= seam_workers()
