"""From one rendering to another along their optical flow: how fast, when the texture changes, each frame.

Which frames these are, and what is done where flow can't be trusted, is ``seam``'s business.

Three things move a frame of a morph: the motion in both renderings, the way from one pose to the other, and
the change of texture.  The way is paced so that the fastest frame is as slow as it can be: it goes where
both renderings move little (dynamic programming over small copies), and it may take the whole overlap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.colours import Floats, Pair, small
from pipeline.frames import Frame
from pipeline.optical_flow import Flow, Luma, flow_between, luma, reach, warped
from pipeline.seam_metrics import similarity

SIDE = 200
"""Pixels of the longer side of the small copies on which the way is planned."""
GRID = 16
"""The plan looks at so many points across and down."""
LEVELS = 60
"""Steps of the way from pose to pose."""
STRETCH = 8
"""A morph takes so many times the frames in which the head usually goes as far: it is not hurried."""
SHORTEST = 12
"""Frames of a morph, where the overlap has them."""
LEAST_SPEED = 0.1
"""Pixels of the small copies per frame that count as natural where nothing moves."""
LEAST_GAP = 0.5
"""Grey levels of difference after alignment that are noise."""
SHARP = 6
"""Power of the costs: the higher, the more only the fastest frame counts."""
EVEN = 0.02
"""Weight of an even pace where nothing else decides."""
SOFT = 2
"""Frames on either side over which a way is smoothed."""
UNLIKE = 4
"""Cost of changing the texture where the renderings differ twice as much as they could, in steps that are as
fast as the renderings usually are at most."""
TEXTURE = 5
"""Frames in which the texture changes."""
TRUST = 0.7
"""Structural similarity of the renderings, once moved onto each other, from which a morph shows one face:
measured 0.90 and more for other poses, mouths and colours of one person, 0.42 and less for other scenes."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a morph goes, frame by frame of the overlap."""

    pose: tuple[float, ...]
    """0: the earlier rendering's pose; 1: the later one's."""
    texture: tuple[float, ...]
    """0: the earlier rendering's pixels; 1: the later one's."""
    agreement: float
    """Similarity of the renderings where the texture changes, after alignment (small copies)."""
    apart: float
    """How far the poses are apart at most, in pixels of the frames (97th percentile of the flow)."""

    @property
    def span(self) -> tuple[int, int]:
        """The frames ``[first, stop)`` that are neither rendering's own."""
        both = zip(self.pose, self.texture, strict=True)
        touched = [t for t, way in enumerate(both) if way not in ((0, 0), (1, 1))]
        if not touched:
            change = self.texture.index(1)
            return change, change
        return touched[0], touched[-1] + 1


def plan_way(pair: Pair, warm_up: int, weights: Sequence[float]) -> Way:
    """The smoothest way through the frames from ``warm_up`` on.

    ``weights``, one for each frame of the overlap: how bad it is to change the texture there.
    """
    frames = range(warm_up, len(pair))
    pictures = [tuple(small(frame, SIDE) for frame in pair.at(t)) for t in frames]
    lumas = [(luma(a), luma(b)) for a, b in pictures]
    apart = [flow_between(a, b) for a, b in lumas]
    steps = list(pairwise(lumas))
    ahead = [flow_between(x[0], y[0]) for x, y in steps]
    back = [flow_between(x[1], y[1]) for x, y in steps]
    moved = [warped(b, flow) for (_, b), flow in zip(pictures, apart, strict=True)]
    costs = [
        (_root_mean_square(cv2.absdiff(a, b)) + LEAST_GAP) * weight
        for (a, _), b, weight in zip(pictures, moved, weights[warm_up:], strict=True)
    ]
    speed = max(_usual(ahead, back), LEAST_SPEED)
    wanted = max(math.ceil(STRETCH * max(map(reach, apart)) / speed), SHORTEST)
    pose = _pace(ahead, back, apart, [luma(a) for a, _ in pictures], wanted, costs)
    first = next((t for t, share in enumerate(pose) if share > 0), len(frames) - 1)
    last = next((t for t, share in enumerate(pose) if share == 1), len(frames))
    # Far from the middle of the way one rendering alone would have to go nearly all of it.
    far = [1 + 2 * max(0.0, abs(2 * place - 1) - 0.5) for place in pose[first:last]]
    change = _change([cost * more for cost, more in zip(costs[first:last], far, strict=True)])
    texture = [*[0.0] * first, *change, *[1.0] * (len(frames) - last)]
    middle = min(range(len(frames)), key=lambda t: abs(texture[t] - 0.5))
    a, b = pictures[middle][0], moved[middle]
    ends = [0.0] * warm_up
    scale = max(pair.earlier.shape[1:3]) / max(lumas[0][0].shape)
    return Way(
        (*ends, *pose), (*ends, *texture), similarity(luma(a), luma(b)), scale * max(map(reach, apart))
    )


