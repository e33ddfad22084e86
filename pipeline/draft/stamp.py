"""The stamp of the draft engine: where in its motion a drawn frame stands, hidden in the frame's pixels.

A chain of windows is handed on as pictures only, so whatever the drawing needs to go on must be in them.
The stamp sits in the differences between the first pixels of the frame, two by two (row by row, R G B), one
bit in each, most significant first: 18 bytes of state, then their CRC-32, 176 bits, 118 pixels.  A bit is
the third of the difference, whose lower two are in the middle: so it outlasts a correction of the colours.
It changes a value by 4 at most (more near black and white).  Lossless files keep it; anything lossy destroys
it, and the checksum tells.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Frame = NDArray[np.uint8]

MAGIC = 0xD5
LAYOUT = struct.Struct(">BIhhhhhhB")
CHECK = struct.Struct(">I")
BITS = 8 * (LAYOUT.size + CHECK.size)
PIXELS = 2 * -(-BITS // 3)
MARGIN = 16
"""Levels that the stamp's pixels keep from black and white, so that the differences survive a shift."""

POSITION_STEPS = 256.0
VELOCITY_STEPS = 2048.0
ANGLE_STEPS = 4096.0
SPIN_STEPS = 16384.0
LEVELS = 63
"""The mouth has this many positions besides closed."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """State of one drawn frame.

    ``frame`` counts from the start of the chain; ``dx``, ``dy`` (pixels) and ``angle`` (degrees) move the
    head from the reference pose; ``vx``, ``vy``, ``spin`` are their change per frame; ``opening`` is the
    mouth's, 0..1.
    """

    frame: int = 0
    dx: float = 0.0
    dy: float = 0.0
    angle: float = 0.0
    vx: float = 0.0
    vy: float = 0.0
    spin: float = 0.0
    opening: float = 0.0

    def rounded(self) -> Stamp:
        """As it will be read back: rounded to the steps that the bits can hold."""
        return _unpack(_pack(self))


def write_stamp(frame: Frame, stamp: Stamp) -> None:
    """Hide a stamp in a frame, in place; frames of fewer than 118 pixels stay as they are."""
    if frame.size < 3 * PIXELS:
        return
    body = _pack(stamp)
    bits = np.unpackbits(np.frombuffer(body + CHECK.pack(zlib.crc32(body)), dtype=np.uint8))
    rows = frame[: _rows(frame)]
    flat = rows.reshape(-1).copy()
    pairs = _pairs(flat).clip(MARGIN, 255 - MARGIN)
    first, second = pairs[:, 0].ravel(), pairs[:, 1].ravel()
    middle = 2 + 4 * np.resize(bits, len(first)).astype(int)  # of the differences 0 to 3, or 4 to 7
    second[...] = first + 8 * np.rint((second - first - middle) / 8).astype(int) + middle
    flat[: 3 * PIXELS] = np.stack([first.reshape(-1, 3), second.reshape(-1, 3)], axis=1).ravel()
    rows[...] = flat.reshape(rows.shape)


def read_stamp(frame: Frame) -> Stamp | None:
    """The stamp of a drawn frame [H, W, 3], or None if it has none or it did not survive."""
    if frame.dtype != np.uint8 or frame.size < 3 * PIXELS:
        return None
    pairs = _pairs(frame[: _rows(frame)].reshape(-1))
    data = np.packbits(((pairs[:, 1] - pairs[:, 0]).ravel()[:BITS] >> 2) & 1).tobytes()
    body, check = data[: LAYOUT.size], data[LAYOUT.size :]
    if body[0] != MAGIC or CHECK.pack(zlib.crc32(body)) != check:
        return None
    return _unpack(body)


def _pairs(flat: Frame) -> NDArray[np.int_]:
    """The stamp's pixels, [pairs, 2, 3]."""
    return flat[: 3 * PIXELS].astype(int).reshape(-1, 2, 3)


def _rows(frame: Frame) -> int:
    return -(-PIXELS // int(frame.shape[1]))


def _pack(stamp: Stamp) -> bytes:
    return LAYOUT.pack(
        MAGIC,
        stamp.frame,
        _steps(stamp.dx, POSITION_STEPS),
        _steps(stamp.dy, POSITION_STEPS),
        _steps(stamp.angle, ANGLE_STEPS),
        _steps(stamp.vx, VELOCITY_STEPS),
        _steps(stamp.vy, VELOCITY_STEPS),
        _steps(stamp.spin, SPIN_STEPS),
        round(min(max(stamp.opening, 0.0), 1.0) * LEVELS),
    )


def _unpack(body: bytes) -> Stamp:
    frame: int
    _magic, frame, dx, dy, angle, vx, vy, spin, level = LAYOUT.unpack(body)
    return Stamp(
        frame,
        dx / POSITION_STEPS,
        dy / POSITION_STEPS,
        angle / ANGLE_STEPS,
        vx / VELOCITY_STEPS,
        vy / VELOCITY_STEPS,
        spin / SPIN_STEPS,
        level / LEVELS,
    )


def _steps(value: float, steps: float) -> int:
    return min(max(round(value * steps), -32768), 32767)
