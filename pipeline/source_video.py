"""A source video: what it shows at any frame of the job, at 25 frames a second whatever its own rate.

The picture that conditions a window is the one shown at the window's first frame.  A source shorter than
the speech continues backwards, then forwards again (ping-pong), so that nothing jumps.  The times of its
frames are kept (8 bytes each), its pictures are not.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Self

import av
import av.error
import numpy as np
import numpy.typing as npt
from av.video.reformatter import Colorspace
from PIL import Image

from pipeline.errors import InvalidRequest
from pipeline.ffmpeg import INPUT_FORMATS
from pipeline.frames import Frame
from pipeline.portrait import DEFAULT_AREA, MOST_PIXELS, Size, choose_size, fit, to_png
from pipeline.timeline import FPS

_UNNAMED = 2  # of the colour matrices in ITU-T H.273
_HD_LINES = 720
_EXACT = 0x4 | 0x2000 | 0x4000 | 0x40000
"""libswscale's flags: bicubic, colour at full resolution in and out, rounded; without, up to 3 levels off."""
_AHEAD = 2 * FPS
"""Source frames that are decoded on the way rather than jumped over."""


class SourceVideo:
    """Random access to a video's pictures; cheapest when asked in order.  Not for several threads."""

    def __init__(
        self,
        path: Path,
        times: npt.NDArray[np.int64],
        end: int,
        clock: Fraction,
        ordinal: bool,
        shape: Fraction,
    ) -> None:
        self._path, self._times, self._clock, self._ordinal = path, times, clock, ordinal
        self._frames = max(1, round((end - int(times[0])) * clock * FPS))
        self._shape = shape
        self._last: tuple[int, Frame] | None = None
        self._reader: Iterator[tuple[int, av.VideoFrame]] | None = None
        self.size: Size = (0, 0)

    @classmethod
    def opened(cls, path: Path) -> Self:
        """Read the times of all frames (the file is read, not decoded) and the first picture.

        Raises ``InvalidRequest("video", ...)``.
        """
        if not path.is_file():
            raise InvalidRequest("video", f"{path} is no file" if path.exists() else f"{path} does not exist")
        if path.stat().st_size == 0:
            raise InvalidRequest("video", f"{path} is empty")
        with _errors(path), _container(path) as container:
            stream = _stream(path, container)
            times, end = [], 0
            # AVI has no display times, and libav's guesses are wrong with B-frames: count pictures there.
            ordinal = container.format.name == "avi"
            for packet in container.demux(stream):
                time = packet.dts if ordinal else packet.pts
                if time is not None and packet.size and not packet.is_discard:
                    times.append(time)
                    end = max(end, time + (0 if ordinal else packet.duration or 0))
            clock, shape = stream.time_base, _shape(stream)
        if not times or clock is None:
            raise InvalidRequest("video", f"{path} has no pictures with times")
        times.sort()
        if end == times[-1]:  # no duration known: the last picture stays as long as the one before
            end += times[-1] - times[-2] if len(times) > 1 else round(1 / FPS / clock)
        video = cls(path, np.array(times, np.int64), end, clock, ordinal, shape)
        height, width = video.frame_at(0).shape[:2]
        video.size = (width, height)
        return video

    @property
    def frames(self) -> int:
        """Its length in frames at 25 a second."""
        return self._frames

    def fitted_size(self, width: int | None, height: int | None, area: int = DEFAULT_AREA) -> Size:
        """The size of a video made from it; see ``portrait.choose_size``."""
        return choose_size(width, height, self.size, area)

    def frame_at(self, job_frame: int) -> Frame:
        """The picture shown at ``job_frame / 25`` seconds, upright, in its own size.

        Raises ``InvalidRequest("video", ...)`` where it can't be decoded.
        """
        index = self._index(job_frame)
        if self._last is None or self._last[0] != index:
            self._last = index, self._decoded(index)
        return self._last[1]

    def png_at(self, job_frame: int, width: int, height: int) -> bytes:
        """``frame_at``, fitted to ``width`` x ``height``, as PNG."""
        return to_png(fit(self.frame_at(job_frame), (width, height)))

    def _index(self, job_frame: int) -> int:
        """Which of the source's pictures is on screen at a frame of the job."""
        place = job_frame % max(1, 2 * self._frames - 2)
        if place >= self._frames:
            place = 2 * self._frames - 2 - place
        # Half a tick late: containers round times, and a picture must not come a frame late for that.
        tick = int(self._times[0]) + Fraction(place, FPS) / self._clock + Fraction(1, 2)
        return max(0, bisect_right(self._times, tick) - 1)

    def _decoded(self, index: int) -> Frame:
        last = -1 if self._last is None else self._last[0]
        with _errors(self._path):
            if self._reader is None or not last < index <= last + _AHEAD:
                self._reader = self._read_from(index)
            wanted = int(self._times[index])
            shown: av.VideoFrame | None = None
            for time, picture in self._reader:
                shown = picture
                if time >= wanted:
                    break
            if shown is None:
                raise InvalidRequest("video", f"{self._path} can't be decoded at {wanted * self._clock} s")
            return _upright(shown, self._shape)

    def _read_from(self, index: int) -> Iterator[tuple[int, av.VideoFrame]]:
        with _container(self._path) as container:
            stream = _stream(self._path, container)
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = 2
            if self._ordinal:
                yield from zip(map(int, self._times), container.decode(stream), strict=False)
                return
            if index:
                container.seek(int(self._times[index]), stream=stream, backward=True)
            for picture in container.decode(stream):
                if picture.pts is not None:
                    yield picture.pts, picture


def _container(path: Path) -> av.container.InputContainer:
    limits = {"protocol_whitelist": "file", "format_whitelist": INPUT_FORMATS}
    return av.open(str(path.resolve()), options=limits)


def _stream(path: Path, container: av.container.InputContainer) -> av.VideoStream:
    if not container.streams.video:
        raise InvalidRequest("video", f"{path} has no pictures")
    stream = container.streams.video[0]
    shape = _shape(stream)
    if stream.codec_context.width * stream.codec_context.height * max(shape, 1 / shape) > MOST_PIXELS:
        raise InvalidRequest("video", f"{path} has more than {MOST_PIXELS:,} pixels a frame")
    return stream


def _shape(stream: av.VideoStream) -> Fraction:
    """Width of a pixel over its height (DV, DVDs and some cameras have other pixels than square ones)."""
    return stream.sample_aspect_ratio or Fraction(1)


def _upright(picture: av.VideoFrame, shape: Fraction) -> Frame:
    """RGB with square pixels, turned as the container says."""
    frame = _rgb(picture)
    height, width = frame.shape[:2]
    if shape != 1:  # enlarged, so that nothing is lost before the picture is fitted
        size = (round(width * shape), height) if shape > 1 else (width, round(height / shape))
        frame = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))
    turned = np.rot90(frame, round(picture.rotation / 90) % 4)
    return np.ascontiguousarray(turned)


def _rgb(picture: av.VideoFrame) -> Frame:
    """By the matrix and range that the file names; where it names no matrix, by its size as players do."""
    guess = None
    if picture.colorspace == _UNNAMED:
        guess = Colorspace.ITU709 if picture.height >= _HD_LINES else Colorspace.ITU601
    rgb = picture.to_ndarray(format="rgb24", src_colorspace=guess, interpolation=_EXACT)
    return rgb.astype(np.uint8, copy=False)


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (av.error.FFmpegError, OSError) as error:
        raise InvalidRequest("video", f"{path} is no video that can be decoded") from error