def _root_mean_square(values: npt.NDArray[Any]) -> float:
    """A mouth that differs counts, though it is a small part of the picture."""
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float32))))


def _change(costs: Sequence[float]) -> list[float]:
    """Shares of the later texture: 0, then up within ``TEXTURE`` frames around the cheapest, then 1."""
    length = min(TEXTURE, len(costs))
    totals = [sum(costs[i : i + length]) for i in range(len(costs) - length + 1)]
    first = totals.index(min(totals))
    return [min(max((t - first + 1) / (length + 1), 0.0), 1.0) for t in range(len(costs))]


def _usual(ahead: list[Flow], back: list[Flow]) -> float:
    """95th percentile of how fast the renderings move, in pixels of the small copies."""
    return float(np.percentile([reach(flow) for flow in (*ahead, *back)], 95)) if ahead else 0.0


def _pace(
    ahead: list[Flow],
    back: list[Flow],
    apart: list[Flow],
    pictures: list[Luma],
    wanted: int,
    differences: Sequence[float],
) -> list[float]:
    """The share of the way at each frame: the path of least cost from 0 before the first to 1 after the last.

    ``ahead`` and ``back`` hold the steps between the frames.  That into the first is taken to be like its
    neighbour; that out of the last, behind the overlap, may be a fast one.  A step's cost grows with its
    speed and its change of luma, each relative to what the renderings do.  Staying at 0 or at 1 costs
    nothing, so the way leaves out frames in which the renderings themselves are fast; a way that is much
    shorter or longer than ``wanted`` costs.
    Half way, the texture changes: the ``differences`` of the renderings there count too.
    """
    count = len(apart)
    points = [_points(flow) for flow in apart]
    edge = np.zeros_like(points[0])
    a, b = ([_points(flow) for flow in flows] or [edge] for flows in (ahead, back))
    fast = sorted(range(len(a)), key=lambda i: float(_speed(a[i]) + _speed(b[i])))[9 * len(a) // 10]
    a, b = ([flows[0], *flows, flows[fast]][: count + 1] for flows in (a, b))
    slopes = [_points(_slope(picture)) for picture in pictures]
    natural_speed = max(float(np.percentile([_speed(v) for v in (*a, *b)], 95)), 0.05)
    natural_change = max(float(np.percentile([_changes(v, slopes[0]) for v in (*a, *b)], 95)), 0.05)
    shares = np.arange(LEVELS + 1) / LEVELS
    widest = min(LEVELS, max(4, 6 * LEVELS // (count + 1)))
    costs = np.full((count + 1, widest + 1, LEVELS + 1), np.inf)
    """Of step i by so many levels to a level."""
    for i in range(count + 1):
        gap = 0.5 * (points[max(i - 1, 0)] + points[min(i, count - 1)])
        slope = slopes[min(i, count - 1)]
        for step in range(widest + 1):
            mean = shares[: LEVELS + 1 - step] + step / (2 * LEVELS)
            flow = (1 - mean)[:, None, None] * a[i] + mean[:, None, None] * b[i] + step / LEVELS * gap
            cost = (_speed(flow) / natural_speed) ** SHARP + (_changes(flow, slope) / natural_change) ** SHARP
            costs[i, step, step:] = cost + EVEN * (1 + (step * wanted / LEVELS) ** 2)
    resting = costs[:, 0, [0, -1]].copy()
    costs[:, 0, [0, -1]] = 0.0
    for i in range(count + 1):  # smoothing lets a way begin two frames earlier and end two frames later
        leaving = np.arange(1, widest + 1)
        costs[i, leaving, leaving] += resting[max(i - SOFT, 0) : i, 0].sum()
        costs[i, 1:, LEVELS] += resting[i + 1 : i + 1 + SOFT, 1].sum()
    levels = _least_path(
        costs, [UNLIKE * (_around(differences, t) / min(differences) - 1) for t in range(count)]
    )
    pose = np.asarray(levels, np.float64) / LEVELS
    padded = np.concatenate([[0.0, 0.0], pose, [1.0, 1.0]])
    smooth = np.convolve(padded, [1 / 9, 2 / 9, 3 / 9, 2 / 9, 1 / 9], "valid")
    return [float(share) for share in smooth[1:-1]]


def _around(values: Sequence[float], t: int) -> float:
    """Mean of those in which the texture would change."""
    return float(np.mean(values[max(t - TEXTURE // 2, 0) : t + TEXTURE // 2 + 1]))


def _least_path(costs: Floats, halfway: Sequence[float]) -> list[int]:
    """The cheapest levels from 0 in front of the first frame to the last level behind the last frame.

    ``costs[i, step, level]``: of coming to ``level`` by ``step`` at frame ``i``; ``halfway``: of being in the
    middle half of the levels at one frame, which some frame has to be.
    """
    count, widest = len(halfway), costs.shape[1] - 1
    to = np.full((count + 1, LEVELS + 1), np.inf)
    came = np.zeros((count + 1, LEVELS + 1), int)
    before = np.where(np.arange(LEVELS + 1), np.inf, 0.0)
    for i in range(count + 1):
        ways = costs[i].copy()
        for step in range(widest + 1):
            ways[step, step:] += before[: LEVELS + 1 - step]
        came[i], to[i] = ways.argmin(0), ways.min(0)
        before = to[i]
    on = np.where(np.arange(LEVELS + 1) < LEVELS, np.inf, 0.0)
    rest = np.full((count, LEVELS + 1), np.inf)
    went = np.zeros((count, LEVELS + 1), int)
    for i in reversed(range(count)):
        ways = np.full((widest + 1, LEVELS + 1), np.inf)
        for step in range(widest + 1):
            ways[step, : LEVELS + 1 - step] = costs[i + 1, step, step:] + on[step:]
        went[i], rest[i] = ways.argmin(0), ways.min(0)
        on = rest[i]
    middle = slice(LEVELS // 4, 3 * LEVELS // 4 + 1)
    totals = (to[:count] + rest)[:, middle] + np.asarray(halfway)[:, None]
    frame, level = divmod(int(totals.argmin()), totals.shape[1])
    levels = [level + LEVELS // 4]
    for i in range(frame, -1, -1):
        levels.insert(0, levels[0] - int(came[i, levels[0]]))
    for i in range(frame, count):
        levels.append(levels[-1] + int(went[i, levels[-1]]))
    return levels


def _points(flow: Flow) -> Floats:
    """A flow at the points of the plan's grid, [points, 2], averaged around each."""
    return np.asarray(cv2.resize(flow, (GRID, GRID), interpolation=cv2.INTER_AREA), np.float32).reshape(-1, 2)


def _slope(picture: Luma) -> Flow:
    """How much luma changes per pixel, right and down, without its sign."""
    return np.abs(
        np.dstack([cv2.Sobel(picture, cv2.CV_32F, *axis, scale=1 / 8) for axis in ((1, 0), (0, 1))])
    )


def _speed(flow: Floats) -> Floats:
    lengths = np.hypot(flow[..., 0], flow[..., 1])
    place = int(0.97 * lengths.shape[-1])
    return np.asarray(np.partition(lengths, place, axis=-1)[..., place])


def _changes(flow: Floats, slope: Floats) -> Floats:
    return np.asarray((np.abs(flow) * slope).sum(-1).mean(-1))


class Morph:
    """Makes the frames of a way, in order."""

    def __init__(self, pair: Pair, way: Way) -> None:
        self._pair, self._way = pair, way
        self._forth: Flow | None = None
        self._back: Flow | None = None

    def frame(self, t: int) -> Frame:
        """Frame ``t`` of the overlap."""
        a, b = self._pair.at(t)
        place, texture = self._way.pose[t], self._way.texture[t]
        if (place, texture) in ((0, 0), (1, 1)):
            return b if texture else a
        # The flow of the frame before is where the search begins: what has no texture does not flicker.
        self._forth = flow_between(luma(a), luma(b), self._forth)
        self._back = flow_between(luma(b), luma(a), self._back)
        # Flow from the picture in between to either side, from the flows between them (Super SloMo, eq. 4).
        to_a = -(1 - place) * place * self._forth + place * place * self._back
        to_b = (1 - place) ** 2 * self._forth - place * (1 - place) * self._back
        if not texture:
            return warped(a, to_a)
        if texture == 1:
            return warped(b, to_b)
        return mixed(warped(a, to_a), warped(b, to_b), texture)


def mixed(a: Frame, b: Frame, share: float) -> Frame:
    """A crossfade's frame: ``share`` of ``b``, the rest of ``a``."""
    return np.asarray(cv2.addWeighted(a, 1 - share, b, share, 0), np.uint8)
