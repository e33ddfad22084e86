"""``pipeline.segment_files``: frames go where they belong, and a segment is whole or not there."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import MediaError, StorageError
from pipeline.frames import Frame, read_frames
from pipeline.segment_files import SegmentFiles, SegmentWriter

WIDTH, HEIGHT = 64, 48
CLIP = np.random.default_rng(2).integers(0, 256, (12, HEIGHT, WIDTH, 3), np.uint8)


def written(folder: Path, head: int, body: int, tail: int) -> SegmentFiles:
    with SegmentWriter(folder, head, body, tail, WIDTH, HEIGHT) as writer:
        for frame in CLIP[: head + body + tail]:
            writer.write(frame)
    return SegmentFiles.in_folder(folder)


def decoded(files: SegmentFiles, part: str) -> list[Frame]:
    return list(read_frames(files.path(part)))


def test_frames_go_to_head_body_and_tail(tmp_path: Path) -> None:
    """The overlaps are kept exactly, the frames between in the final encoding."""
    files = written(tmp_path / "s", 3, 5, 4)
    assert np.array_equal(decoded(files, "head"), CLIP[:3])
    assert len(decoded(files, "body")) == 5
    assert np.array_equal(decoded(files, "tail"), CLIP[8:])
    assert (files.width, files.height) == (WIDTH, HEIGHT)
    files.verify()


@pytest.mark.parametrize(("head", "body", "tail"), [(0, 6, 4), (4, 6, 0), (0, 5, 0), (4, 0, 4)])
def test_parts_without_frames_have_no_file(tmp_path: Path, head: int, body: int, tail: int) -> None:
    """First, last and only segments, and one that is all overlap."""
    files = written(tmp_path / "s", head, body, tail)
    there = {part: files.path(part).exists() for part in files.frames}
    assert there == {part: frames > 0 for part, frames in files.frames.items()}


@pytest.mark.parametrize("count", [0, 3, 9])
def test_a_wrong_number_of_frames_leaves_nothing(tmp_path: Path, count: int) -> None:
    """Too few or too many frames: an error, and no directory that looks finished."""
    writer = SegmentWriter(tmp_path / "s", 2, 4, 2, WIDTH, HEIGHT)
    with pytest.raises(MediaError, match="8"), writer:
        for frame in CLIP[:count]:
            writer.write(frame)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_segment_leaves_nothing(tmp_path: Path) -> None:
    """Any exception in the block removes what was written."""
    with pytest.raises(KeyboardInterrupt), SegmentWriter(tmp_path / "s", 2, 4, 2, WIDTH, HEIGHT) as writer:
        writer.write(CLIP[0])
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """A segment that doesn't fit on the disk is a storage error, not half a segment."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(StorageError):
            written(tmp_path / "s", 6, 0, 6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_files_travel_as_arrays(tmp_path: Path) -> None:
    """What arrives on another node is bit by bit what left, from read-only arrays too (Ray's are)."""
    files = written(tmp_path / "s", 2, 3, 2)
    arrays = files.to_arrays()
    assert set(arrays) == {"segment.json", "head.mkv", "body.mp4", "tail.mkv"}
    assert not any(array.flags.writeable for array in arrays.values())
    stored = SegmentFiles.store(tmp_path / "elsewhere" / "s", arrays)
    stored.verify()
    assert {name: array.tobytes() for name, array in stored.to_arrays().items()} == {
        name: array.tobytes() for name, array in arrays.items()
    }


def test_storing_again_replaces(tmp_path: Path) -> None:
    """A second attempt at a segment takes the place of the first."""
    arrays = written(tmp_path / "a", 2, 3, 2).to_arrays()
    written(tmp_path / "b", 0, 4, 0)
    assert SegmentFiles.store(tmp_path / "b", arrays).frames == {"head": 2, "body": 3, "tail": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("name", ["head.mkv", "segment.json"])
def test_damage_on_the_way_is_noticed(tmp_path: Path, name: str) -> None:
    """A flipped byte or a broken manifest: an error and no directory."""
    arrays = written(tmp_path / "a", 2, 3, 2).to_arrays()
    arrays[name] = arrays[name].copy()
    arrays[name][0] ^= 255
    with pytest.raises(MediaError):
        SegmentFiles.store(tmp_path / "b", arrays)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_missing_and_cut_files_are_noticed(tmp_path: Path) -> None:
    """Opening a segment whose file was cut short, or is gone, fails."""
    files = written(tmp_path / "a", 2, 3, 2)
    arrays = files.to_arrays()
    del arrays["tail.mkv"]
    with pytest.raises(MediaError, match="should have the files"):
        SegmentFiles.store(tmp_path / "b", arrays)
    files.path("head").write_bytes(b"short")
    with pytest.raises(MediaError, match=r"a/head\.mkv has 5 bytes"):
        SegmentFiles.in_folder(tmp_path / "a")
