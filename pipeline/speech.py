"""What the model hears: one mono track at 16 kHz, made once from the whole sound and cut by the sample.

Its channels are mixed by ``downmix``; one gain brings the whole track to -23 LUFS, so that segments agree.
What viewers hear is ``sound``'s.
"""

from __future__ import annotations

import io
import math
import tempfile
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO

import av
import numpy as np
import numpy.typing as npt

from pipeline import ffmpeg
from pipeline.downmix import Downmix
from pipeline.errors import InvalidRequest, StorageError
from pipeline.sound import WHOLE, Part, SoundReader, measure
from pipeline.timeline import SAMPLES_PER_FRAME, SPEECH_RATE, frames_of

TARGET_LUFS = -23.0
"""EBU R128's programme loudness, what InfiniteTalk's own loader normalises to."""

MOST_GAIN_DB = 30.0
"""A quieter track is noise rather than speech; it is not blown up further."""

SILENCE_DBFS = -60.0
"""A track whose loudest sample is below this is silent."""

GATE_DBFS = -50.0
"""A cut in which no frame is louder (RMS) holds nobody's speech and becomes digital silence: wav2vec2
normalises over time and would blow the noise of the room up to the level of speech.  27 dB below speech."""

PAUSE_DBFS = -45.0
"""A frame that is no louder (RMS, of speech at -23 LUFS) is part of a pause."""
SHORTEST_PAUSE = 3
"""Frames."""

TAIL_SAMPLES = 80
"""A window of N frames needs 640 N + 80 samples: wav2vec2's receptive field costs a frame otherwise."""

_FORMAT = (1, 2, SPEECH_RATE, 0, "NONE", "not compressed")
_CHUNK = 65_536

Samples = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Speech:
    """The prepared track: a WAV file, 16 kHz, mono, 16 bit."""

    path: Path
    samples: int
    """With the silence in front."""
    frames: int
    """Frames of a video as long as the source: ``round(source_seconds * 25)``."""
    gain_db: float
    """What the loudness normalisation applied."""
    source_seconds: Fraction
    """Length of the source, from its decoded samples."""


def prepare_speech(
    source: Path, target: Path, lead: int = 0, part: Part = WHOLE, voice: Path | None = None
) -> Speech:
    """Decode ``source`` (any sound file, or a video's sound) into the WAV ``target``; memory stays constant.

    ``lead``: samples of digital silence in front, for a speaker who begins later than the video.
    ``voice``: what ``vocals`` made of the part; then ``source`` says how long it is, and nothing else.
    Raises ``InvalidRequest("audio", ...)`` where there is nothing to hear, ``StorageError``, ``MediaError``.
    """
    partial = target.with_name(f".{target.name}.partial")
    try:
        with tempfile.NamedTemporaryFile(prefix=".speech-", dir=target.parent) as raw:
            with SoundReader(source, part) if voice is None else SoundReader(voice) as reader:
                peak = _write_mono(reader, raw)
            length = reader if voice is None else measure(source, part)
            # The resampler rounds its last sample either way; the length is the source's own.
            samples = math.ceil(length.samples * SPEECH_RATE / length.rate)
            raw.truncate(4 * samples)
            raw.flush()
            frames = frames_of(length.samples, length.rate)
            if not frames:
                raise InvalidRequest("audio", f"{source} is shorter than one frame of video (0.04 s)")
            if peak < 10 ** (SILENCE_DBFS / 20):
                raise InvalidRequest(
                    "audio", f"the speech is silent: {source} stays below {SILENCE_DBFS:.0f} dBFS"
                )
            gain_db = _gain(Path(raw.name), samples, peak)
            _write_wav(Path(raw.name), 10 ** (gain_db / 20), partial, lead)
        partial.replace(target)
    except OSError as error:
        raise StorageError(str(target), error.strerror or str(error)) from error
    finally:
        partial.unlink(missing_ok=True)
    return Speech(target, lead + samples, frames, round(gain_db, 2), Fraction(length.samples, length.rate))


def write_voice(separated: Path, target: Path, samples: int) -> bool:
    """A separated voice as WAV, 16 kHz, mono: its first ``samples``, and silence where it has fewer.

    False: it is silent.
    """
    with tempfile.NamedTemporaryFile(prefix=".voice-", dir=target.parent) as raw:
        with SoundReader(separated) as reader:
            peak = _write_mono(reader, raw)
        raw.truncate(4 * samples)
        raw.flush()
        _write_wav(Path(raw.name), 1.0, target, 0)
    return peak >= 10 ** (SILENCE_DBFS / 20)


def cut_speech(speech: Path, first_frame: int, frames: int, extra: int) -> bytes:
    """The speech of ``frames`` frames from ``first_frame`` on, as WAV; sample 0 is that frame's first.

    It goes on for up to ``extra`` frames past the end where there is speech, and is filled with zeros up to
    ``640 * frames + 80`` samples where there is none.  A cut without speech is digital silence.
    """
    with wave.open(str(speech), "rb") as source:
        start = min(first_frame * SAMPLES_PER_FRAME, source.getnframes())
        source.setpos(start)
        content = _gated(source.readframes((frames + extra) * SAMPLES_PER_FRAME))
    least = 2 * (frames * SAMPLES_PER_FRAME + TAIL_SAMPLES)
    target = io.BytesIO()
    with wave.open(target, "wb") as wav:
        wav.setparams(_FORMAT)
        wav.writeframes(content.ljust(least, b"\0"))
    return target.getvalue()


