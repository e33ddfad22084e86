"""``pipeline.speech`` and ``pipeline.sound``: right lengths, one loudness, cuts by the sample."""

from __future__ import annotations

import io
import math
import subprocess
import tracemalloc
import wave
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pipeline import ffmpeg
from pipeline.errors import InvalidRequest, StorageError
from pipeline.sound import measure
from pipeline.speech import Speech, cut_speech, prepare_speech

Floats = npt.NDArray[np.float64]


def tone(seconds: float, rate: int, level: float = 0.3, pitch: float = 440) -> Floats:
    return level * np.sin(np.arange(round(seconds * rate)) * 2 * math.pi * pitch / rate)


def save(path: Path, channels: list[Floats], rate: int, *options: str) -> Path:
    """Encode with ffmpeg; ``options`` are output options."""
    levels = np.rint(np.array(channels).T * 32_767).astype("<i2").tobytes()
    source = ["-f", "s16le", "-ar", str(rate), "-ac", str(len(channels)), "-i", "-"]
    command = [ffmpeg.binary(), "-v", "error", "-y", *source, *options, str(path)]
    subprocess.run(command, input=levels, check=True)
    return path


def samples(content: bytes | Path) -> npt.NDArray[np.int16]:
    with wave.open(io.BytesIO(content) if isinstance(content, bytes) else str(content), "rb") as file:
        assert file.getparams()[:3] == (1, 2, 16_000)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


@pytest.mark.parametrize(
    ("name", "rate", "options", "slack"),
    [
        ("s.wav", 44_100, (), 0.0),
        ("s.wav", 8_000, ("-c:a", "pcm_f32le"), 0.0),
        ("s.wav", 48_000, ("-c:a", "pcm_s24le"), 0.0),
        ("s.flac", 96_000, (), 0.0),
        ("s.ogg", 44_100, ("-c:a", "libvorbis"), 0.001),
        ("s.opus", 48_000, ("-c:a", "libopus"), 0.001),
        ("s.m4a", 44_100, ("-c:a", "aac"), 0.001),
        ("s.mp3", 44_100, ("-c:a", "libmp3lame", "-q:a", "4"), 0.001),
        ("s.aac", 44_100, ("-c:a", "aac"), 0.05),  # raw: its priming is part of the sound
        ("s.mkv", 44_100, ("-c:a", "aac"), 0.03),
    ],
)
def test_lengths_are_right(
    tmp_path: Path, name: str, rate: int, options: tuple[str, ...], slack: float
) -> None:
    """Every format gives the length that went in, at 16 kHz, and the same sound."""
    source = save(tmp_path / name, [tone(3.3, rate)], rate, *options)
    speech = prepare_speech(source, tmp_path / "speech.wav")
    assert speech.source_seconds == pytest.approx(3.3, abs=slack + 1e-9)
    assert speech.samples == len(samples(speech.path)) == math.ceil(speech.source_seconds * 16_000 - 1e-6)
    assert speech.frames == math.floor(speech.source_seconds * 25 + 0.5)
    heard = samples(speech.path)[8_000:24_000].astype(float)
    assert np.argmax(np.abs(np.fft.rfft(heard))) == 440


def test_a_wrong_header_is_not_believed(tmp_path: Path) -> None:
    """An mp3 of varying bit rate without a header: containers guess, decoding counts."""
    speech = np.concatenate([np.zeros(10 * 44_100), tone(10, 44_100)])
    options = ("-c:a", "libmp3lame", "-q:a", "0", "-write_xing", "0")
    source = save(tmp_path / "s.mp3", [speech], 44_100, *options)
    assert prepare_speech(source, tmp_path / "o.wav").source_seconds == pytest.approx(20, abs=0.08)


def test_a_wav_that_claims_another_length(tmp_path: Path) -> None:
    """A header of a broken-off recording (endless or zero) doesn't change what is in the file."""
    source = save(tmp_path / "s.wav", [tone(2, 16_000)], 16_000)
    content = bytearray(source.read_bytes())
    place = content.index(b"data") + 4
    for claim in (0xFFFFFFFF, 100_000_000):
        content[place : place + 4] = claim.to_bytes(4, "little")
        source.write_bytes(content)
        assert prepare_speech(source, tmp_path / "o.wav").frames == 50


