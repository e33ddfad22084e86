"""``pipeline.ffmpeg``: the pinned encodings, and what its failures become."""

from __future__ import annotations

import contextlib
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import av
import ffmpeg as builder
import numpy as np
import pytest
from av.video.frame import PictureType

from pipeline import ffmpeg
from pipeline.errors import ConfigurationError, MediaError, StorageError
from pipeline.ffmpeg import FINAL, LOSSLESS, Encoding
from pipeline.frame_writer import FrameWriter
from pipeline.frames import Frame, check_video, read_frames, stream_header

NOISE = np.random.default_rng(1).integers(0, 256, (8, 48, 64, 3), np.uint8)


def write(path: Path, frames: list[Frame], encoding: Encoding) -> Path:
    height, width = frames[0].shape[:2]
    with FrameWriter(path, width, height, encoding) as writer:
        for frame in frames:
            writer.write(frame)
    return path


@contextlib.contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """No file of this process or its children may grow past ``limit`` bytes: a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_lossless_gives_every_pixel_back(tmp_path: Path) -> None:
    """Overlaps survive the way to the stitcher bit by bit, noise included."""
    path = write(tmp_path / "x.mkv", list(NOISE), LOSSLESS)
    assert np.array_equal(list(read_frames(path)), NOISE)


def test_final_is_h264_for_browsers(tmp_path: Path) -> None:
    """The final encoding is 4:2:0 H.264 in BT.709, said so, with a key frame first and no B-frame."""
    path = write(tmp_path / "x.mp4", list(NOISE), FINAL)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert [frame.pts for frame in frames] == [512 * i for i in range(8)]
        assert {int(frame.pict_type) for frame in frames} <= {PictureType.I, PictureType.P}
        assert frames[0].key_frame
        bt709, limited = 1, 1
        assert {(f.colorspace, f.color_range, f.color_primaries, f.color_trc) for f in frames} == {
            (bt709, limited, bt709, bt709)
        }
    check_video(path, 8)


@pytest.mark.parametrize("colour", [(200, 40, 90), (255, 255, 255), (0, 0, 0), (10, 220, 60)])
def test_colours_come_out_as_they_went_in(tmp_path: Path, colour: tuple[int, int, int]) -> None:
    """RGB to BT.709 and back is off by two levels at most."""
    picture = np.full((32, 32, 3), colour, np.uint8)
    [out] = read_frames(write(tmp_path / "x.mp4", [picture], FINAL))
    assert np.abs(out.astype(int) - colour).max() <= 2


def test_headers_are_equal_whatever_is_encoded(tmp_path: Path) -> None:
    """One frame or many, noise or black: the same parameter sets, so files join by copy."""
    one = write(tmp_path / "one.mp4", [NOISE[0]], FINAL)
    many = write(tmp_path / "many.mp4", [np.zeros((48, 64, 3), np.uint8)] * 140, FINAL)
    assert stream_header(one) == stream_header(many) != b""


def test_an_exception_removes_the_file_and_ends_ffmpeg(tmp_path: Path) -> None:
    """Half a file is never left, nor the process that wrote it."""
    path = tmp_path / "x.mp4"
    writer = FrameWriter(path, 64, 48, FINAL)
    with pytest.raises(KeyError), writer:
        writer.write(NOISE[0])
        raise KeyError
    assert not path.exists()
    assert writer._process.poll() is not None


def test_a_full_disk_is_a_storage_error(tmp_path: Path) -> None:
    """Where the file can't grow, the error says so and no file is left."""
    path = tmp_path / "x.mkv"
    with file_size_limit(100_000), pytest.raises(StorageError), FrameWriter(path, 64, 48, LOSSLESS) as writer:
        for _ in range(100):
            writer.write(NOISE[0])
    assert not path.exists()


def test_no_space_left_is_understood_from_ffmpegs_words() -> None:
    """A device without space is named, by the file that was to be written."""
    stream = builder.input("testsrc=d=1", format="lavfi").output("/dev/full", format="matroska")
    with pytest.raises(StorageError, match="can't write /dev/full: no space left"):
        ffmpeg.run(stream, "fill the disk", Path("/dev/full"))


def test_a_failure_carries_what_ffmpeg_said(tmp_path: Path) -> None:
    """The reason is in the error, not in a log that nobody sees."""
    stream = builder.input(str(tmp_path / "none.wav")).output("-", format="null")
    with pytest.raises(MediaError, match=r"ffmpeg could not read it.*No such file"):
        ffmpeg.run(stream, "read it")


def test_a_killed_ffmpeg_is_a_media_error(tmp_path: Path) -> None:
    """When something kills ffmpeg in the middle, the writer says so and nothing hangs."""
    writer = FrameWriter(tmp_path / "x.mp4", 64, 48, FINAL)
    with pytest.raises(MediaError), writer:
        writer.write(NOISE[0])
        writer._process.send_signal(signal.SIGKILL)
        writer._process.wait()
        for _ in range(50):
            writer.write(NOISE[0])


def test_wrong_frames_are_refused(tmp_path: Path) -> None:
    """A frame of another size would shift every picture after it."""
    writer = FrameWriter(tmp_path / "x.mp4", 64, 48, FINAL)
    with pytest.raises(ValueError, match="file takes"), writer:
        writer.write(NOISE[0][:, :32])


def test_no_ffmpeg_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without ffmpeg is told so before anything else fails."""
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "nothing"))
    ffmpeg.binary.cache_clear()
    try:
        with pytest.raises(ConfigurationError, match="ffmpeg"):
            FrameWriter(tmp_path / "x.mp4", 64, 48, FINAL)
    finally:
        ffmpeg.binary.cache_clear()