def frame_levels(speech: Path, first_frame: int, frames: int) -> list[float]:
    """Level (RMS, dBFS) of each of ``frames`` frames from ``first_frame`` on; -100 for silence."""
    with wave.open(str(speech), "rb") as source:
        source.setpos(min(first_frame * SAMPLES_PER_FRAME, source.getnframes()))
        content = source.readframes(frames * SAMPLES_PER_FRAME)
    padded = content.ljust(2 * frames * SAMPLES_PER_FRAME, b"\0")
    levels = np.frombuffer(padded, "<i2").reshape(frames, -1).astype(np.float32) / 32_768
    return [max(-100.0, 10 * math.log10(float(np.square(part).mean()) + 1e-12)) for part in levels]


def find_pauses(speech: Sequence[Path], frames: int) -> list[tuple[int, int]]:
    """Frames ``[first, stop)`` in which nobody speaks, of 3 frames or more, in the first ``frames``.

    ``speech``: the speakers' prepared tracks.  Raises ``StorageError`` where one can't be read.
    """
    pauses: list[tuple[int, int]] = []
    began = 0
    try:
        for start in range(0, frames, _CHUNK):
            count = min(_CHUNK, frames - start)
            levels = [
                max(frame) for frame in zip(*(frame_levels(s, start, count) for s in speech), strict=True)
            ]
            for t, level in enumerate(levels, start):
                if level > PAUSE_DBFS:
                    if t - began >= SHORTEST_PAUSE:
                        pauses.append((began, t))
                    began = t + 1
    except OSError as error:
        raise StorageError(str(speech[0]), error.strerror or str(error)) from error
    return [*pauses, (began, frames)] if frames - began >= SHORTEST_PAUSE else pauses


def _gated(content: bytes) -> bytes:
    """The samples, or as much silence where no frame of them is speech."""
    levels = np.frombuffer(content, "<i2").astype(np.float32) / 32_768
    whole = levels[: len(levels) // SAMPLES_PER_FRAME * SAMPLES_PER_FRAME].reshape(-1, SAMPLES_PER_FRAME)
    rest = levels[whole.size :]
    loudest = max((float(np.square(part).mean()) for part in (*whole, rest) if part.size), default=0.0)
    return content if loudest > 10 ** (GATE_DBFS / 10) else bytes(len(content))


def _write_mono(reader: SoundReader, raw: IO[bytes]) -> float:
    """Write 16 kHz mono float32; the largest sample."""
    peak = 0.0
    for chunk in _mono(reader):
        raw.write(chunk.tobytes())
        peak = max(peak, float(np.abs(chunk).max(initial=0.0)))
    return peak


def _mono(reader: SoundReader) -> Iterator[Samples]:
    layout, resampler, mix = "", None, Downmix(1)
    for frame in reader:
        if resampler is None or frame.layout.name != layout:
            if resampler is not None:
                yield from _end(resampler, mix)
            layout, mix = frame.layout.name, Downmix(len(frame.layout.channels))
            resampler = av.AudioResampler(format="fltp", layout=frame.layout, rate=SPEECH_RATE)
        frame.pts = None  # samples are the clock, not what the container says
        yield from map(mix.feed, map(_channels, resampler.resample(frame)))
    if resampler is not None:
        yield from _end(resampler, mix)


def _end(resampler: av.AudioResampler, mix: Downmix) -> Iterator[Samples]:
    yield from map(mix.feed, map(_channels, resampler.resample(None)))
    yield mix.flush()


def _channels(frame: av.AudioFrame) -> Samples:
    """[channels, samples]; what is no number is silence."""
    return np.nan_to_num(frame.to_ndarray().astype(np.float32, copy=False), posinf=0.0, neginf=0.0)


def _gain(raw: Path, samples: int, peak: float) -> float:
    """Decibels to -23 LUFS, never more than ``MOST_GAIN_DB`` and never into clipping."""
    loudness = ffmpeg.loudness(raw, SPEECH_RATE)
    if loudness is None:  # shorter than R128's 0.4 s blocks, or far too quiet
        total = sum(float(np.square(chunk, dtype=np.float64).sum()) for chunk in _chunks(raw))
        loudness = 10 * math.log10(max(total / samples, 1e-12)) - 0.691
    return min(TARGET_LUFS - loudness, MOST_GAIN_DB, -20 * math.log10(peak))


def _write_wav(raw: Path, gain: float, target: Path, lead: int) -> None:
    with wave.open(str(target), "wb") as wav:
        wav.setparams(_FORMAT)
        for start in range(0, lead, _CHUNK):
            wav.writeframesraw(bytes(2 * min(_CHUNK, lead - start)))
        for chunk in _chunks(raw):
            levels = np.clip(np.rint(chunk * (gain * 32_767)), -32_768, 32_767)
            wav.writeframesraw(levels.astype("<i2").tobytes())


def _chunks(raw: Path) -> Iterator[Samples]:
    with raw.open("rb") as file:
        while content := file.read(4 * _CHUNK):
            yield np.frombuffer(content, np.float32)