@pytest.mark.parametrize("side", [0, 1])
def test_a_voice_on_one_side_is_kept(tmp_path: Path, side: int) -> None:
    """Left or right only: the model hears it, as loud as a voice in the middle."""
    channels = [np.zeros(48_000), np.zeros(48_000)]
    channels[side] = tone(1, 48_000)
    middle = prepare_speech(save(tmp_path / "m.wav", [tone(1, 48_000)] * 2, 48_000), tmp_path / "a.wav")
    panned = prepare_speech(save(tmp_path / "p.wav", channels, 48_000), tmp_path / "b.wav")
    assert panned.gain_db == pytest.approx(middle.gain_db + 6.02, abs=0.1)
    assert np.abs(samples(panned.path).astype(int) - samples(middle.path)).max() < 30


def test_surround_is_mixed(tmp_path: Path) -> None:
    """5.1 with the voice in the centre."""
    channels = [np.zeros(48_000) for _ in range(6)]
    channels[2] = tone(1, 48_000)
    speech = prepare_speech(save(tmp_path / "s.wav", channels, 48_000), tmp_path / "o.wav")
    assert np.abs(samples(speech.path)).max() > 2_000


def loudness_of(speech: Speech, tmp_path: Path) -> float | None:
    raw = tmp_path / "check.f32"
    raw.write_bytes((samples(speech.path) / 32_768).astype("<f4").tobytes())
    return ffmpeg.loudness(raw, 16_000)


@pytest.mark.parametrize("level", [0.01, 0.1, 0.9])
def test_one_loudness(tmp_path: Path, level: float) -> None:
    """Quiet and loud recordings reach the model at -23 LUFS; the gain is known."""
    source = save(tmp_path / "s.wav", [tone(3, 16_000, level, 1000)], 16_000)
    speech = prepare_speech(source, tmp_path / "o.wav")
    assert loudness_of(speech, tmp_path) == pytest.approx(-23, abs=0.3)
    assert speech.gain_db == pytest.approx(-20 * math.log10(level) - 20, abs=0.5)


def test_the_gain_never_clips(tmp_path: Path) -> None:
    """A quiet voice with one loud knock is raised only as far as the knock allows."""
    sound = tone(3, 16_000, 0.01)
    sound[20_000:20_010] = 0.9
    speech = prepare_speech(save(tmp_path / "s.wav", [sound], 16_000), tmp_path / "o.wav")
    assert speech.gain_db == pytest.approx(-20 * math.log10(0.9), abs=0.1)
    assert np.abs(samples(speech.path).astype(int)).max() >= 32_700


def test_the_gain_is_limited(tmp_path: Path) -> None:
    """Something barely audible is not blown up to a voice."""
    speech = prepare_speech(save(tmp_path / "s.wav", [tone(2, 16_000, 0.0015)], 16_000), tmp_path / "o.wav")
    assert speech.gain_db == 30


def test_digital_silence_stays_silent(tmp_path: Path) -> None:
    """Pauses that are exactly zero are so after resampling and gain."""
    sound = np.concatenate([tone(1, 48_000, 0.05), np.zeros(48_000), tone(1, 48_000, 0.05)])
    speech = prepare_speech(save(tmp_path / "s.wav", [sound], 48_000), tmp_path / "o.wav")
    assert not samples(speech.path)[16_200:31_800].any()


def test_very_short_speech_works(tmp_path: Path) -> None:
    """Shorter than R128's blocks: the plain level stands in."""
    speech = prepare_speech(save(tmp_path / "s.wav", [tone(0.1, 16_000, 0.3)], 16_000), tmp_path / "o.wav")
    assert (speech.frames, speech.samples) == (3, 1600)
    assert -10 < speech.gain_db < -6


def test_a_videos_sound(tmp_path: Path) -> None:
    """A video file is as good as a sound file."""
    video = tmp_path / "v.mp4"
    picture = ["-f", "lavfi", "-i", "color=s=64x64:d=2", "-f", "lavfi", "-i", "sine=d=2"]
    subprocess.run([ffmpeg.binary(), "-v", "error", *picture, str(video)], check=True)
    assert prepare_speech(video, tmp_path / "o.wav").frames == 50


