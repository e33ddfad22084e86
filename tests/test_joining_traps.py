"""What goes wrong elsewhere when pieces of video are joined, each trap a test; and other rates.

The traps are those that were measured when the way of joining was chosen: time stamps, headers, sound.
"""

from __future__ import annotations

import hashlib
import math
import re
import subprocess
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest

from pipeline import ffmpeg
from pipeline.ffmpeg import TICKS
from pipeline.frame_writer import FrameWriter
from pipeline.frames import Frame, check_video, read_frames, stream_header
from pipeline.plan import Plan, Segment
from pipeline.segment_files import SegmentFiles, SegmentWriter
from pipeline.sound import make_track
from pipeline.stitch import stitch
from pipeline.timeline import frames_of

WIDTH, HEIGHT = 64, 64
SEGMENTS, STEP, OVERLAP = 8, 40, 14
FRAMES = SEGMENTS * STEP + OVERLAP
SECONDS = FRAMES / 25
RATE = 48_000


def picture(number: int, flashes: tuple[int, ...] = ()) -> Frame:
    """Says its number in black and white bars; all white at a flash."""
    if number in flashes:
        return np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    bars = np.array([230 * (number >> bit & 1) for bit in range(16)], np.uint8)
    row = np.repeat(bars, WIDTH // 16)
    return np.ascontiguousarray(np.broadcast_to(row[None, :, None], (HEIGHT, WIDTH, 3)))


def number(frame: Frame) -> int:
    bars = frame[HEIGHT // 2, WIDTH // 32 :: WIDTH // 16, 1] > 115
    return int(sum(int(bar) << bit for bit, bar in enumerate(bars)))


def clicks(frames: tuple[int, ...], seconds: float) -> npt.NDArray[np.int16]:
    """A click of 2 ms at the start of each frame."""
    wave = np.zeros(round(seconds * RATE))
    burst = 0.8 * np.sin(np.arange(RATE // 500) * 2 * math.pi * 3000 / RATE)
    for frame in frames:
        start = frame * RATE // 25
        wave[start : start + len(burst)] = burst[: len(wave) - start]
    return np.rint(wave * 32_000).astype("<i2")


def save(path: Path, wave: npt.NDArray[np.int16], *options: str) -> Path:
    source = ["-f", "s16le", "-ar", str(RATE), "-ac", "1", "-i", "-"]
    command = [ffmpeg.binary(), "-v", "error", "-y", *source, *options, str(path)]
    subprocess.run(command, input=wave.tobytes(), check=True)
    return path


def offsets(path: Path, frames: tuple[int, ...]) -> list[float]:
    """Seconds by which each click comes later than its frame, to the sample, by correlation."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        pieces = list(container.decode(stream))
        rate, start = pieces[0].sample_rate, pieces[0].time
        sound = np.concatenate([piece.to_ndarray()[0] for piece in pieces])
    assert start == 0
    click = np.sin(np.arange(rate // 500) * 2 * math.pi * 3000 / rate)
    late = []
    for frame in frames:
        first = max(frame * rate // 25 - rate // 20, 0)
        best = int(np.argmax(np.correlate(sound[first : first + rate // 10], click, "valid")))
        late.append((first + best) / rate - frame / 25)
    return late


@pytest.fixture(scope="module")
def segments(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, list[SegmentFiles]]:
    """Eight segments with seven seams."""
    folder = tmp_path_factory.mktemp("segments")
    planned, files = [], []
    for index in range(SEGMENTS):
        start, stop = index * STEP, (index + 1) * STEP + OVERLAP
        planned.append(Segment(index, start, stop, windows=(81,), gpu=index))
        head, tail = OVERLAP * (index > 0), OVERLAP * (index < SEGMENTS - 1)
        path = folder / f"{index:04d}"
        with SegmentWriter(path, head, stop - start - head - tail, tail, WIDTH, HEIGHT) as writer:
            for t in range(start, stop):
                writer.write(picture(t))
        files.append(SegmentFiles.in_folder(path))
    return Plan(total_frames=FRAMES, segments=tuple(planned), window=81, motion=9), files


@pytest.fixture(scope="module")
def talk(segments: tuple[Plan, list[SegmentFiles]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The eight joined, with a sound that is encoded."""
    folder = tmp_path_factory.mktemp("talk")
    sound = save(folder / "s.wav", clicks((2, 300), SECONDS))
    track = make_track(sound, FRAMES, folder / "track.mp4")
    stitch(*segments, track, folder / "talk.mp4", folder)
    return folder / "talk.mp4"


def packets(path: Path) -> list[av.Packet]:
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def test_no_delay_and_no_step_back_at_seven_joins(talk: Path) -> None:
    """Traps: make_zero's 80 ms at each join, inpoint and outpoint's extra packets and times going back.

    Every packet is decoded and shown at its own time, 512 ticks after the one before, from 0 on.
    """
    found = [(packet.dts, packet.pts, packet.duration) for packet in packets(talk)]
    assert found == [(TICKS * i, TICKS * i, TICKS) for i in range(FRAMES)]


def test_frames_survive_the_way_through_the_container(talk: Path) -> None:
    """Trap: raw streams joined and remuxed lose frames.  Decoded, each is there, in order, once."""
    check_video(talk, FRAMES)
    assert [number(frame) for frame in read_frames(talk)] == list(range(FRAMES))


def test_the_container_says_what_is_in_it(talk: Path) -> None:
    """Number, length and rate in the header are those of the decoded frames; the picture starts at 0."""
    with av.open(str(talk)) as container:
        video = container.streams.video[0]
        assert (video.frames, video.duration, video.start_time) == (FRAMES, FRAMES * TICKS, 0)
        assert video.time_base == Fraction(1, 25 * TICKS)
        assert video.average_rate == video.guessed_rate == 25
        assert container.duration is not None
        assert container.duration / 1e6 == pytest.approx(SECONDS, abs=1024 / RATE)


def test_one_set_of_parameters_for_the_whole_file(
    talk: Path, segments: tuple[Plan, list[SegmentFiles]]
) -> None:
    """Trap: parts of two encoders in one stream play in ffmpeg and fail elsewhere.

    The header is that of every part, and no packet carries parameters (NAL types 7 and 8) of its own.
    """
    headers = {stream_header(files.path("body")) for files in segments[1]}
    assert headers == {stream_header(talk)}
    for packet in packets(talk):
        content, place, kinds = bytes(packet), 0, set()
        while place < len(content):
            kinds.add(content[place + 4] & 31)
            place += 4 + int.from_bytes(content[place : place + 4], "big")
        assert not kinds & {7, 8}


def test_encoders_change_no_times() -> None:
    """Trap: ``fps`` in front of cuts gave each segment a frame too many (ffmpeg 5.1; ours is right).

    So no filter that counts frames is in either encoding; nor are B-frames, whose delay moves joins.
    """
    for encoding in (ffmpeg.FINAL, ffmpeg.LOSSLESS):
        assert not re.search(r"\b(fps|trim|select|setpts|tpad)\b", str(encoding.options.get("vf", "")))
        assert encoding.options["fps_mode"] == "passthrough"
    assert ffmpeg.FINAL.options["bf"] == 0


def test_parts_have_no_sound(segments: tuple[Plan, list[SegmentFiles]]) -> None:
    """Trap: joining files that have sound delays it by 39 ms at each join.  There is none to join."""
    for files in segments[1]:
        for part, frames in files.frames.items():
            if frames:
                with av.open(str(files.path(part))) as container:
                    assert [stream.type for stream in container.streams] == ["video"]


def test_copied_frames_are_what_the_renderer_encoded(
    talk: Path, segments: tuple[Plan, list[SegmentFiles]]
) -> None:
    """Packets of the bodies are in the result bit by bit: no second generation."""

    def digests(path: Path) -> set[str]:
        return {hashlib.sha256(bytes(packet)).hexdigest() for packet in packets(path)}

    there = digests(talk)
    assert all(digests(files.path("body")) <= there for files in segments[1])


@pytest.mark.parametrize("surplus", [-0.0199, -0.001, 0.0, 0.011, 0.0199])
def test_sound_never_changes_the_number_of_frames(
    segments: tuple[Plan, list[SegmentFiles]], tmp_path: Path, surplus: float
) -> None:
    """Trap: -shortest.  Sounds up to half a frame shorter or longer than the picture: each frame is there."""
    sound = save(tmp_path / "s.m4a", clicks((2, 300), SECONDS + surplus), "-c:a", "aac")
    track = make_track(sound, FRAMES, tmp_path / "track.mp4")
    assert track[0] == sound
    stitch(*segments, track, tmp_path / "talk.mp4", tmp_path)
    check_video(tmp_path / "talk.mp4", FRAMES)
    assert max(map(abs, offsets(tmp_path / "talk.mp4", (2, 300)))) < 0.001


def test_ffmpeg_reads_it_without_a_word(talk: Path) -> None:
    """Not one warning while all of it is decoded."""
    command = [ffmpeg.binary(), "-v", "warning", "-i", str(talk), "-map", "0", "-f", "null", "-"]
    assert subprocess.run(command, capture_output=True, check=True).stderr == b""


@pytest.mark.parametrize("codec", ["aac", "libmp3lame", "pcm_s16le"])
def test_sound_is_in_step_after_many_joins(tmp_path: Path, codec: str) -> None:
    """Three minutes joined of many parts: click and flash agree within 1 ms at the start and at the end.

    ``python -m bench.exactness`` does the same for an hour.
    """
    joins, length = 18, 250
    flashes = (3, length - 5)
    with FrameWriter(tmp_path / "part.mp4", WIDTH, HEIGHT, ffmpeg.FINAL) as writer:
        for t in range(length):
            writer.write(picture(t, flashes))
    frames = tuple(part * length + flash for part in range(joins) for flash in flashes)
    suffix = {"aac": "m4a", "libmp3lame": "mp3", "pcm_s16le": "wav"}[codec]
    sound = save(tmp_path / f"s.{suffix}", clicks(frames, joins * length / 25), "-c:a", codec)
    track = make_track(sound, joins * length, tmp_path / "track.mp4")
    assert (track[0] == sound) is (codec != "pcm_s16le")
    ffmpeg.join([(tmp_path / "part.mp4", length)] * joins, track, tmp_path / "talk.mp4", tmp_path)
    bright = [t for t, frame in enumerate(read_frames(tmp_path / "talk.mp4")) if frame.mean() > 240]
    assert bright == list(frames)
    assert max(map(abs, offsets(tmp_path / "talk.mp4", frames))) < 0.001


@pytest.mark.parametrize("fps", [10, 24, 30, 50, 60, 120])
def test_other_rates(segments: tuple[Plan, list[SegmentFiles]], tmp_path: Path, fps: int) -> None:
    """round(duration * fps) frames, one delta; each shows what is on screen in its middle; sound untouched.

    So nothing drifts: no picture comes more than half a frame early or late, at the start or at the end.
    """
    seconds = SECONDS + 0.0123  # ends within the last picture of 25 a second
    sound = save(tmp_path / "s.m4a", clicks((2, 300), seconds), "-c:a", "aac")
    shown = frames_of(round(seconds * RATE), RATE, fps)
    target = tmp_path / "talk.mp4"
    stitch(*segments, (sound, 0), target, tmp_path, fps=fps, shown=shown)
    check_video(target, shown, fps)
    middles = [min(int((Fraction(k) + Fraction(1, 2)) * 25 / fps), FRAMES - 1) for k in range(shown)]
    assert [number(frame) for frame in read_frames(target)] == middles
    assert max(map(abs, offsets(target, (2, 300)))) < 0.001
    with av.open(str(target)) as container, av.open(str(sound)) as original:
        video = container.streams.video[0]
        assert (video.frames, video.average_rate, video.duration) == (shown, fps, shown * TICKS)
        heard = [bytes(packet) for packet in container.demux(audio=0) if packet.size]
        assert heard == [bytes(packet) for packet in original.demux(audio=0) if packet.size]
    said = subprocess.run([ffmpeg.binary(), "-i", str(target)], capture_output=True, check=False).stderr
    assert re.search(rf"\b{fps} fps", said.decode())
