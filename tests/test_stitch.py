"""``pipeline.stitch``: exact frames, copied bodies, the user's own sound in step with the picture."""

from __future__ import annotations

import hashlib
import logging
import math
import resource
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest

from pipeline import ffmpeg, segment_files
from pipeline.errors import InvalidRequest, MediaError, StorageError
from pipeline.ffmpeg import FINAL, Encoding
from pipeline.frames import Frame, check_video, read_frames
from pipeline.plan import Plan, Segment
from pipeline.seam import Method, SeamReport
from pipeline.segment_files import SegmentFiles, SegmentWriter
from pipeline.sound import make_track
from pipeline.speech import prepare_speech
from pipeline.stitch import stitch

WIDTH, HEIGHT = 80, 64
Spans = Sequence[tuple[int, int]]
THREE = ((0, 60), (34, 100), (74, 150))
"""Overlaps of 26; 150 frames are 6 seconds."""
FLASHES = (2, 66, 148)
"""Frames that are white, with a click in the sound: in bodies and, in the middle of them, near the ends."""


def plan_of(spans: Spans) -> Plan:
    segments = tuple(Segment(i, *span, windows=(81,), gpu=i) for i, span in enumerate(spans))
    return Plan(total_frames=spans[-1][1], segments=segments, window=81, motion=9)


def picture(t: int) -> Frame:
    """Frame ``t`` of the clip that every segment renders alike: moving stripes, white at a flash."""
    if t in FLASHES:
        return np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    stripes = 100 + 50 * np.sin((x + t) / 7) + 20 * np.sin(y / 5)
    return np.repeat(stripes[..., None], 3, axis=2).astype(np.uint8)


def rendered(folder: Path, spans: Spans, slip: int = 0) -> list[SegmentFiles]:
    """Finished segments; each shows the clip ``slip`` frames further on than the one before."""
    plan = plan_of(spans)
    overlaps = (0, *plan.overlaps, 0)
    files = []
    for segment in plan.segments:
        head, tail = overlaps[segment.index], overlaps[segment.index + 1]
        path = folder / f"{segment.index:04d}"
        with SegmentWriter(path, head, segment.frames - head - tail, tail, WIDTH, HEIGHT) as writer:
            for t in range(segment.start, segment.stop):
                writer.write(picture(t + slip * segment.index))
        files.append(SegmentFiles.in_folder(path))
    return files


