"""When a seam goes from one rendering's pose to the other's, how fast, and where its texture changes.

Planned on small copies.  Three things move a frame of a transition: the motion in both renderings, the way
from one pose to the other, and the change of texture.  Every span of the overlap is tried, long and short
ones: within a span the way is gone while the renderings move least, and the span counts by its fastest frame.
So a moment in which the renderings are fast on their own stays outside where there is room beside it.
Making the frames is ``morph``'s business, what is done where flow can't be trusted ``seam``'s.
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
from pipeline.seam_metrics import GOOD, similarity

SIDE = 200
"""Pixels of the longer side of the small copies."""
GRID = 16
"""The plan looks at so many points across and down."""
STRETCH = 8
"""A way takes so many times the frames in which the head usually goes as far: it is not hurried."""
SHORTEST = 12
"""Frames of a way, where the overlap has them and nothing else decides."""
LEAST_SPEED = 0.1
"""Pixels of the small copies per frame that count as natural where nothing moves."""
LEAST_GAP = 0.5
"""Grey levels of difference after alignment that are noise."""
SHARP = 16
"""The higher, the more a way counts by its worst step alone."""
EVEN = 0.05
"""Weight of the wanted length, where nothing else decides."""
UNLIKE = 0.4
"""What it counts to change the texture where the renderings differ twice as much as they could, beside a
worst step that is 1 at the limits of a good seam."""
TEXTURE = 5
"""Frames in which the texture changes."""
PLACES = np.linspace(0, 1, 9)
"""Of the way: where speeds are computed; in between they are interpolated."""
STRIDES = np.array([0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 1.0])
"""Shares of the way that a step may take: where speeds are computed."""
MOST_SPANS = 1000
"""Spans that are tried; of long overlaps not every one."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a transition goes, frame by frame of the overlap."""

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
    count = len(pair) - warm_up
    lead = min(warm_up, 1)
    """The step into the first usable frame counts too."""
    shown = [tuple(small(frame, SIDE) for frame in pair.at(t)) for t in range(warm_up - lead, len(pair))]
    pictures = shown[lead:]
    lumas = [(luma(a), luma(b)) for a, b in shown]
    apart = [flow_between(a, b) for a, b in lumas[lead:]]
    moved = [warped(b, flow) for (_, b), flow in zip(pictures, apart, strict=True)]
    differences = [
        (_root_mean_square(cv2.absdiff(a, b)) + LEAST_GAP) * weight
        for (a, _), b, weight in zip(pictures, moved, weights[warm_up:], strict=True)
    ]
    steps = _Steps.between(shown, lumas, apart, lead)
    wanted = max(math.ceil(STRETCH * max(map(reach, apart)) / steps.usual), SHORTEST)
    pose, texture = _best(steps, differences, wanted)
    middle = min(range(count), key=lambda t: abs(texture[t] - 0.5))
    a, b = pictures[middle][0], moved[middle]
    ends = [0.0] * warm_up
    scale = max(pair.earlier.shape[1:3]) / max(lumas[0][0].shape)
    return Way(
        (*ends, *pose), (*ends, *texture), similarity(luma(a), luma(b)), scale * max(map(reach, apart))
    )


