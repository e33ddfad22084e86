"""``pipeline.checkpoints``: what is kept of an unfinished segment, and what becomes of it when damaged."""

from __future__ import annotations

import logging
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.checkpoints import KeptWindows, missing_segments
from pipeline.errors import MediaError, StorageError
from pipeline.frames import read_frames, read_stack
from pipeline.job import JobDirectory
from pipeline.messages import WindowCheckpoint
from pipeline.plan import Plan, Segment
from pipeline.segment_files import SegmentFiles, SegmentWriter

SIZE = 64
CLIP = np.random.default_rng(3).integers(0, 256, (33, SIZE, SIZE, 3), np.uint8)
SEGMENT = Segment(0, 0, 33, (13, 13, 13, 13), 0, 9)
"""Windows of 13 frames, 4 of them new from the second on, and 25 as the last: see ``PARTS``."""
PARTS = [(5, 8, 0), (0, 4, 0), (0, 4, 0), (0, 2, 10)]
PLAN = Plan(33, (SEGMENT,), 13, 9)


def checkpoint(folder: Path, number: int) -> WindowCheckpoint:
    """Window ``number`` of the clip; its motion frames are a byte that tells which they are."""
    start = sum(sum(parts) for parts in PARTS[:number])
    with SegmentWriter(folder / f"made-{number}", *PARTS[number], SIZE, SIZE) as writer:
        for frame in CLIP[start : start + sum(PARTS[number])]:
            writer.write(frame)
    files = SegmentFiles.in_folder(folder / f"made-{number}").to_arrays()
    motion = None if number == len(PARTS) - 1 else np.full(1000, number, np.uint8)
    return WindowCheckpoint(0, number, files, motion)


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    job = JobDirectory(tmp_path / "job")
    job.work.mkdir(parents=True)
    return job


def kept(job: JobDirectory, folder: Path, windows: int) -> KeptWindows:
    found = KeptWindows(job, SEGMENT)
    for number in range(windows):
        found.keep(checkpoint(folder, number))
    return found


def test_windows_survive_a_restart(job: JobDirectory, tmp_path: Path) -> None:
    """Another start finds the number of windows and what the next one continues, little else."""
    assert (KeptWindows(job, SEGMENT).count, KeptWindows(job, SEGMENT).motion) == (0, None)
    for windows in (1, 2, 3):
        first = kept(job, tmp_path, windows)
        again = KeptWindows(job, SEGMENT)
        assert first.count == again.count == windows
        assert first.motion is not None
        assert again.motion is not None
        assert first.motion.tolist() == again.motion.tolist() == [windows - 1] * 1000
    assert job.has_segments
    assert len(list(job.windows(0).glob("*.motion"))) == 2


def test_all_windows_become_the_segment(job: JobDirectory, tmp_path: Path) -> None:
    """Overlaps are the frames themselves, bodies are joined by copy, and no window is left."""
    windows = kept(job, tmp_path, 4)
    assert windows.complete
    assert missing_segments(job, PLAN) == {}  # a driver that died before it joined them
    files = SegmentFiles.in_folder(job.segment(0))
    files.verify()
    assert files.frames == {"head": 5, "body": 18, "tail": 10}
    assert np.array_equal(read_stack(files.path("head"), 5), CLIP[:5])
    assert np.array_equal(read_stack(files.path("tail"), 10), CLIP[23:])
    parts = [frame for n in range(4) for frame in read_frames(tmp_path / f"made-{n}" / "body.mp4")]
    assert np.array_equal(read_stack(files.path("body"), 18), np.stack(parts))
    assert not job.windows(0).exists()
    kept(job, tmp_path, 2)  # a driver that died before it removed them
    assert missing_segments(job, PLAN) == {}
    assert not job.windows(0).exists()


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("000002/body.mp4", 2),
        ("000002/segment.json", 2),
        ("000002.motion", 2),
        ("000001.motion", 3),  # not the last: nobody needs it
        ("000001/body.mp4", 0),  # the motion frames before it are gone
    ],
)
def test_a_damaged_window_is_rendered_again(
    job: JobDirectory, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, count: int
) -> None:
    """Of three windows those that can be continued stay; the log names segment and window."""
    kept(job, tmp_path, 3)
    path = job.windows(0) / name
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with caplog.at_level(logging.WARNING):
        found = missing_segments(job, PLAN)[0]
    assert found.count == count
    assert ("segment 0 is rendered again from window" in caplog.text) == (count < 3)
    assert (found.motion is None) == (count == 0)
    assert len([path for path in job.windows(0).glob("[0-9]*") if path.is_dir()]) == count
    for number in range(count, 4):
        found.keep(checkpoint(tmp_path, number))
    assert found.complete
    assert KeptWindows(job, SEGMENT).complete


def test_windows_come_once_and_in_order(job: JobDirectory, tmp_path: Path) -> None:
    """One that is there already changes nothing; one that was left out or damaged on its way is an error."""
    windows = kept(job, tmp_path, 2)
    windows.keep(checkpoint(tmp_path, 0))
    assert windows.count == 2
    with pytest.raises(MediaError, match="window 3 instead of 2"):
        windows.keep(checkpoint(tmp_path, 3))
    third = checkpoint(tmp_path, 2)
    body = third.files["body.mp4"].copy()
    body[100] ^= 1
    with pytest.raises(MediaError, match="damaged on its way"):
        windows.keep(replace(third, files={**third.files, "body.mp4": body}))
    assert windows.count == KeptWindows(job, SEGMENT).count == 2


def test_a_full_disk_keeps_what_is_there(job: JobDirectory, tmp_path: Path) -> None:
    """A window that can't be written is a StorageError, and the ones before are still good."""
    windows = kept(job, tmp_path, 1)
    second = checkpoint(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))
    try:
        with pytest.raises(StorageError, match="can't write"):
            windows.keep(second)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert windows.count == KeptWindows(job, SEGMENT).count == 1
    windows.keep(second)
    assert KeptWindows(job, SEGMENT).count == 2
    blocked = JobDirectory(tmp_path / "file")
    blocked.path.write_text("a file where the job's folder should be")
    with pytest.raises(StorageError, match="can't write"):
        KeptWindows(blocked, SEGMENT).keep(checkpoint(tmp_path, 0))
