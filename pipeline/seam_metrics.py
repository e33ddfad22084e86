"""How a seam looks, in numbers: the measures of every result's seam report and of ``bench.seams``.

Pictures in, numbers out; how a seam is made is ``seam``'s business.  Definitions (docs/seams.md):

    move        mean absolute difference of luma between neighbouring frames, half size, of 255
    speed       97th percentile of the optical flow between neighbouring frames, pixels; a seam's is over the
                larger of what is natural and of what a rendering does on its own in the same frames
    detail      variance of the Laplacian of luma
    ghosting    SSIM to the nearer rendering after aligning it by optical flow: a face that only moved
                scores 1, a double image does not
    colour step largest change of a channel's level between neighbouring frames, of 255: the mean of the
                middle half of all pixels, which motion does not change
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Protocol

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.frames import Frame
from pipeline.optical_flow import Luma, flow_between, luma, reach, warped
from pipeline.timeline import FPS

LEAST_MOVE = 0.1
"""Grey levels that count as motion where nothing moves, so that nothing is divided by zero."""

GOOD = {"jump": 1.3, "speed": 1.1, "ghosting": 0.98, "sharpness": 0.85, "colour_step": 0.5}
"""Limits of a seam that is not found: jump in natural 99th percentiles, the others as defined above."""
VISIBLE = {"jump": 2.0, "speed": 1.6, "ghosting": 0.9, "sharpness": 0.5, "colour_step": 2.0}
"""Limits of one that a careful viewer finds; what is beyond is bad.  A 40-frame crossfade of two poses has
ghosting of 0.84 to 0.92 and a sharpness of 0.5, a hard cut a jump of 2.5 to 5."""


def half(picture: Luma) -> Luma:
    """Half size, averaged: what noise and encoding do is no motion."""
    if min(picture.shape) < 4:
        return picture
    return np.asarray(cv2.resize(picture, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA), np.uint8)


def difference(a: Frame, b: Frame) -> float:
    """Mean absolute difference of luma at half size, of 255."""
    return luma_difference(half(luma(a)), half(luma(b)))


def luma_difference(a: Luma, b: Luma) -> float:
    """Mean absolute difference of two pictures, of 255."""
    return float(cv2.mean(cv2.absdiff(a, b))[0])


def moves(frames: Iterable[Frame]) -> list[float]:
    """The move from each frame to the next."""
    return [luma_difference(a, b) for a, b in pairwise(half(luma(frame)) for frame in frames)]


class ClipMoves:
    """The moves of a whole video, frame by frame as it is decoded; what it holds is a number for each."""

    def __init__(self) -> None:
        self.moves: list[float] = []
        self._last: Luma | None = None

    def add(self, coded: Luma) -> None:
        """The next frame's luma as H.264 has it, 16 to 235 for black to white."""
        picture = half(coded)
        if self._last is not None:
            self.moves.append(luma_difference(self._last, picture) * 255 / 219)
        self._last = picture

    def jump(self, first: int, stop: int) -> float:
        """Largest move into, between and out of the frames ``[first, stop)``."""
        return max(self.moves[max(first - 1, 0) : stop], default=0.0)

    def away_from(self, spans: Iterable[tuple[int, int]]) -> list[float]:
        """The moves that are not into, between or out of the frames of any ``[first, stop)``."""
        inside = {i for first, stop in spans for i in range(first - 1, stop)}
        return [move for i, move in enumerate(self.moves) if i not in inside]


def speeds(frames: Iterable[Frame]) -> list[float]:
    """The speed from each frame to the next, in pixels of the frames."""
    halves = (half(luma(frame)) for frame in frames)
    return [2 * reach(flow_between(a, b)) for a, b in pairwise(halves)]


def unit(values: Sequence[float], least: float = LEAST_MOVE) -> float:
    """The median, or ``least`` where nothing moves."""
    return max(float(np.median(values)) if len(values) else 0.0, least)


def natural(values: Sequence[float]) -> float:
    """99th percentile: what motion does on its own."""
    return float(np.percentile(values, 99)) if len(values) else 0.0


