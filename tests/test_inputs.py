"""Sounds as users have them: containers, codecs, rates, channels, lying headers, late starts, parts."""

from __future__ import annotations

import math
import struct
import subprocess
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pipeline import ffmpeg
from pipeline.errors import InvalidRequest
from pipeline.sound import Part, make_track, measure
from pipeline.speech import prepare_speech
from pipeline.timeline import frames_of

SECONDS = 2.345
LEAD = 0.4
"""Seconds of digital silence at the start."""


def sound(seconds: float, rate: int, channels: int) -> npt.NDArray[np.int16]:
    """[samples, channels]: silence, then a chirp, as loud in every channel."""
    times = np.arange(round(seconds * rate)) / rate
    chirp = 0.3 * np.sin(2 * np.pi * (200 + 150 * times) * times) * (times >= LEAD)
    return np.repeat(np.rint(chirp * 32_767).astype("<i2")[:, None], channels, axis=1)


def run(*arguments: object, stdin: bytes = b"") -> bytes:
    command = [ffmpeg.binary(), "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, check=True).stdout


def save(path: Path, rate: int, channels: int, *options: str, seconds: float = SECONDS) -> Path:
    """Encode with ffmpeg; files that are named like videos get pictures too."""
    pictures = ["-f", "lavfi", "-i", f"color=s=64x64:r=25:d={seconds}"]
    video = path.suffix in (".mp4", ".mov", ".mkv", ".webm", ".avi", ".ts") and "-vn" not in options
    source = ["-f", "s16le", "-ar", rate, "-ac", channels, "-i", "-"]
    run(*(pictures if video else []), *source, *options, path, stdin=sound(seconds, rate, channels).tobytes())
    return path


def decoded(path: Path) -> tuple[int, int]:
    """Samples and channels that ffmpeg finds in a file."""
    channels = measure(path).channels
    return len(run("-i", path, "-map", "0:a:0", "-f", "s16le", "-")) // (2 * channels), channels


@pytest.mark.parametrize(
    ("name", "rate", "channels", "options", "slack"),
    [
        ("s.wav", 8_000, 1, (), 0.0),
        ("s.wav", 11_025, 2, (), 0.0),
        ("s.wav", 22_050, 6, (), 0.0),
        ("s.wav", 96_000, 2, ("-c:a", "pcm_f64le"), 0.0),
        ("s.w64", 48_000, 2, (), 0.0),
        ("s.aiff", 44_100, 2, (), 0.0),
        ("s.flac", 96_000, 6, (), 0.0),
        ("s.flac", 11_025, 1, (), 0.0),
        ("s.mp3", 44_100, 2, ("-q:a", "5"), 0.0005),
        ("s.mp3", 22_050, 1, ("-q:a", "2"), 0.0005),
        ("s.mp3", 8_000, 1, (), 0.0005),
        ("s.ogg", 11_025, 1, ("-c:a", "libvorbis"), 0.0005),
        ("s.ogg", 44_100, 6, ("-c:a", "libvorbis"), 0.0005),
        ("s.opus", 48_000, 2, (), 0.0005),
        ("s.opus", 48_000, 6, (), 0.0005),
        ("s.opus", 8_000, 1, (), 0.0005),
        ("s.m4a", 22_050, 2, (), 0.0005),
        ("s.m4a", 96_000, 2, (), 0.0005),
        ("s.m4a", 8_000, 1, (), 0.0005),
        ("s.m4a", 44_100, 6, (), 0.0005),
        ("s.m4a", 44_100, 2, ("-c:a", "alac"), 0.0005),
        ("s.mp4", 44_100, 2, ("-c:a", "aac"), 0.0005),
        ("s.mp4", 48_000, 6, ("-c:a", "aac"), 0.0005),
        ("s.mov", 44_100, 2, ("-c:a", "pcm_s16le"), 0.0005),
        ("s.mkv", 44_100, 2, ("-c:a", "flac"), 0.0005),
        ("s.mkv", 22_050, 1, ("-c:a", "libmp3lame"), 0.03),
        ("s.mkv", 44_100, 2, ("-c:a", "aac"), 0.03),
        ("s.webm", 48_000, 2, ("-c:v", "libvpx", "-c:a", "libopus"), 0.0005),
        ("s.webm", 44_100, 1, ("-c:v", "libvpx", "-c:a", "libvorbis"), 0.03),
        ("s.avi", 44_100, 2, ("-c:a", "pcm_s16le"), 0.0),
        ("s.avi", 44_100, 2, ("-c:a", "libmp3lame"), 0.06),
        ("s.ts", 48_000, 2, ("-c:a", "aac"), 0.05),
    ],
)
def test_every_input_has_its_right_length(
    tmp_path: Path, name: str, rate: int, channels: int, options: tuple[str, ...], slack: float
) -> None:
    """As many samples as ffmpeg decodes; the length that went in (but for what a codec adds and doesn't
    say); the model's track as long; what is silent at the start is so in it."""
    path = save(tmp_path / name, rate, channels, *options)
    track = measure(path)
    assert (track.samples, track.channels) == decoded(path)
    assert track.channels == channels
    assert track.seconds == pytest.approx(SECONDS, abs=slack + 1 / rate)
    speech = prepare_speech(path, tmp_path / "speech.wav")
    assert speech.source_seconds == Fraction(track.samples, track.rate)
    assert speech.frames == frames_of(track.samples, track.rate)
    assert speech.samples == math.ceil(speech.source_seconds * 16_000)
    heard = np.frombuffer(run("-i", speech.path, "-f", "s16le", "-"), "<i2")
    assert len(heard) == speech.samples
    onset = int(np.argmax(np.abs(heard) > 1_500)) / 16_000
    assert onset == pytest.approx(LEAD, abs=slack + 0.005)


def flac_claims(content: bytearray, factor: float) -> None:
    """STREAMINFO: the low 32 bits of the number of samples are bytes 14-17 of its body."""
    place = content.index(b"fLaC") + 8 + 14
    [samples] = struct.unpack_from(">I", content, place)
    struct.pack_into(">I", content, place, round(samples * factor))


def matroska_claims(content: bytearray, factor: float) -> None:
    """Segment Info, Duration: id 4489, 8 bytes of float."""
    place = content.index(b"\x44\x89\x88") + 3
    [length] = struct.unpack_from(">d", content, place)
    struct.pack_into(">d", content, place, length * factor)


def xing_claims(content: bytearray, factor: float) -> None:
    """Frames of an mp3 of varying bit rate."""
    place = (content.find(b"Xing") if b"Xing" in content else content.index(b"Info")) + 8
    [frames] = struct.unpack_from(">I", content, place)
    struct.pack_into(">I", content, place, round(frames * factor))


def mp4_claims(content: bytearray, factor: float) -> None:
    """Movie and media header (version 0)."""
    for name in (b"mvhd", b"mdhd"):
        place = content.index(name) + 4 + 16
        [length] = struct.unpack_from(">I", content, place)
        struct.pack_into(">I", content, place, round(length * factor))


@pytest.mark.parametrize("factor", [0.5, 3.0])
@pytest.mark.parametrize(
    ("name", "claims"),
    [("s.flac", flac_claims), ("s.mka", matroska_claims), ("s.mp3", xing_claims), ("s.m4a", mp4_claims)],
)
def test_headers_that_lie(
    tmp_path: Path, name: str, claims: Callable[[bytearray, float], None], factor: float
) -> None:
    """A file that says it is half or three times as long is as long as it is."""
    options = ("-c:a", "flac") if name == "s.mka" else ()
    path = save(tmp_path / name, 44_100, 2, *options)
    content = bytearray(path.read_bytes())
    claims(content, factor)
    path.write_bytes(content)
    assert measure(path).seconds == pytest.approx(SECONDS, abs=0.01)  # mp3: its padding, at the most


@pytest.mark.parametrize(
    ("name", "codec", "slack"),
    [
        ("s.mp4", "aac", 0.022),  # ffmpeg doesn't skip AAC's priming (1024 samples) behind an empty edit
        ("s.mkv", "flac", 0.0001),
        ("s.mov", "pcm_s16le", 0.0001),
        ("s.webm", "libopus", 0.001),
    ],
)
def test_sound_that_starts_late(tmp_path: Path, name: str, codec: str, slack: float) -> None:
    """A stream that begins 0.7 s after the pictures is as long as its own samples, for model and viewers."""
    plain = save(tmp_path / "plain.wav", 48_000, 2)
    pictures = ["-f", "lavfi", "-i", "color=s=64x64:r=25:d=4"]
    late = ["-itsoffset", "0.7", "-i", plain, "-map", "0:v", "-map", "1:a", "-c:a", codec]
    run(*pictures, *late, tmp_path / name)
    track = measure(tmp_path / name)
    assert track.seconds == pytest.approx(SECONDS, abs=slack)
    assert not track.copyable(10_000)
    path, index = make_track(tmp_path / name, track.samples, tmp_path / "track.mp4")
    assert (path, index) == (tmp_path / "track.mp4", 0)
    assert measure(path).seconds == pytest.approx(track.seconds, abs=0.0001)


@pytest.mark.parametrize(
    ("name", "rate", "codec"),
    [
        ("s.wav", 44_100, "pcm_s24le"),
        ("s.wav", 11_025, "pcm_f32le"),
        ("s.flac", 96_000, "flac"),
        ("s.mp3", 44_100, "libmp3lame"),
        ("s.m4a", 48_000, "aac"),
        ("s.opus", 48_000, "libopus"),
    ],
)
@pytest.mark.parametrize(("start", "end"), [(0.72, 1.9), (0.0, 1.5), (1.0, None)])
def test_parts_are_cut_to_the_sample(
    tmp_path: Path, name: str, rate: int, codec: str, start: float, end: float | None
) -> None:
    """``audio_start`` and ``audio_end``: model and viewers hear what the whole file has there, no more."""
    path = save(tmp_path / name, rate, 2, "-c:a", codec)
    whole = measure(path)
    stop = whole.samples if end is None else round(end * rate)
    part = Part(start, end)
    track = measure(path, part)
    assert (track.first, track.samples, track.cut) == (round(start * rate), stop - round(start * rate), True)
    speech = prepare_speech(path, tmp_path / "part.wav", part=part)
    everything = prepare_speech(path, tmp_path / "whole.wav")
    assert speech.source_seconds == Fraction(track.samples, rate)
    heard, reference = (
        np.frombuffer(run("-i", s.path, "-f", "s16le", "-"), "<i2") / 10 ** (s.gain_db / 20)
        for s in (speech, everything)
    )
    first = round(start * 16_000)
    same = reference[first : first + len(heard)]
    assert np.abs(heard - same)[50:-50].max() < 60  # of 32,767; resamplers start differently
    out, index = make_track(path, speech.frames, tmp_path / "track.mp4", part)
    assert (out, index) == (tmp_path / "track.mp4", 0)  # never copied: packets can't be cut to the sample
    assert measure(out).seconds == pytest.approx(track.samples / rate, abs=1 / 40_000)
    seen = np.frombuffer(run("-i", out, "-ac", 1, "-ar", 16_000, "-f", "s16le", "-"), "<i2").astype(float)
    reference = np.frombuffer(run("-i", path, "-ac", 1, "-ar", 16_000, "-f", "s16le", "-"), "<i2")
    same = reference[first : first + len(seen)].astype(float)
    shifts = range(-20, 21)
    errors = [np.abs(np.roll(seen, shift)[2_000:14_000] - same[2_000:14_000]).mean() for shift in shifts]
    assert abs(shifts[int(np.argmin(errors))]) <= 1  # of 1/16000 s


def test_a_part_that_is_the_whole_is_copied(tmp_path: Path) -> None:
    """An end that is the sound's own cuts nothing, so the stream goes in as it is."""
    path = save(tmp_path / "s.m4a", 48_000, 2)
    seconds = measure(path).seconds
    assert make_track(path, 100, tmp_path / "t.mp4", Part(0.0, seconds + 0.01)) == (path, 0)


@pytest.mark.parametrize(
    ("part", "field"),
    [(Part(3.0), "audio_start"), (Part(0.0, 2.5), "audio_end"), (Part(5.0, 6.0), "audio_start")],
)
def test_parts_that_are_not_there(tmp_path: Path, part: Part, field: str) -> None:
    """The error names the field and says how long the sound is."""
    path = save(tmp_path / "s.wav", 16_000, 1)
    with pytest.raises(InvalidRequest, match=r"is over after 2\.345 s") as caught:
        measure(path, part)
    assert caught.value.field == field
