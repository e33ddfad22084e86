"""A user's sound: decode it, count it, and make the track that the finished video carries.

What the model hears is made in ``speech``; the muxing is ``stitch``'s and ``ffmpeg``'s.  Lengths come from
decoded samples: headers of VBR mp3 and raw AAC are wrong by up to 9 %.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
import av.error
import numpy as np

from pipeline import ffmpeg
from pipeline.errors import InvalidRequest
from pipeline.timeline import FPS, frames_of

COPIED = frozenset({"aac", "mp3"})
"""Codecs that go into the mp4 untouched: every browser plays these in mp4 (not so FLAC, Opus, ALAC)."""

MIX_RATE = 48_000
"""Samples per second of a mix."""

_LEAST_COPIED_RATE = 16_000  # mp4 has no code for MPEG-2.5 mp3, which is what is below
_SLACK_SECONDS = 0.002  # Matroska's clock ticks in milliseconds


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a sound in seconds; without an end to the sound's own."""

    start: float = 0.0
    end: float | None = None


WHOLE = Part()


@dataclass(frozen=True, slots=True)
class Track:
    """What decoding found out about the sound of a file."""

    path: Path
    index: int
    """The stream in the file."""
    codec: str
    rate: int
    channels: int
    samples: int
    """Of the part that was asked for."""
    even: bool
    """Starts with the file and runs without a gap or damage, so that copied packets keep its time."""
    first: int = 0
    """The sample of the source where the part starts."""
    cut: bool = False
    """Whether something of the source is left out."""

    @property
    def seconds(self) -> float:
        """Length of what was decoded."""
        return self.samples / self.rate

    def copyable(self, total_frames: int) -> bool:
        """Whether a video of ``total_frames`` can carry the stream as it is."""
        whole = not self.cut and frames_of(self.samples, self.rate) <= total_frames
        return whole and self.even and self.codec in COPIED and self.rate >= _LEAST_COPIED_RATE


class SoundReader:
    """Decodes the best audio stream of a file, or a part of it, as a context manager; iterate over it once.

    Everything before the part is decoded too: seeking is not exact in every format.  Damaged packets are
    skipped, as players do.  Raises ``InvalidRequest("audio", ...)``, and ``audio_start`` or ``audio_end``
    for a part that is not there.
    """

    def __init__(self, path: Path, part: Part = WHOLE) -> None:
        self.samples = self.first = 0
        self.said: float | None
        """Seconds, by the file's header."""
        self.cut = part.start > 0
        self._part = part
        self.rate = 0
        self.channels = 0
        self.even = True
        self._path = path
        if not path.is_file():
            raise InvalidRequest(
                "audio", f"{path} does not exist" if not path.exists() else f"{path} is no file"
            )
        if path.stat().st_size == 0:
            raise InvalidRequest("audio", f"{path} is empty")
        try:
            limits = {"protocol_whitelist": "file", "format_whitelist": ffmpeg.INPUT_FORMATS}
            self._container = av.open(str(path.resolve()), options=limits)
        except (av.error.FFmpegError, OSError) as error:
            raise InvalidRequest("audio", f"{path} is no sound file that can be decoded") from error
        stream = self._container.streams.best("audio")
        if stream is None or stream.type != "audio" or stream.codec_context is None:
            self._container.close()
            raise InvalidRequest("audio", f"{path} has no sound")
        self._stream = stream
        duration = self._container.duration
        self.said = None if duration is None else duration / av.time_base
        self.index = stream.index
        self.codec = stream.codec_context.codec.canonical_name  # mp3, where the decoder is mp3float

    def __iter__(self) -> Iterator[av.AudioFrame]:
        last: av.AudioFrame | None = None
        position, stop = 0, None
        for frame in self._decode():
            if not self.rate:
                self.rate, self.channels = frame.sample_rate, len(frame.layout.channels)
                start = (self._container.start_time or 0) / 1_000_000
                began = frame.time if frame.time is not None else start
                self.even &= abs(began - start) < _SLACK_SECONDS
                self.first = round(self._part.start * self.rate)
                stop = None if self._part.end is None else round(self._part.end * self.rate)
            elif frame.sample_rate != self.rate:
                raise InvalidRequest("audio", f"{self._path} changes its sample rate on the way")
            if frame.time is not None:
                self.even &= abs(frame.time - (began + position / self.rate)) < _SLACK_SECONDS
            last = frame
            before, position = position, position + frame.samples
            if position > self.first:
                yield _part_of(frame, self.first - before, frame.samples if stop is None else stop - before)
            if stop is not None and position > stop:
                position, self.cut = stop, True
                break
        else:
            if last is None:
                raise InvalidRequest("audio", f"{self._path} has no sound that can be decoded")
            # AAC fills its last packet up; mp4 and Matroska keep how much of it is sound.
            if last.duration and last.time_base is not None:
                lasting = round(last.duration * last.time_base * self.rate)
                if last.samples - lasting > last.time_base * self.rate:  # more than its clock rounds
                    position -= last.samples - lasting
        for field, sample in (("audio_start", self.first + 1), ("audio_end", stop or 0)):
            if sample > position + self.rate // FPS:
                length = f"{position / self.rate:.3f} s"
                raise InvalidRequest(field, f"{self._path} is over after {length}")
        self.samples = max(position - self.first, 0)

    def track(self) -> Track:
        """What is known after the iteration."""
        known = (self._path, self.index, self.codec, self.rate, self.channels, self.samples, self.even)
        return Track(*known, self.first, self.cut)

    def _decode(self) -> Iterator[av.AudioFrame]:
        try:
            for packet in self._container.demux(self._stream):
                try:
                    frames = packet.decode()
                except av.error.FFmpegError:
                    self.even = False
                    continue
                for frame in frames:
                    assert isinstance(frame, av.AudioFrame)
                    yield frame
        except av.error.FFmpegError as error:
            if not self.rate:
                raise InvalidRequest("audio", f"{self._path} can't be decoded: {error}") from error
            self.even = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.close()