def relative(values: Sequence[float], around: int = FPS) -> list[float]:
    """Each value over the median of the ``around`` values on either side of it."""
    return [
        value / unit([*values[max(i - around, 0) : i], *values[i + 1 : i + 1 + around]])
        for i, value in enumerate(values)
    ]


def detail(frame: Frame) -> float:
    """Variance of the Laplacian of luma: a measure of sharpness."""
    return float(cv2.Laplacian(luma(frame), cv2.CV_32F).var())


def similarity(a: Luma, b: Luma) -> float:
    """SSIM of two luma pictures (Wang et al. 2004) with 7 x 7 box windows."""
    x, y = a.astype(np.float32), b.astype(np.float32)
    mean_x, mean_y, xx, yy, xy = (cv2.blur(i, (7, 7)) for i in (x, y, x * x, y * y, x * y))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    above = (2 * mean_x * mean_y + c1) * (2 * (xy - mean_x * mean_y) + c2)
    below = (mean_x**2 + mean_y**2 + c1) * (xx - mean_x**2 + yy - mean_y**2 + c2)
    return float(np.mean(above / below))


def fidelity(frame: Frame, sources: Sequence[Frame]) -> tuple[float, float]:
    """Ghosting and sharpness: similarity to, and detail over that of, the nearest of ``sources``.

    Each is aligned with ``frame`` first; 1 is no ghost at all, and as sharp.
    """
    picture = luma(frame)
    scores = []
    for source in sources:
        other = luma(source)
        aligned = luma(warped(source, flow_between(picture, other)))
        scores.append(max(similarity(picture, other), similarity(picture, aligned)))
    best = max(scores)
    return best, detail(frame) / max(detail(sources[scores.index(best)]), 1e-6)


def colour_step(frames: Iterable[Frame]) -> float:
    """Largest change of a channel between neighbours, of 255: the mean of the middle half of all pixels.

    So a head that moves before a wall is no change of colour, and a wall that gets lighter is one.
    """
    return max((_colour_change(*pair) for pair in pairwise(map(_patches, frames))), default=0.0)


def _patches(frame: Frame) -> npt.NDArray[np.float32]:
    """Averages of at most 64 patches across; [patches, 3]."""
    scale = min(64 / max(frame.shape[:2]), 1.0)
    patches = cv2.resize(frame.astype(np.float32), None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return np.asarray(patches, np.float32).reshape(-1, 3)


def _colour_change(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    changes = np.sort(b - a, axis=0)
    middle = changes[len(changes) // 4 : max(len(changes) * 3 // 4, len(changes) // 4 + 1)]
    return float(np.abs(middle.mean(0)).max())


class Judged(Protocol):
    """What a verdict is about; ``seam.SeamReport`` is one."""

    @property
    def jump(self) -> float: ...
    @property
    def natural(self) -> float: ...
    @property
    def speed(self) -> float: ...
    @property
    def ghosting(self) -> float: ...
    @property
    def sharpness(self) -> float: ...
    @property
    def colour_step(self) -> float: ...


def excess(seam: Judged) -> float:
    """The measure of a verdict that is nearest to its limit, or farthest beyond: 1 or less is ``good``."""
    return max(
        seam.jump / max(seam.natural, 1.0) / GOOD["jump"],
        seam.speed / GOOD["speed"],
        (1 - seam.ghosting) / (1 - GOOD["ghosting"]),
        (1 - seam.sharpness) / (1 - GOOD["sharpness"]),
        seam.colour_step / GOOD["colour_step"],
    )


def verdict(jump: float, speed: float, ghosting: float, sharpness: float, colour_step: float) -> str:
    """``good``, ``visible`` or ``bad``; ``jump`` in natural 99th percentiles."""
    for word, limits in (("good", GOOD), ("visible", VISIBLE)):
        if (
            jump <= limits["jump"]
            and speed <= limits["speed"]
            and ghosting >= limits["ghosting"]
            and sharpness >= limits["sharpness"]
            and colour_step <= limits["colour_step"]
        ):
            return word
    return "bad"