def test_damage_in_the_middle_is_skipped(tmp_path: Path) -> None:
    """A damaged spot costs that spot, and the track is no longer fit for copying."""
    source = save(tmp_path / "s.mp3", [tone(5, 44_100)], 44_100)
    content = bytearray(source.read_bytes())
    content[20_000:21_000] = bytes(1_000)
    source.write_bytes(content)
    assert 4.5 < prepare_speech(source, tmp_path / "o.wav").source_seconds < 5.2
    assert not measure(source).copyable(200)


def playlist(path: Path) -> None:
    secret = save(path.with_name("secret.wav"), [tone(1, 16_000)], 16_000)
    path.write_text(f"ffconcat version 1.0\nfile {secret.name}\n")


def silence(path: Path, level: float) -> None:
    save(path, [np.full(32_000, level)], 16_000)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is no file"),
        (lambda path: path.touch(), "is empty"),
        (lambda path: path.write_text("This is a text.\n" * 50), "no sound file"),
        (lambda path: path.write_bytes(bytes(5_000)), "sound"),
        (lambda path: path.write_bytes(b"RIFF\0\0\0\0WAVE"), "sound"),
        (lambda path: save(path, [tone(0, 16_000)], 16_000), "no sound that can be decoded"),
        (lambda path: save(path, [tone(0.01, 16_000)], 16_000), "shorter than one frame"),
        (lambda path: silence(path, 0.0), "the speech is silent"),
        (lambda path: silence(path, 0.0005), "the speech is silent"),
        (playlist, "no sound file"),
    ],
)
def test_what_is_no_speech_is_refused(tmp_path: Path, make: object, words: str) -> None:
    """Early, naming the field and the file, and leaving nothing; a playlist opens no other file."""
    assert callable(make)
    make(source := tmp_path / "s.wav")
    (out := tmp_path / "out").mkdir()
    with pytest.raises(InvalidRequest, match=words) as caught:
        prepare_speech(source, out / "o.wav")
    assert caught.value.field == "audio"
    assert "s.wav" in str(caught.value)
    assert list(out.iterdir()) == []


def test_a_video_without_sound_is_refused(tmp_path: Path) -> None:
    """Pictures only."""
    video = tmp_path / "v.mp4"
    picture = ["-f", "lavfi", "-i", "color=s=64x64:d=1"]
    subprocess.run([ffmpeg.binary(), "-v", "error", *picture, str(video)], check=True)
    with pytest.raises(InvalidRequest, match="has no sound"):
        prepare_speech(video, tmp_path / "o.wav")


def test_long_silence_is_refused_in_constant_memory(tmp_path: Path) -> None:
    """Ten minutes of zeros (38 MB of samples) are read to their end, a piece at a time."""
    source = save(tmp_path / "s.flac", [np.zeros(600 * 8_000)], 8_000)
    tracemalloc.start()
    with pytest.raises(InvalidRequest, match="the speech is silent"):
        prepare_speech(source, tmp_path / "o.wav")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


def test_no_place_for_the_track(tmp_path: Path) -> None:
    """A directory that isn't there can't be written."""
    source = save(tmp_path / "s.wav", [tone(1, 16_000)], 16_000)
    with pytest.raises(StorageError):
        prepare_speech(source, tmp_path / "none" / "o.wav")


@pytest.fixture(scope="module")
def ramp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A track of 10 frames and a half whose sample ``n`` is ``n + 1``."""
    path = tmp_path_factory.mktemp("ramp") / "ramp.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(np.arange(1, 6_721, dtype="<i2").tobytes())
    return path


@pytest.mark.parametrize(
    ("first", "frames", "extra", "start", "stop", "length"),
    [
        (0, 2, 0, 0, 1280, 1360),  # 80 zeros: what wav2vec2 wants for 2 frames
        (3, 2, 3, 1920, 5120, 3200),
        (3, 2, 64, 1920, 6720, 4800),  # to the end of the speech, no further
        (8, 4, 64, 5120, 6720, 2640),  # past the end: zeros
        (50, 1, 64, 6720, 6720, 720),
    ],
)
def test_cuts_are_exact(
    ramp: Path, first: int, frames: int, extra: int, start: int, stop: int, length: int
) -> None:
    """Frame f starts at sample 640 f; speech goes on while there is some, then zeros."""
    cut = samples(cut_speech(ramp, first, frames, extra))
    assert np.array_equal(cut[: stop - start], np.arange(start + 1, stop + 1))
    assert len(cut) == length
    assert not cut[stop - start :].any()
