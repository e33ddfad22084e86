"""``pipeline.source_video``: the right picture at every frame of the job."""

from __future__ import annotations

import subprocess
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline import ffmpeg
from pipeline.errors import InvalidRequest
from pipeline.source_video import SourceVideo

WIDTH, HEIGHT = 96, 64


def picture(number: int) -> np.ndarray:  # type: ignore[type-arg]
    """Says its number in eight black and white bars, which no codec blurs."""
    bars = np.array([255 * (number >> bit & 1) for bit in range(8)], np.uint8)
    row = np.repeat(bars, WIDTH // 8)
    return np.ascontiguousarray(np.broadcast_to(row[None, :, None], (HEIGHT, WIDTH, 3)))


def number(frame: np.ndarray) -> int:  # type: ignore[type-arg]
    """What ``picture`` was given."""
    bars = frame[frame.shape[0] // 2, WIDTH // 16 :: WIDTH // 8, 1] > 128
    return int(sum(int(bar) << bit for bit, bar in enumerate(bars)))


def save(path: Path, times: list[Fraction], gop: int = 12, rate: Fraction | int = 25) -> Path:
    """Picture ``i`` at ``times[i]`` seconds, with B-frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate), options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 12_000)
        stream.codec_context.gop_size = gop
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
            frame.pts, frame.time_base = round(time * 12_000), Fraction(1, 12_000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def at_rate(rate: Fraction | int, count: int) -> list[Fraction]:
    return [Fraction(i) / rate for i in range(count)]


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.mov", "v.avi", "v.ts"])
def test_25_frames_a_second(tmp_path: Path, name: str) -> None:
    """At our own rate every frame of the job shows the frame of the same number."""
    video = SourceVideo.opened(save(tmp_path / name, at_rate(25, 60)))
    assert (video.frames, video.size) == (60, (WIDTH, HEIGHT))
    assert [number(video.frame_at(t)) for t in range(60)] == list(range(60))


@pytest.mark.parametrize("rate", [Fraction(10), Fraction(24_000, 1001), Fraction(30), Fraction(60)])
def test_other_rates(tmp_path: Path, rate: Fraction) -> None:
    """What is on screen at t / 25 s is what the source shows then; its length is kept."""
    video = SourceVideo.opened(save(tmp_path / "v.mp4", at_rate(rate, 80), rate=rate))
    assert video.frames == round(80 / rate * 25)
    for t in range(video.frames):
        assert number(video.frame_at(t)) == int(Fraction(t, 25) * rate + Fraction(1, 500))


def test_a_varying_rate(tmp_path: Path) -> None:
    """Phones drop frames; times count, not numbers."""
    times = [Fraction(t, 25) for t in (0, 1, 2, 10, 11, 30, 31, 32, 40)]
    video = SourceVideo.opened(save(tmp_path / "v.mp4", times))
    shown = {0: 0, 5: 2, 9: 2, 10: 3, 29: 4, 30: 5, 39: 7, 40: 8}
    assert {t: number(video.frame_at(t)) for t in shown} == shown


def test_any_order(tmp_path: Path) -> None:
    """Windows are asked for in order, but segments come again after a loss."""
    video = SourceVideo.opened(save(tmp_path / "v.mp4", at_rate(25, 200), gop=40))
    for t in (0, 72, 144, 144, 10, 199, 3, 120, 121, 60, 190):
        assert number(video.frame_at(t)) == t


def test_a_short_source_goes_back_and_forth(tmp_path: Path) -> None:
    """After its last frame it runs backwards to the first, without showing either twice."""
    video = SourceVideo.opened(save(tmp_path / "v.mp4", at_rate(25, 10)))
    expected = [*range(10), *range(8, -1, -1), *range(1, 10), 8]
    assert [number(video.frame_at(t)) for t in range(len(expected))] == expected


def test_one_frame_stands_still(tmp_path: Path) -> None:
    """A video of one frame is a portrait."""
    video = SourceVideo.opened(save(tmp_path / "v.mp4", at_rate(25, 1)))
    assert [number(video.frame_at(t)) for t in (0, 1, 500)] == [0, 0, 0]


def test_a_late_start(tmp_path: Path) -> None:
    """The first picture is the job's first, whatever time the file gives it."""
    late = [time + 3 for time in at_rate(25, 20)]
    video = SourceVideo.opened(save(tmp_path / "v.mkv", late))
    assert [number(video.frame_at(t)) for t in (0, 5, 19)] == [0, 5, 19]


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_phones_are_turned(tmp_path: Path, degrees: int) -> None:
    """The display matrix is honoured, in the picture and in its size."""
    plain = save(tmp_path / "plain.mp4", at_rate(25, 5))
    turned = tmp_path / "turned.mp4"
    command = ["-v", "error", "-display_rotation", str(degrees), "-i", str(plain), "-c", "copy", str(turned)]
    subprocess.run([ffmpeg.binary(), *command], check=True)
    video = SourceVideo.opened(turned)
    assert video.size == ((WIDTH, HEIGHT) if degrees == 180 else (HEIGHT, WIDTH))
    raw = ["-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    command = [ffmpeg.binary(), "-v", "error", "-i", str(turned), *raw]
    upright = subprocess.run(command, capture_output=True, check=True).stdout
    frame = video.frame_at(0)
    assert np.abs(np.frombuffer(upright, np.uint8).reshape(frame.shape).astype(int) - frame).mean() < 4


@pytest.mark.parametrize("tags", ["bt709:range=pc", "bt709:range=tv", "smpte170m:range=tv"])
def test_colours_are_read_as_tagged(tmp_path: Path, tags: str) -> None:
    """Matrix and range are the source's, not a guess."""
    matrix, spread = tags.split(":range=")
    filters = (
        f"color=c=0xC82858:s=64x64:d=0.2,format=gbrp,scale=out_color_matrix={matrix}:out_range={spread},"
        f"format=yuv444p,setparams=colorspace={matrix}:range={spread}"
    )
    path = tmp_path / "v.mkv"
    command = ["-v", "error", "-f", "lavfi", "-i", filters, "-c:v", "libx264", "-qp", "0", str(path)]
    subprocess.run([ffmpeg.binary(), *command], check=True)
    frame = SourceVideo.opened(path).frame_at(0)
    assert np.abs(frame[32, 32].astype(int) - (0xC8, 0x28, 0x58)).max() <= 3


def test_pictures_come_fitted(tmp_path: Path) -> None:
    """As PNG of the video's size, which the request or the source decides."""
    video = SourceVideo.opened(save(tmp_path / "v.mp4", at_rate(25, 3)))
    assert video.fitted_size(192, None) == (192, 128)
    png = video.png_at(1, 192, 128)
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")) == (192, 128)


def test_memory_does_not_grow_with_the_source(tmp_path: Path) -> None:
    """No pictures are kept: 1,000 frames of 18 kB, a few of them in memory."""
    video = SourceVideo.opened(save(tmp_path / "v.mp4", at_rate(25, 1000), gop=100))
    tracemalloc.start()
    for t in range(0, 1000, 72):
        video.frame_at(t)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def sound_only(path: Path) -> None:
    command = ["-v", "error", "-f", "lavfi", "-i", "sine=d=1", "-f", "mp4", str(path)]
    subprocess.run([ffmpeg.binary(), *command], check=True)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is no file"),
        (lambda path: path.touch(), "is empty"),
        (lambda path: path.write_text("A text that is called a video.\n" * 40), "is no video"),
        (lambda path: path.write_bytes(bytes(4_000)), "is no video"),
        (sound_only, "has no pictures"),
    ],
)
def test_what_is_no_video_is_refused(tmp_path: Path, make: Callable[[Path], None], words: str) -> None:
    """Early, naming the field and the file."""
    make(source := tmp_path / "v.mp4")
    with pytest.raises(InvalidRequest, match=words) as caught:
        SourceVideo.opened(source)
    assert caught.value.field == "video"
    assert "v.mp4" in str(caught.value)