def clicks(seconds: float, rate: int, channels: int = 2) -> npt.NDArray[np.float32]:
    """A click of 2 ms at the start of every flash frame; [channels, samples]."""
    wave = np.zeros(round(seconds * rate), np.float32)
    for frame in FLASHES:
        start = frame * rate // 25
        burst = wave[start : start + rate // 500]
        burst[:] = 0.8 * np.sin(np.arange(len(burst)) * 2 * math.pi * 3000 / rate)
    return np.tile(wave, (channels, 1))


def save(path: Path, sound: npt.NDArray[np.float32], rate: int, codec: str = "pcm_s16le") -> Path:
    levels = np.rint(sound.T * 32_000).astype("<i2").tobytes()
    source = ["-f", "s16le", "-ar", str(rate), "-ac", str(len(sound)), "-i", "-"]
    options = ["-v", "error", "-y", *source, "-c:a", codec, str(path)]
    subprocess.run([ffmpeg.binary(), *options], input=levels, check=True)
    return path


def heard(path: Path) -> tuple[npt.NDArray[np.float32], int, str]:
    """First channel, rate and codec of a file's sound, by decoding."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        frames = list(container.decode(stream))
        assert frames[0].pts == 0
        resampler = av.AudioResampler(format="fltp")
        pieces = [out.to_ndarray()[0] for frame in frames for out in resampler.resample(frame)]
        return np.concatenate(pieces), frames[0].sample_rate, stream.codec_context.codec.canonical_name


def onset(sound: npt.NDArray[np.float32], rate: int, near: float) -> float:
    """Seconds at which a click begins, near a given time: where the click fits best."""
    start = round((near - 0.05) * rate)
    part = sound[max(start, 0) : start + round(0.1 * rate)]
    click = np.sin(np.arange(rate // 500) * 2 * math.pi * 3000 / rate)
    best = int(np.argmax(np.correlate(part, click, "valid")))
    return (max(start, 0) + best) / rate


def join(
    plan: Plan, segments: list[SegmentFiles], sound: Path, target: Path, work: Path
) -> tuple[SeamReport, ...]:
    """Make the track and join, as a job does."""
    with tempfile.TemporaryDirectory() as folder:
        track = make_track(sound, plan.total_frames, Path(folder) / "track.mp4")
        return stitch(plan, segments, track, target, work)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[SegmentFiles]:
    return rendered(tmp_path_factory.mktemp("three"), THREE)


@pytest.fixture(scope="module")
def wav(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("sound") / "s.wav", clicks(6, 44_100), 44_100)


@pytest.fixture(scope="module")
def joined(three: list[SegmentFiles], wav: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("joined")
    reports = join(plan_of(THREE), three, wav, folder / "talk.mp4", folder)
    assert [(report.frame, report.method) for report in reports] == [(34 + 12, "cut"), (74 + 12, "cut")]
    assert [path.name for path in folder.iterdir()] == ["talk.mp4"]
    return folder / "talk.mp4"


def planes(path: Path | str) -> list[str]:
    with av.open(str(path)) as container:
        return [hashlib.sha256(f.to_ndarray().tobytes()).hexdigest() for f in container.decode(video=0)]


def boxes(path: Path) -> list[bytes]:
    """Top-level boxes of an mp4 in order."""
    content, place, names = path.read_bytes(), 0, []
    while place < len(content):
        names.append(content[place + 4 : place + 8])
        place += int.from_bytes(content[place : place + 4], "big")
    return names


def test_frames_are_exact(joined: Path) -> None:
    """150 frames by decoding, each at its time, all close to what was rendered."""
    check_video(joined, 150)
    errors = [np.abs(out.astype(int) - picture(t)).mean() for t, out in enumerate(read_frames(joined))]
    assert max(errors) < 3


@pytest.mark.parametrize(
    ("seam", "method", "frames"), [("crossfade", "crossfade", 26), ("cut", "cut", 0), ("morph", "morph", 5)]
)
def test_segments_are_joined_as_asked(
    tmp_path: Path, wav: Path, seam: Method, method: str, frames: int
) -> None:
    """Every way of joining leaves the segments as they are; speech and the clip's own motion are measured."""
    files = rendered(tmp_path / "segments", THREE, slip=2)
    speech = prepare_speech(wav, tmp_path / "speech.wav")
    target = tmp_path / "talk.mp4"
    track = make_track(wav, 150, tmp_path / "track.mp4")
    reports = stitch(plan_of(THREE), files, track, target, tmp_path, seam=seam, speech=[speech.path])
    check_video(target, 150)
    for report in reports:
        assert report.method == method
        assert report.frames >= frames
        assert report.audio_db is not None
        assert report.natural > 1
    for part in files:
        part.verify()


def test_bodies_are_copied_bit_by_bit(joined: Path, three: list[SegmentFiles]) -> None:
    """Outside the overlaps the video decodes to what the renderer encoded."""
    whole = planes(joined)
    for files, start in zip(three, (0, 60, 100), strict=True):
        body = planes(files.path("body"))
        assert whole[start : start + len(body)] == body


def test_the_file_plays_in_a_browser(joined: Path) -> None:
    """H.264 4:2:0 and AAC, and the index in front of the data."""
    order = boxes(joined)
    assert order.index(b"moov") < order.index(b"mdat")
    with av.open(str(joined)) as container:
        video, audio = container.streams.video[0].codec_context, container.streams.audio[0].codec_context
        assert (video.name, video.pix_fmt, audio.name) == ("h264", "yuv420p", "aac")
        assert (video.width, video.height) == (WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("name", "codec", "rate", "kept"),
    [
        ("s.wav", "pcm_s16le", 16_000, "aac"),
        ("s.wav", "pcm_s16le", 48_000, "aac"),
        ("s.flac", "flac", 96_000, "aac"),
        ("s.mp3", "libmp3lame", 44_100, "mp3"),
        ("s.m4a", "aac", 48_000, "aac"),
        ("s.ogg", "libvorbis", 22_050, "aac"),
        ("s.opus", "libopus", 48_000, "aac"),
    ],
)
def test_sound_is_in_step_with_the_picture(
    three: list[SegmentFiles], tmp_path: Path, name: str, codec: str, rate: int, kept: str
) -> None:
    """Click and flash are less than 1 ms apart, first and last, whatever the sound came in."""
    sound = save(tmp_path / name, clicks(6, rate), rate, codec)
    target = tmp_path / "talk.mp4"
    join(plan_of(THREE), three, sound, target, tmp_path)
    flashes = [t for t, frame in enumerate(read_frames(target)) if frame.mean() > 240]
    assert flashes == list(FLASHES)
    samples, out_rate, out_codec = heard(target)
    assert out_codec == kept
    for frame in FLASHES:
        assert onset(samples, out_rate, frame / 25) == pytest.approx(frame / 25, abs=0.001)
    assert len(samples) / out_rate == pytest.approx(6, abs=0.03 if codec == "aac" else 0.06)


def test_aac_and_mp3_are_copied(three: list[SegmentFiles], tmp_path: Path) -> None:
    """What mp4 players take goes in packet by packet as it is."""
    sound = save(tmp_path / "s.m4a", clicks(6, 44_100), 44_100, "aac")
    join(plan_of(THREE), three, sound, tmp_path / "talk.mp4", tmp_path)

    def packets(path: Path) -> list[bytes]:
        with av.open(str(path)) as container:
            return [bytes(packet) for packet in container.demux(audio=0) if packet.size]

    assert packets(tmp_path / "talk.mp4") == packets(sound)


def test_sound_keeps_its_own_length(three: list[SegmentFiles], tmp_path: Path) -> None:
    """A track that ends within the last frame is neither cut nor padded to the picture."""
    sound = save(tmp_path / "s.wav", clicks(6.015, 48_000), 48_000)
    join(plan_of(THREE), three, sound, tmp_path / "talk.mp4", tmp_path)
    check_video(tmp_path / "talk.mp4", 150)
    samples, rate, _ = heard(tmp_path / "talk.mp4")
    assert 0 <= len(samples) / rate - 6.015 < 1024 / 48_000


@pytest.mark.parametrize(("name", "codec"), [("s.wav", "pcm_s16le"), ("s.m4a", "aac")])
def test_a_capped_video_ends_the_sound(
    three: list[SegmentFiles], tmp_path: Path, name: str, codec: str
) -> None:
    """With fewer frames than the sound has, the sound ends with the picture."""
    sound = save(tmp_path / name, clicks(9, 48_000), 48_000, codec)
    join(plan_of(THREE), three, sound, tmp_path / "talk.mp4", tmp_path)
    check_video(tmp_path / "talk.mp4", 150)
    with av.open(str(tmp_path / "talk.mp4")) as container:
        stream = container.streams.audio[0]
        assert stream.duration is not None
        assert stream.duration * stream.time_base == 6


def test_mono_stays_mono_and_surround_stays(three: list[SegmentFiles], tmp_path: Path) -> None:
    """Channels are the user's."""
    for channels in (1, 6):
        sound = save(tmp_path / f"{channels}.wav", clicks(6, 48_000, channels), 48_000)
        join(plan_of(THREE), three, sound, tmp_path / "talk.mp4", tmp_path)
        with av.open(str(tmp_path / "talk.mp4")) as container:
            assert len(container.streams.audio[0].layout.channels) == channels


def test_a_late_track_is_heard_when_the_model_heard_it(three: list[SegmentFiles], tmp_path: Path) -> None:
    """Sound that its file starts late begins at its first decoded sample, for viewers and model alike."""
    sound, plain = tmp_path / "late.mp4", save(tmp_path / "s.wav", clicks(6, 48_000), 48_000)
    picture = ["-f", "lavfi", "-i", "color=s=64x64:d=7"]
    late = ["-itsoffset", "0.5", "-i", str(plain), "-map", "0", "-map", "1", "-c:a", "aac", str(sound)]
    subprocess.run([ffmpeg.binary(), "-v", "error", *picture, *late], check=True)
    with av.open(str(sound)) as container:
        assert (container.streams.audio[0].start_time or 0) > 20_000
    join(plan_of(THREE), three, sound, tmp_path / "talk.mp4", tmp_path)
    out, rate, _ = heard(tmp_path / "talk.mp4")
    model, model_rate, _ = heard(prepare_speech(sound, tmp_path / "speech.wav").path)
    assert onset(out, rate, 66 / 25) == pytest.approx(onset(model, model_rate, 66 / 25), abs=0.001)
    assert onset(out, rate, 66 / 25) == pytest.approx(66 / 25, abs=0.025)  # AAC's priming, at the most


@pytest.mark.parametrize("spans", [((0, 40),), ((0, 26), (0, 60)), ((0, 1),), ((0, 40), (30, 60), (50, 90))])
def test_odd_plans(tmp_path: Path, spans: Spans) -> None:
    """One segment, a body without frames, one frame, overlaps shorter than the warm-up."""
    total = spans[-1][1]
    sound = save(tmp_path / "s.wav", clicks(total / 25, 16_000), 16_000)
    reports = join(plan_of(spans), rendered(tmp_path, spans), sound, tmp_path / "talk.mp4", tmp_path)
    assert len(reports) == len(spans) - 1
    check_video(tmp_path / "talk.mp4", total)


def test_any_path_works(three: list[SegmentFiles], wav: Path, tmp_path: Path) -> None:
    """Quotes, spaces, percent signs and a leading dash in names are only names."""
    folder = tmp_path / 'it\'s 100% "odd":\nname'
    folder.mkdir()
    join(plan_of(THREE), three, wav, folder / "-talk ü.mp4", folder)
    check_video(folder / "-talk ü.mp4", 150)


def test_other_encoders_are_noticed(
    tmp_path: Path, wav: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Parts with different parameter sets are encoded again, and the log says so."""
    other = Encoding(".mp4", "mp4", {**FINAL.options, "profile:v": "baseline"})
    with monkeypatch.context() as patch:
        patch.setitem(segment_files.PARTS, "body", other)
        files = rendered(tmp_path / "other", THREE)
    with caplog.at_level(logging.WARNING):
        join(plan_of(THREE), files, wav, tmp_path / "talk.mp4", tmp_path)
    assert "different encoders" in caplog.text
    check_video(tmp_path / "talk.mp4", 150)
    with av.open(str(tmp_path / "talk.mp4")) as container:
        frame = next(container.decode(video=0))
        assert (int(frame.colorspace), int(frame.color_range)) == (1, 1)
    errors = [
        np.abs(o.astype(int) - picture(t)).mean() for t, o in enumerate(read_frames(tmp_path / "talk.mp4"))
    ]
    assert max(errors) < 4


def cut_short(files: list[SegmentFiles], tmp_path: Path) -> Path:
    files[1].path("body").write_bytes(files[1].path("body").read_bytes()[:-400])
    return save(tmp_path / "s.wav", clicks(6, 44_100), 44_100)


def no_sound(files: list[SegmentFiles], tmp_path: Path) -> Path:
    (tmp_path / "s.wav").write_text("no sound at all")
    return tmp_path / "s.wav"


def wrong_overlap(files: list[SegmentFiles], tmp_path: Path) -> Path:
    files[1] = files[0]
    return save(tmp_path / "s.wav", clicks(6, 44_100), 44_100)


@pytest.mark.parametrize(
    ("spoil", "error"),
    [(cut_short, MediaError), (no_sound, InvalidRequest), (wrong_overlap, MediaError)],
)
def test_failures_leave_the_target_alone(
    tmp_path: Path, spoil: Callable[[list[SegmentFiles], Path], Path], error: type[Exception]
) -> None:
    """Damaged segments or sound: an error, an older result untouched, nothing half-made beside it."""
    files = rendered(tmp_path / "segments", THREE)
    sound = spoil(files, tmp_path)
    (out := tmp_path / "out").mkdir()
    (out / "talk.mp4").write_text("older")
    with pytest.raises(error):
        join(plan_of(THREE), files, sound, out / "talk.mp4", out)
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [("talk.mp4", "older")]


def test_a_full_disk_leaves_nothing(three: list[SegmentFiles], wav: Path, tmp_path: Path) -> None:
    """No space for the result is a storage error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
    try:
        with pytest.raises(StorageError):
            join(plan_of(THREE), three, wav, tmp_path / "talk.mp4", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
