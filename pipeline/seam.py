"""One overlap, two renderings of it, one way through: colour match, optical-flow morph, measured.

Arrays in, frames out; files are ``stitch``'s business.  Both renderings follow the same speech, so frame
``t`` of one shows the same moment as frame ``t`` of the other, only the pose and the colours differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.frames import Frame
from pipeline.timeline import FPS

WARM_UP = 12
"""Frames at a segment's start that still leave the reference picture; the earlier segment shows them."""

SHORTEST_MORPH = 12
CROSSFADE = 8
"""Frames of the fallback: a longer crossfade shows two faces for longer."""

TRUST = 0.7
"""Structural similarity of the renderings, once moved onto each other, from which a morph shows one face:
measured 0.90 and more for other poses, mouths and colours of one person, 0.42 and less for other scenes."""

LEAST_SPEED = 0.25
"""Pixels per frame at half size that count as natural speed where nothing moves."""

Stack = npt.NDArray[np.uint8]
"""uint8 [frames, height, width, 3], RGB."""
Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class SeamReport:
    """How a seam was made and how it looks; all of it measured on frames that are in the video."""

    frame: int
    """Frame of the job at which the transition starts."""
    frames: int
    """Length of the transition; 0 for a cut between renderings that agree."""
    method: str
    """``morph``, ``crossfade``, or ``cut`` where both renderings are the same."""
    jump: float
    """Largest frame-to-frame difference through the transition (mean absolute difference of luma), in
    medians of the same difference inside the two renderings."""
    natural: float
    """99th percentile of that difference inside the renderings, in the same medians: what motion does."""
    sharpness: float
    """Laplacian variance of the transition's frames over that of the renderings at the same frames; 1 is
    as sharp."""
    agreement: float
    """Structural similarity of the two renderings where one turns into the other, after alignment."""
    colour_step: float
    """Largest difference of a channel's mean between the renderings, of 255, before it was spread over the
    overlap."""