@dataclass(frozen=True, slots=True)
class _Steps:
    """What each step from frame to frame would be; step ``i`` leads to frame ``i``, the last one out."""

    speed: Floats
    """[step, stride, place], over what is natural."""
    change: Floats
    """Of luma, alike."""
    colour: Floats
    """[step, 2, channel]: how the means of either rendering change on their own, in levels."""
    usual: float
    """Natural speed in pixels of the small copies."""

    @classmethod
    def between(
        cls,
        shown: Sequence[tuple[Frame, ...]],
        lumas: Sequence[tuple[Luma, ...]],
        apart: Sequence[Flow],
        lead: int,
    ) -> _Steps:
        """``shown`` may have ``lead`` frames before those that ``apart`` is about."""
        flows = [[flow_between(x[side], y[side]) for x, y in pairwise(lumas)] for side in (0, 1)]
        usual = float(np.percentile([reach(flow) for side in flows for flow in side], 95)) if flows[0] else 0
        gaps = [_points(flow) for flow in apart]
        still = np.zeros_like(gaps[0])
        ahead, back = ([_points(flow) for flow in side] or [still] for side in flows)
        means = np.array([[cv2.mean(frame)[:3] for frame in both] for both in shown])
        colour = list(np.diff(means, axis=0)) or [np.zeros((2, 3))]
        if not lead:  # not known: taken to be like its neighbour
            ahead, back, colour = ([found[0], *found] for found in (ahead, back, colour))
        # Nor is the step out of the last frame, behind the overlap: it may be a fast one.
        order = sorted(range(len(ahead)), key=lambda i: float(_speed(ahead[i]) + _speed(back[i])))
        fast = order[9 * len(order) // 10]
        for found in (ahead, back, colour):
            found.append(found[fast])
        count = len(apart)
        slopes = [_points(_slope(a)) for a, _ in lumas[lead:]]
        natural_speed = max(float(np.percentile([_speed(v) for v in (*ahead, *back)], 95)), 0.05)
        own = [_changes(v, slopes[min(i, count - 1)]) for side in (ahead, back) for i, v in enumerate(side)]
        natural_change = max(float(np.percentile(own, 95)), 0.05)
        speed = np.empty((count + 1, len(STRIDES), len(PLACES)))
        change = np.empty_like(speed)
        for i in range(count + 1):
            gap = 0.5 * (gaps[max(i - 1, 0)] + gaps[min(i, count - 1)])
            motion = ahead[i] + PLACES[:, None, None] * (back[i] - ahead[i])
            flow = motion + STRIDES[:, None, None, None] * gap
            speed[i] = _speed(flow) / natural_speed
            change[i] = _changes(flow, slopes[min(i, count - 1)]) / natural_change
        return cls(speed, change, np.array(colour), max(usual, LEAST_SPEED))

    def cost(self, pose: Floats, texture: Floats, wanted: int) -> float:
        """Of a way, as that of its worst step, which is 1 at the limits of a good seam.

        ``pose`` and ``texture`` have the frame before the overlap and the one after it.
        """
        moving = np.flatnonzero((pose[1:] > 0) & (pose[:-1] < 1) | (texture[1:] > 0) & (texture[:-1] < 1))
        i = np.arange(moving[0], moving[-1] + 1)
        strides, places = np.diff(pose)[i], (pose[1:] + pose[:-1])[i] / 2
        share = ((texture[1:] + texture[:-1])[i] / 2)[:, None]
        colour = np.abs((1 - share) * self.colour[i, 0] + share * self.colour[i, 1]).max(1)
        limits = GOOD["speed"], GOOD["jump"], GOOD["colour_step"]
        found = _read(self.speed, i, strides, places), _read(self.change, i, strides, places), colour
        excess = np.stack([values / limit for values, limit in zip(found, limits, strict=True)])
        # The colours are the renderings' own, the way has no part in them: too much is too much.
        excess[2] = np.minimum(excess[2], 1.1)
        worst = float((excess**SHARP).sum() ** (1 / SHARP))
        long = 1 / max(float(wanted * (strides**2).sum()), 1e-6)
        return worst + EVEN * (long + 1 / long) / 2

    def pace(self, first: int, stop: int) -> Floats:
        """The pose at the frames ``[first, stop)``: fast where the renderings are slow.

        Such that the largest change of any step, into, between and out of these frames, is least.
        """
        i = np.arange(first, stop + 1)
        places = (np.arange(len(i)) + 0.5) / len(i)
        own = _read(self.change, i, 0 * places, places)
        per_way = np.maximum((_read(self.change, i, 0 * places + 0.1, places) - own) / 0.1, 0.1)
        least, most = 0.0, float((own + per_way).max())
        for _ in range(20):
            limit = (least + most) / 2
            if np.clip((limit - own) / per_way, 0, 1).sum() < 1:
                least = limit
            else:
                most = limit
        strides = np.clip((most - own) / per_way, 0, 1)
        # Half of it evenly: a pace that follows every frame's motion would be a jerky one.
        strides = 0.5 * strides / strides.sum() + 0.5 / len(i)
        smooth = np.convolve(np.pad(strides, 1, "edge"), [0.25, 0.5, 0.25], "valid")
        return np.asarray(np.cumsum(smooth / smooth.sum())[:-1])


def _best(steps: _Steps, differences: Sequence[float], wanted: int) -> tuple[list[float], list[float]]:
    """The pose and the share of the later texture at each frame."""
    count = len(differences)
    every = max(1, math.ceil(math.sqrt(count * count / 2 / MOST_SPANS)))
    starts, ends = range(0, count, every), [*range(count, 0, -every)]
    spans = [(first, stop) for first in starts for stop in ends if stop - first >= min(TEXTURE, count)]
    best, found = math.inf, (np.zeros(0), np.zeros(0))
    for first, stop in spans:
        way = steps.pace(first, stop)
        # Far from the middle of the way one rendering alone would have to go nearly all of it.
        far = [1 + 2 * max(0.0, abs(2 * place - 1) - 0.5) for place in way]
        change, dearest = _change([d * more for d, more in zip(differences[first:stop], far, strict=True)])
        pose, texture = (
            np.concatenate([[0.0] * (first + 1), v, [1.0] * (count - stop + 1)]) for v in (way, change)
        )
        cost = steps.cost(pose, texture, wanted) + UNLIKE * (dearest / min(differences) - 1)
        if cost < best:
            best, found = cost, (pose, texture)
    pose, texture = found
    return [float(share) for share in pose[1:-1]], [float(share) for share in texture[1:-1]]


def _change(costs: Sequence[float]) -> tuple[list[float], float]:
    """Shares of the later texture: 0, then up within ``TEXTURE`` frames around the cheapest, then 1.

    And what these frames cost, the mean.
    """
    length = min(TEXTURE, len(costs))
    totals = [sum(costs[i : i + length]) for i in range(len(costs) - length + 1)]
    first = totals.index(min(totals))
    shares = [min(max((t - first + 1) / (length + 1), 0.0), 1.0) for t in range(len(costs))]
    return shares, min(totals) / length


def _read(table: Floats, steps: npt.NDArray[np.integer[Any]], strides: Floats, places: Floats) -> Floats:
    """Values of ``table`` at the strides and places of some steps, interpolated."""
    s, p = (
        np.clip(np.searchsorted(axis, values, "right") - 1, 0, len(axis) - 2)
        for axis, values in ((STRIDES, strides), (PLACES, places))
    )
    x = (strides - STRIDES[s]) / (STRIDES[s + 1] - STRIDES[s])
    y = (places - PLACES[p]) / (PLACES[p + 1] - PLACES[p])
    left = table[steps, s, p] * (1 - y) + table[steps, s, p + 1] * y
    right = table[steps, s + 1, p] * (1 - y) + table[steps, s + 1, p + 1] * y
    return np.asarray(left * (1 - x) + right * x)


def _root_mean_square(values: npt.NDArray[Any]) -> float:
    """A mouth that differs counts, though it is a small part of the picture."""
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float32))))


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