def _part_of(frame: av.AudioFrame, start: int, stop: int) -> av.AudioFrame:
    """The samples ``[start, stop)`` of a frame, as far as it has them."""
    start, stop = max(start, 0), min(stop, frame.samples)
    if (start, stop) == (0, frame.samples):
        return frame
    width = 1 if frame.format.is_planar else len(frame.layout.channels)  # values that a sample has in a row
    values: Any = np.ascontiguousarray(frame.to_ndarray()[:, start * width : stop * width])
    part = av.AudioFrame.from_ndarray(values, format=frame.format.name, layout=frame.layout.name)
    part.sample_rate = frame.sample_rate
    return part


def measure(path: Path, part: Part = WHOLE) -> Track:
    """Decode the sound of a file to its end and count (1 hour: some seconds).  Raises ``InvalidRequest``."""
    with SoundReader(path, part) as reader:
        for _ in reader:
            pass
        return reader.track()


@functools.lru_cache(maxsize=10_000)
def seconds_said(path: Path) -> float | None:
    """How long a file's header says that its sound is, which is often wrong: for an estimate only.

    None where it says nothing.  Raises ``InvalidRequest``.
    """
    with SoundReader(path) as reader:
        return reader.said


def make_track(
    path: Path,
    total_frames: int,
    target: Path,
    part: Part = WHOLE,
    stop: threading.Event | None = None,
) -> tuple[Path, int]:
    """The stream ``(path, index)`` that a video of ``total_frames`` carries: the user's whole track.

    It is the user's own stream where mp4 players take it, else AAC in ``target``.  A ``part``, and a track
    that is longer than the video (``max_frames``), is encoded too: it starts and ends to the sample.
    Raises ``InvalidRequest``, ``MediaError``, ``StorageError``.
    """
    track = measure(path, part)
    if track.copyable(total_frames):
        return path, track.index
    _encode(track, total_frames, target, stop)
    return target, 0


def encode_track(path: Path, total_frames: int, target: Path, stop: threading.Event | None = None) -> None:
    """The user's whole track as AAC in ``target``, also where a video can carry it as it is.

    Raises ``InvalidRequest``, ``MediaError``, ``StorageError``.
    """
    _encode(measure(path), total_frames, target, stop)


def _encode(track: Track, total_frames: int, target: Path, stop: threading.Event | None) -> None:
    # A reader that ignores edit lists hears AAC's priming: 21 ms at 48 kHz, three times that at 16 kHz.
    rate = 44_100 if track.rate % 11_025 == 0 else 48_000
    channels = track.channels if track.channels in (1, 2, 6) else 2
    capped = frames_of(track.samples, track.rate) > total_frames
    # What was counted, no more: ffmpeg's own decoding leaves some padding of AAC in.
    samples = total_frames * (rate // FPS) if capped else round(Fraction(track.samples * rate, track.rate))
    ffmpeg.encode_sound(
        (track.path, track.index), target, rate, channels, first=track.first, samples=samples, stop=stop
    )


def mix_tracks(
    paths: Sequence[Path],
    in_turns: bool,
    total_frames: int,
    target: Path,
    stop: threading.Event | None = None,
) -> tuple[Path, int]:
    """The stream ``(path, index)`` of a video in which several people speak: their whole tracks, as AAC.

    They start together or, ``in_turns``, each when the one before has ended.  Nobody is made louder or
    softer; where voices add up to more than full scale, a limiter holds them.
    Raises ``InvalidRequest``, ``MediaError``, ``StorageError``.
    """
    tracks = [measure(path) for path in paths]
    rate = MIX_RATE
    starts = [0]
    for track in tracks[:-1]:
        starts.append(starts[-1] + round(track.samples * rate / track.rate) if in_turns else 0)
    placed = [
        ffmpeg.PlacedSound(
            track.path, track.index, track.channels, start, round(track.samples * rate / track.rate)
        )
        for track, start in zip(tracks, starts, strict=True)
    ]
    end = max(sound.start + sound.samples for sound in placed)
    ffmpeg.mix_sounds(placed, target, rate, min(end, total_frames * (rate // FPS)), stop)
    return target, 0
