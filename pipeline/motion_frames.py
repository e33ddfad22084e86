"""Motion frames as one lossless file that every engine reads as a batch: an animated PNG.

ComfyUI's LoadImage (0.33) reads through libav first, which sees only the first page of a TIFF, and older
versions (0.11) through Pillow alone, which reads no video.  Both read an animated PNG, if its writer keeps
equal neighbours: Pillow's merges them, so the chunks are written here.  Writing only; engines do the reading.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.timeline import FPS

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_RGB8 = (8, 2, 0, 0, 0)  # 8 bits, truecolour, deflate, no filter, not interlaced


def pack(frames: Sequence[NDArray[np.uint8]]) -> bytes:
    """An animated PNG of ``frames``, uint8 [H, W, 3] RGB each, all of one size, every frame whole.

    Raises:
        ValueError: no frame, or a frame of another shape or type.
    """
    if not frames:
        raise ValueError("no motion frames")
    shape = frames[0].shape
    for frame in frames:
        if frame.dtype != np.uint8 or frame.shape != shape or len(shape) != 3 or shape[2] != 3:
            raise ValueError(f"a motion frame is {frame.dtype} {frame.shape}; uint8 [H, W, 3] expected")
    return _SIGNATURE + b"".join(_chunks(frames, height=shape[0], width=shape[1]))


def _chunks(frames: Sequence[NDArray[np.uint8]], height: int, width: int) -> Iterator[bytes]:
    """Chunks in the order of the specification (PNG third edition, section 4.9: acTL, fcTL, IDAT, fdAT)."""
    yield _chunk(b"IHDR", struct.pack(">II5B", width, height, *_RGB8))
    yield _chunk(b"acTL", struct.pack(">II", len(frames), 1))
    sequence = 0
    for index, frame in enumerate(frames):
        # Dispose 0 and blend 0: nothing of the frame before shows through.
        control = struct.pack(">5I2H2B", sequence, width, height, 0, 0, 1, FPS, 0, 0)
        yield _chunk(b"fcTL", control)
        sequence += 1
        if index == 0:
            yield _chunk(b"IDAT", _deflated(frame))
        else:
            yield _chunk(b"fdAT", struct.pack(">I", sequence) + _deflated(frame))
            sequence += 1
    yield _chunk(b"IEND", b"")


def _deflated(frame: NDArray[np.uint8]) -> bytes:
    """Rows behind their filter type: 'sub' (difference to the left pixel), cheap and good for pictures."""
    height, width, _ = frame.shape
    rows = np.empty((height, 1 + 3 * width), dtype=np.uint8)
    rows[:, 0] = 1
    rows[:, 1:4] = frame[:, 0]
    rows[:, 4:] = (frame[:, 1:] - frame[:, :-1]).reshape(height, -1)
    return zlib.compress(rows.tobytes(), 1)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
