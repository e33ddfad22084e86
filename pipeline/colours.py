"""Two renderings of the same frames in common colours: matched, and eased from one to the other.

What is left of a segment's drift (``colour_drift``), and what its renderer made otherwise, is spread evenly
over the overlap, because that is all that is encoded again: a body is copied bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.frames import Frame
from pipeline.optical_flow import flow_between, luma, warped
from pipeline.seam_metrics import similarity

Stack: TypeAlias = npt.NDArray[np.uint8]
"""uint8 [frames, height, width, 3], RGB."""
Floats: TypeAlias = npt.NDArray[np.floating[Any]]

SAMPLES = 6
"""Frames of the overlap that colours are compared in."""
SIDE = 240
"""Pixels of the longer side of the small copies that are compared."""
GAIN = (0.8, 1.25)
"""Limits of a channel's gain: more is another light, not drift."""


def small(frame: Frame, side: int = SIDE) -> Frame:
    """A copy whose longer side has ``side`` pixels at most, averaged."""
    scale = side / max(frame.shape[:2])
    if scale >= 1:
        return frame
    return np.asarray(cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA), np.uint8)


@dataclass(frozen=True, slots=True)
class Colours:
    """Per channel, ``later = gain * earlier + offset``."""

    gain: Floats
    offset: Floats
    gap: float
    """Largest difference of a channel's mean that this makes, of 255."""
    agreement: float = 1.0
    """Mean similarity of the compared frames once aligned; low where they don't show the same thing."""

    @classmethod
    def between(cls, earlier: Stack, later: Stack) -> Colours:
        """From means and spreads of the pixels that show the same thing, after alignment by optical flow.

        Whole pictures would take a head that is elsewhere for another colour.
        """
        pairs = list(_aligned(earlier, later))
        agreement = float(np.mean([similarity(luma(a), luma(b)) for a, b in pairs]))
        a, b = (
            np.concatenate([frame.reshape(-1, 3) for frame in part]).astype(np.float32)
            for part in zip(*pairs, strict=True)
        )
        alike = np.ones(len(a), bool)
        gain, offset = np.ones(3, np.float32), np.zeros(3, np.float32)
        for _ in range(3):
            spread, means = (a[alike].std(0), b[alike].std(0)), (a[alike].mean(0), b[alike].mean(0))
            gain = np.clip((spread[1] + 0.1) / (spread[0] + 0.1), *GAIN)
            offset = means[1] - gain * means[0]
            off = np.abs(gain * a + offset - b).max(1)
            alike = off <= max(3 * float(np.median(off)), 2.0)
        return cls(gain, offset, float(np.abs((gain - 1) * a.mean(0) + offset).max()), agreement)

    @classmethod
    def unchanged(cls) -> Colours:
        """No correction."""
        return cls(np.ones(3, np.float32), np.zeros(3, np.float32), 0.0)


def _aligned(earlier: Stack, later: Stack) -> Iterator[tuple[Frame, Frame]]:
    """Small copies of some frames; the later rendering's moved onto the earlier one's."""
    for t in np.unique(np.linspace(0, len(earlier) - 1, SAMPLES).astype(int)):
        a, b = small(earlier[t]), small(later[t])
        yield a, warped(b, flow_between(luma(a), luma(b)))


@dataclass(frozen=True, slots=True)
class Pair:
    """Both renderings in common colours: at frame 0 nearly the earlier one's, at the last the later one's.

    So no step is left anywhere, whichever rendering is shown.
    """

    earlier: Stack
    later: Stack
    colours: Colours
    shares: tuple[float, ...]
    """How far the way from the earlier one's colours to the later one's is gone at each frame."""

    @classmethod
    def eased(cls, earlier: Stack, later: Stack, colours: Colours) -> Pair:
        """The way is gone evenly, but for frames whose own means change: their steps are short, or none."""
        return cls(earlier, later, colours, _shares(earlier, later, colours))

    def __len__(self) -> int:
        return len(self.earlier)

    def at(self, t: int) -> tuple[Frame, Frame]:
        """Frame ``t`` of the earlier and of the later rendering."""
        share = self.shares[t]
        gain, offset = self.colours.gain, self.colours.offset
        if not self.colours.gap and (gain == 1).all():
            return self.earlier[t], self.later[t]
        ahead = mapped(self.earlier[t], 1 + share * (gain - 1), share * offset)
        back = mapped(self.later[t], 1 + (1 - share) * (1 / gain - 1), -(1 - share) * offset / gain)
        return ahead, back


def _shares(earlier: Stack, later: Stack, colours: Colours) -> tuple[float, ...]:
    """Such that the largest step of any channel's mean, in either rendering, is as small as it can be."""
    if not colours.gap:
        return tuple((t + 1) / (len(earlier) + 1) for t in range(len(earlier)))
    levels = [np.array([cv2.mean(frame)[:3] for frame in frames]) for frames in (earlier, later)]
    way = (colours.gain - 1) * levels[0].mean(0) + colours.offset
    # What a channel's mean does on its own, along the way.  Not known of the steps into the first and out of
    # the last frame: as much as usually at most.
    own = np.zeros((2, len(earlier) + 1, 3))
    if len(earlier) > 1:
        own[:, 1:-1] = [np.diff(means, axis=0) * np.sign(way) for means in levels]
        own[:, [0, -1]] = np.percentile(np.abs(own[:, 1:-1]), 90, axis=1)[:, None]
    least, most = 0.0, float(np.abs(own).max() + np.abs(way).max())
    for _ in range(40):
        limit = (least + most) / 2
        if _steps(limit, own, way).sum() < 1:
            least = limit
        else:
            most = limit
    steps = _steps(most, own, way)
    return tuple(float(share) for share in np.cumsum(steps / steps.sum())[:-1])


def _steps(limit: float, own: Floats, way: Floats) -> Floats:
    """Shares of the way that each step may take if no mean is to change by more than ``limit``."""
    free = (limit - own) / np.maximum(np.abs(way), 1e-6)
    return np.asarray(np.clip(free, 0, 1).min(axis=(0, 2)))


def mapped(frame: Frame, gain: Floats, offset: Floats) -> Frame:
    """``gain * frame + offset`` per channel.

    Dithered: rounding alone would let all pixels of a colour take the same level at the same frame.
    """
    height, width = frame.shape[:2]
    dither = np.tile(_DITHER, (-(-height // 8), -(-width // 8)))[:height, :width, None]
    levels = frame * np.asarray(gain, np.float32) + np.asarray(offset, np.float32) + dither
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)


def _bayer(order: int) -> Floats:
    """Ordered dither thresholds, ``2**order`` square, inside (-0.5, 0.5): whole levels stay as they are."""
    matrix = np.zeros((1, 1))
    for _ in range(order):
        matrix = np.block([[4 * matrix, 4 * matrix + 2], [4 * matrix + 3, 4 * matrix + 1]])
    return np.asarray((matrix + 0.5) / matrix.size - 0.5, np.float32)


_DITHER = _bayer(3)