def join_overlap(
    earlier: Stack, later: Stack, *, warm_up: int = WARM_UP, start: int = 0
) -> tuple[list[Frame], SeamReport]:
    """Turn the earlier rendering into the later one within their common frames.

    ``start`` is the overlap's first frame in the job.  The first ``warm_up`` frames show the earlier
    rendering only.  Equal renderings come back as they are.
    """
    if earlier.shape != later.shape or not len(earlier):
        raise ValueError(f"an overlap of {earlier.shape} and {later.shape}")
    count = len(earlier)
    warm_up = min(warm_up, count - 1)
    moves = _natural_moves(earlier, later[warm_up:])
    if np.array_equal(earlier[warm_up:], later[warm_up:]):
        frames = [*earlier[:warm_up], *later[warm_up:]]
        jump = _jump(frames, warm_up, 0, moves)
        return frames, SeamReport(start + warm_up, 0, "cut", jump, _natural(moves), 1.0, 1.0, 0.0)

    pair = _Pair(earlier, later, _Colours.between(earlier[warm_up:], later[warm_up:]))
    best = min(range(warm_up, count), key=lambda t: _difference(*pair.at(t)))
    length = _morph_length(pair, warm_up)
    first = min(max(warm_up, best - length // 2), count - length)
    method, (blended, agreement) = "morph", _morph(pair, first, length)
    if agreement < TRUST:
        # Not the same scene: there is nothing to align, and colours of different things are not matched.
        pair = _Pair(earlier, later, _Colours.unchanged())
        method, length = "crossfade", min(CROSSFADE, count - warm_up)
        first = min(max(warm_up, best - length // 2), count - length)
        blended = [_mixed(*pair.at(first + i), (i + 1) / (length + 1)) for i in range(length)]
    before = [pair.at(t)[0] for t in range(first)]
    after = [pair.at(t)[1] for t in range(first + length, count)]
    frames = [*before, *blended, *after]
    sources = [0.5 * sum(map(_detail, pair.at(first + i))) for i in range(length)]
    sharpness = np.mean([_detail(f) / max(s, 1e-6) for f, s in zip(blended, sources, strict=True)])
    return frames, SeamReport(
        start + first,
        length,
        method,
        _jump(frames, first, length, moves),
        _natural(moves),
        round(float(sharpness), 3),
        round(agreement, 3),
        round(_Colours.between(earlier[warm_up:], later[warm_up:]).step, 2),
    )


@dataclass(frozen=True, slots=True)
class _Colours:
    """Per channel, ``later = gain * earlier + offset``: the means and spreads of both renderings."""

    gain: Floats
    offset: Floats
    step: float

    @classmethod
    def between(cls, earlier: Stack, later: Stack) -> _Colours:
        a, b = (stack[:, ::4, ::4].reshape(-1, 3).astype(np.float32) for stack in (earlier, later))
        gain = np.clip((b.std(0) + 1) / (a.std(0) + 1), 0.8, 1.25)
        means = a.mean(0), b.mean(0)
        return cls(gain, means[1] - gain * means[0], float(np.abs(means[1] - means[0]).max()))

    @classmethod
    def unchanged(cls) -> _Colours:
        return cls(np.ones(3, np.float32), np.zeros(3, np.float32), 0.0)


@dataclass(frozen=True, slots=True)
class _Pair:
    """Both renderings in common colours: at frame 0 nearly the earlier one's, at the last the later one's.

    So no step is left anywhere, whichever rendering is shown.
    """

    earlier: Stack
    later: Stack
    colours: _Colours

    def __len__(self) -> int:
        return len(self.earlier)

    def at(self, t: int) -> tuple[Frame, Frame]:
        """Frame ``t`` of the earlier and of the later rendering."""
        share = (t + 1) / (len(self) + 1)
        gain, offset = self.colours.gain, self.colours.offset
        ahead = _mapped(self.earlier[t], 1 + share * (gain - 1), share * offset)
        back = _mapped(self.later[t], 1 + (1 - share) * (1 / gain - 1), -(1 - share) * offset / gain)
        return ahead, back


def _mapped(frame: Frame, gain: Floats, offset: Floats) -> Frame:
    """Dithered: rounding alone would let all pixels of a colour take the same level at the same frame."""
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


def _morph_length(pair: _Pair, warm_up: int) -> int:
    """``clip(5 * displacement / natural speed, 12, usable)``: long enough that the head is not hurried.

    Both in pixels, 95th percentiles of optical flow at half size, at a few frames of the overlap.
    """
    usable = len(pair) - warm_up
    if usable <= SHORTEST_MORPH:
        return usable
    dis = _flow_engine()
    reach, speed = [], []
    for t in np.linspace(warm_up, len(pair) - 2, 5).astype(int):
        (a, b), (_, following) = pair.at(t), pair.at(t + 1)
        reach.append(_reach(dis.calc(_half(a), _half(b), None)))
        speed.append(_reach(dis.calc(_half(b), _half(following), None)))
    wanted = math.ceil(5 * max(reach) / max(float(np.median(speed)), LEAST_SPEED))
    return min(max(wanted, SHORTEST_MORPH), usable)


def _morph(pair: _Pair, first: int, length: int) -> tuple[list[Frame], float]:
    """Move both renderings along their optical flow, and let the texture change in the middle third.

    The second value is the agreement.
    """
    dis = _flow_engine()
    frames: list[Frame] = []
    agreements: list[float] = []
    for i in range(length):
        a, b = pair.at(first + i)
        place = (i + 1) / (length + 1)
        moved = place * place * (3 - 2 * place)
        texture = min(max(3 * place - 1, 0.0), 1.0)
        forth, back = dis.calc(_luma(a), _luma(b), None), dis.calc(_luma(b), _luma(a), None)
        # Flow from the picture in between to either side, from the flows between them (Super SloMo, eq. 4).
        to_a = -(1 - moved) * moved * forth + moved * moved * back
        to_b = (1 - moved) ** 2 * forth - moved * (1 - moved) * back
        if texture <= 0:
            frames.append(_warped(a, to_a))
        elif texture >= 1:
            frames.append(_warped(b, to_b))
        else:
            from_a, from_b = _warped(a, to_a), _warped(b, to_b)
            agreements.append(_similarity(_luma(from_a), _luma(from_b)))
            frames.append(_mixed(from_a, from_b, texture))
    return frames, float(np.median(agreements)) if agreements else 1.0


def _flow_engine() -> Any:  # cv2's stubs refuse the None that stands for "no flow to start from"
    return cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)


def _warped(frame: Frame, flow: npt.NDArray[Any]) -> Frame:
    """``frame`` sampled at each pixel's place plus ``flow``.

    Lanczos: a bilinear warp loses as much detail as a crossfade.
    """
    height, width = frame.shape[:2]
    across = flow[..., 0] + np.arange(width, dtype=np.float32)
    down = flow[..., 1] + np.arange(height, dtype=np.float32)[:, None]
    return _frame(cv2.remap(frame, across, down, cv2.INTER_LANCZOS4, borderMode=cv2.BORDER_REPLICATE))


def _mixed(a: Frame, b: Frame, share: float) -> Frame:
    return _frame(cv2.addWeighted(a, 1 - share, b, share, 0))


def _reach(flow: npt.NDArray[Any]) -> float:
    """95th percentile of a flow's length."""
    return float(np.percentile(np.hypot(flow[..., 0], flow[..., 1]), 95))


def _luma(frame: Frame) -> Frame:
    return _frame(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY))


def _half(frame: Frame) -> Frame:
    return _frame(cv2.resize(_luma(frame), None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA))


def _frame(array: Any) -> Frame:
    picture: Frame = np.asarray(array, np.uint8)
    return picture


def _difference(a: Frame, b: Frame) -> float:
    """Mean absolute difference of luma at half size, of 255."""
    return float(np.mean(cv2.absdiff(_half(a), _half(b))))


def _detail(frame: Frame) -> float:
    """Variance of the Laplacian of luma: a measure of sharpness."""
    return float(cv2.Laplacian(_luma(frame), cv2.CV_32F).var())


def _similarity(a: Frame, b: Frame) -> float:
    """SSIM of two luma pictures (Wang et al. 2004) with 7 x 7 box windows."""
    x, y = a.astype(np.float32), b.astype(np.float32)
    mean_x, mean_y, xx, yy, xy = (cv2.blur(i, (7, 7)) for i in (x, y, x * x, y * y, x * y))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    above = (2 * mean_x * mean_y + c1) * (2 * (xy - mean_x * mean_y) + c2)
    below = (mean_x**2 + mean_y**2 + c1) * (xx - mean_x**2 + yy - mean_y**2 + c2)
    return float(np.mean(above / below))


def _natural_moves(earlier: Stack, later: Stack) -> list[float]:
    """Frame-to-frame differences inside each rendering, at most 25 frames of either."""
    stacks = earlier[-FPS:], later[:FPS]
    return [_difference(*pair) for stack in stacks for pair in pairwise(stack)]


def _unit(moves: list[float]) -> float:
    """The median difference, or a tenth of a grey level where nothing moves."""
    return max(float(np.median(moves)) if moves else 0.0, 0.1)


def _natural(moves: list[float]) -> float:
    return round(float(np.percentile(moves, 99)) / _unit(moves), 2) if moves else 1.0


def _jump(frames: list[Frame], first: int, length: int, moves: list[float]) -> float:
    span = frames[max(first - 1, 0) : first + length + 1]
    return round(max((_difference(*pair) for pair in pairwise(span)), default=0.0) / _unit(moves), 2)
