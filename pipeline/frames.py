"""Decoded frames of our own files: read them, count them.

Counts and times come from decoding, never from a header.  Users' files are read elsewhere
(``source_video``, ``speech``); encoding is in ``ffmpeg``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import av
import av.error
import numpy as np
import numpy.typing as npt

from pipeline.errors import MediaError
from pipeline.timeline import FPS

Frame: TypeAlias = npt.NDArray[np.uint8]
"""One picture: uint8 [height, width, 3], RGB."""

_THREADS = 2


def read_frames(path: Path) -> Iterator[Frame]:
    """The frames of a video in order.  Raises ``MediaError``."""
    for decoded in _decode(path):
        yield decoded.to_ndarray(format="rgb24").astype(np.uint8, copy=False)


def read_part(path: Path, first: int, stop: int, fps: int = FPS) -> Iterator[Frame]:
    """The frames ``[first, stop)`` of one of our videos; decodes from the key frame before.

    Fewer where the video ends earlier.  Raises ``MediaError``.
    """
    with media_errors(path), av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.time_base is not None
        container.seek(round(first / fps / stream.time_base), stream=stream)
        for decoded in container.decode(stream):
            number = round(decoded.time * fps) if decoded.time is not None else first
            if number >= stop:
                return
            if number >= first:
                yield decoded.to_ndarray(format="rgb24").astype(np.uint8, copy=False)


def read_stack(path: Path, frames: int) -> npt.NDArray[np.uint8]:
    """All frames of a short video as uint8 [frames, height, width, 3].

    Raises ``MediaError``, also where there are more or fewer than ``frames``.
    """
    stack: npt.NDArray[np.uint8] | None = None
    count = 0
    for frame in read_frames(path):
        if stack is None:
            stack = np.empty((frames, *frame.shape), np.uint8)
        if count < frames:
            stack[count] = frame
        count += 1
    if stack is None or count != frames:
        raise MediaError(f"{path.name} has {count} frames instead of {frames}")
    return stack


def check_video(
    path: Path, frames: int, fps: int = FPS, watch: Callable[[npt.NDArray[np.uint8]], None] | None = None
) -> None:
    """Decode the whole video: exactly ``frames`` of them, frame ``i`` at ``i / fps`` s, none damaged.

    ``watch`` sees each frame's luma, uint8 [H, W] as it is coded, before the next one is decoded.
    Raises ``MediaError``.
    """
    count = 0
    for decoded in _decode(path):
        if decoded.is_corrupt:
            raise MediaError(f"{path.name} is damaged at frame {count}")
        if decoded.pts is None or decoded.time_base is None or decoded.pts * decoded.time_base * fps != count:
            raise MediaError(
                f"{path.name} shows frame {count} at {decoded.time} s instead of {count / fps} s"
            )
        if watch is not None:
            plane = decoded.planes[0]
            rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)  # type: ignore[call-overload]
            watch(rows[: decoded.height, : decoded.width])
        count += 1
    if count != frames:
        raise MediaError(f"{path.name} has {count} frames instead of {frames}")


def stream_header(path: Path) -> bytes:
    """H.264's parameter sets; files that have equal ones join by copy.  Raises ``MediaError``."""
    with media_errors(path), av.open(str(path)) as container:
        return bytes(container.streams.video[0].codec_context.extradata or b"")


def _decode(path: Path) -> Iterator[av.VideoFrame]:
    with media_errors(path), av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = _THREADS
        yield from container.decode(stream)


@contextlib.contextmanager
def media_errors(path: Path) -> Iterator[None]:
    """Turn what PyAV says of a file of ours into ``MediaError``."""
    try:
        yield
    except (av.error.FFmpegError, IndexError) as error:
        raise MediaError(f"{path.name} can't be decoded", str(error)) from error
