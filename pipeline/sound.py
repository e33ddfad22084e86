"""A user's sound: decode it, count it, and make the track that the finished video carries.

What the model hears is made in ``speech``; the muxing is ``stitch``'s and ``ffmpeg``'s.  Lengths come from
decoded samples: headers of VBR mp3 and raw AAC are wrong by up to 9 %.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import av.error

from pipeline import ffmpeg
from pipeline.errors import InvalidRequest
from pipeline.timeline import FPS, frames_of

COPIED = frozenset({"aac", "mp3"})
"""Codecs that go into the mp4 untouched: every browser plays these in mp4 (not so FLAC, Opus, ALAC)."""

_LEAST_COPIED_RATE = 16_000  # mp4 has no code for MPEG-2.5 mp3, which is what is below
_SLACK_SECONDS = 0.002  # Matroska's clock ticks in milliseconds


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
    even: bool
    """Starts with the file and runs without a gap or damage, so that copied packets keep its time."""

    @property
    def seconds(self) -> float:
        """Length of what was decoded."""
        return self.samples / self.rate

    def copyable(self, total_frames: int) -> bool:
        """Whether a video of ``total_frames`` can carry the stream as it is."""
        whole = frames_of(self.samples, self.rate) <= total_frames
        return whole and self.even and self.codec in COPIED and self.rate >= _LEAST_COPIED_RATE


class SoundReader:
    """Decodes the best audio stream of a file, as a context manager; iterate over it once.

    Damaged packets are skipped, as players do.  Raises ``InvalidRequest("audio", ...)``.
    """

    def __init__(self, path: Path) -> None:
        self.samples = 0
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
        self.index = stream.index
        self.codec = stream.codec_context.codec.canonical_name  # mp3, where the decoder is mp3float

    def __iter__(self) -> Iterator[av.AudioFrame]:
        last: av.AudioFrame | None = None
        for frame in self._decode():
            if not self.rate:
                self.rate, self.channels = frame.sample_rate, len(frame.layout.channels)
                start = (self._container.start_time or 0) / 1_000_000
                self._first = frame.time if frame.time is not None else start
                self.even &= abs(self._first - start) < _SLACK_SECONDS
            elif frame.sample_rate != self.rate:
                raise InvalidRequest("audio", f"{self._path} changes its sample rate on the way")
            if frame.time is not None:
                expected = self._first + self.samples / self.rate
                self.even &= abs(frame.time - expected) < _SLACK_SECONDS
            self.samples += frame.samples
            last = frame
            yield frame
        if last is None:
            raise InvalidRequest("audio", f"{self._path} has no sound that can be decoded")
        # AAC fills its last packet up; mp4 and Matroska keep how much of it is sound.
        if last.duration and last.time_base is not None:
            lasting = round(last.duration * last.time_base * self.rate)
            if last.samples - lasting > _SLACK_SECONDS * self.rate:
                self.samples -= last.samples - lasting

    def track(self) -> Track:
        """What is known after the iteration."""
        return Track(self._path, self.index, self.codec, self.rate, self.channels, self.samples, self.even)

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
            if not self.samples:
                raise InvalidRequest("audio", f"{self._path} can't be decoded: {error}") from error
            self.even = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.close()


def measure(path: Path) -> Track:
    """Decode the sound of a file to its end and count (1 hour: some seconds).  Raises ``InvalidRequest``."""
    with SoundReader(path) as reader:
        for _ in reader:
            pass
        return reader.track()


def make_track(path: Path, total_frames: int, target: Path) -> tuple[Path, int]:
    """The stream ``(path, index)`` that a video of ``total_frames`` carries: the user's whole track.

    It is the user's own stream where mp4 players take it, else AAC in ``target``.  A track that is longer
    than the video (``max_frames``) is encoded too and ends with the video, to the sample.
    Raises ``InvalidRequest``, ``MediaError``, ``StorageError``.
    """
    track = measure(path)
    if track.copyable(total_frames):
        return path, track.index
    # A reader that ignores edit lists hears AAC's priming: 21 ms at 48 kHz, three times that at 16 kHz.
    rate = 44_100 if track.rate % 11_025 == 0 else 48_000
    channels = track.channels if track.channels in (1, 2, 6) else 2
    capped = frames_of(track.samples, track.rate) > total_frames
    samples = total_frames * (rate // FPS) if capped else None
    ffmpeg.encode_sound((path, track.index), target, rate, channels, samples)
    return target, 0
