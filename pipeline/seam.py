"""One overlap, two renderings of it, one way through: colours matched, the best way chosen, measured.

Arrays in, frames out; files are ``stitch``'s business, the plan ``way``'s, its frames ``morph``'s, the
measures ``seam_metrics``'.  Both renderings follow the same speech, so frame ``t`` of one shows the same
moment as frame ``t`` of the other, only the pose and the colours differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from pipeline import seam_metrics
from pipeline.colours import Colours, Pair, Stack, small
from pipeline.frames import Frame
from pipeline.morph import TRUST, Morph, mixed
from pipeline.plan import WARM_UP as WARM_UP
from pipeline.timeline import FPS
from pipeline.way import plan_way

Method = Literal["morph", "crossfade", "cut"]
"""How seams are made: ``SeamReport.method`` says what was done, which may be less."""

CROSSFADE = 8
"""Frames of the fallback: a longer crossfade shows two faces for longer."""

LONG_CROSSFADE = 40
"""Frames of the source document's crossfade."""

ALIKE = 0.25
"""Of the usual move from frame to frame: renderings that differ by less are cut, not morphed."""

SPEED_SIDE = 400
"""Pixels of the longer side of the copies on which speed is measured."""

LEAST_SPEED = 0.1
"""Pixels of these copies per frame that count as motion where nothing moves."""

PAUSE_DB, SPEECH_DB = -45.0, -20.0
"""Levels of a frame of speech (of -23 LUFS) at which a mouth is closed, and free to be anything."""


@dataclass(frozen=True, slots=True)
class SeamReport:
    """How a seam was made and how it looks; the measures are defined in ``seam_metrics``."""

    frame: int
    """Frame of the job at which the transition starts."""
    frames: int
    """Length of the transition; 0 for a cut."""
    method: str
    """``morph``, ``crossfade`` or ``cut``."""
    jump: float
    """Largest move from frame to frame through the transition, in medians of the clip's moves."""
    natural: float
    """99th percentile of the clip's moves away from seams, in the same medians: what motion does."""
    median: float
    """The median itself, in grey levels."""
    speed: float
    """Largest optical flow through the transition, over the larger of what is natural and of what either
    rendering does on its own in these frames; 1 is no faster."""
    sharpness: float
    """Detail of the transition's frames over that of the renderings; 1 is as sharp."""
    ghosting: float
    """Least similarity of the transition's frames to an aligned rendering; 1 is no ghost."""
    agreement: float
    """Similarity of the two renderings where one turns into the other, after alignment."""
    colour_gap: float
    """Largest difference of a channel's mean between the renderings, of 255, before it was spread."""
    colour_step: float
    """Largest change of a channel's level from frame to frame in what is shown, of 255."""
    audio_db: float | None
    """Level of the speech (dBFS) where the picture changes over; below -45 is a pause.  None: not known."""
    verdict: str
    """``good``, ``visible`` or ``bad``: limits in ``seam_metrics.GOOD`` and ``VISIBLE``."""

    def in_clip(self, jump: float, median: float, natural: float) -> SeamReport:
        """The same seam beside the whole clip's moves; all three in grey levels."""
        unit = max(median, seam_metrics.LEAST_MOVE)
        ratio = jump / max(natural, unit)
        word = seam_metrics.verdict(ratio, self.speed, self.ghosting, self.sharpness, self.colour_step)
        relative = round(jump / unit, 2), round(natural / unit, 2)
        return replace(self, jump=relative[0], natural=relative[1], median=round(median, 3), verdict=word)


def join_overlap(
    earlier: Stack,
    later: Stack,
    *,
    method: Method = "morph",
    warm_up: int = WARM_UP,
    start: int = 0,
    levels: Sequence[float] | None = None,
) -> tuple[list[Frame], SeamReport]:
    """Turn the earlier rendering into the later one within their common frames.

    ``start`` is the overlap's first frame in the job, ``levels`` the speech's dBFS of each frame.  The
    first ``warm_up`` frames show the earlier rendering only (but for the document's crossfade, which takes
    40 frames where it can).  Equal renderings come back as they are.
    """
    if earlier.shape != later.shape or not len(earlier):
        raise ValueError(f"an overlap of {earlier.shape} and {later.shape}")
    count = len(earlier)
    warm_up = min(warm_up, count - 1)
    if np.array_equal(earlier[warm_up:], later[warm_up:]):
        colours = Colours.unchanged()
        pair = Pair.eased(earlier, later, colours)
        made = _cut(pair, warm_up)
    elif method == "crossfade":
        colours = Colours.between(earlier[warm_up:], later[warm_up:])
        pair = Pair.eased(earlier, later, Colours.unchanged())
        made = _crossfade(pair, min(LONG_CROSSFADE, count), warm_up)
    else:
        colours = Colours.between(earlier[warm_up:], later[warm_up:])
        pair = Pair.eased(earlier, later, colours)
        weights = _weights(levels, count)
        differences = [seam_metrics.difference(*pair.at(t)) for t in range(warm_up, count)]
        usual = seam_metrics.unit(_moves(pair, warm_up))
        best = warm_up + int(np.argmin([d * w for d, w in zip(differences, weights[warm_up:], strict=True)]))
        if method == "cut" or min(differences) <= ALIKE * usual:
            if method != "cut":
                best = warm_up + int(np.argmin(differences))
            made = _cut(pair, best)
        else:
            made = _morph(pair, warm_up, weights)
            if made.agreement < TRUST:
                # Not the same scene: nothing to align, and colours of different things are not matched.
                agreement, pair = made.agreement, Pair.eased(earlier, later, Colours.unchanged())
                length = min(CROSSFADE, count - warm_up)
                made = replace(_crossfade(pair, length, warm_up, best), agreement=agreement)
    return made.frames, _report(pair, made, warm_up, start, levels, colours.gap)


@dataclass(frozen=True, slots=True)
class _Join:
    """The overlap's frames; those in ``[first, stop)`` are neither rendering's own."""

    frames: list[Frame]
    method: str
    first: int
    stop: int
    texture: list[float]
    """Share of the later rendering's pixels, frame by frame."""
    agreement: float


def _cut(pair: Pair, at: int) -> _Join:
    frames = [pair.at(t)[t >= at] for t in range(len(pair))]
    return _Join(frames, "cut", at, at, [float(t >= at) for t in range(len(pair))], 1.0)


def _crossfade(pair: Pair, length: int, warm_up: int, around: int | None = None) -> _Join:
    """``around`` a frame, else at the end of the overlap."""
    first = len(pair) - length
    if around is not None:
        first = min(max(warm_up, around - length // 2), first)
    shares = [min(max((t - first + 1) / (length + 1), 0.0), 1.0) for t in range(len(pair))]
    frames = []
    for t, share in enumerate(shares):
        a, b = pair.at(t)
        frames.append(mixed(a, b, share) if 0 < share < 1 else (a, b)[int(share)])
    return _Join(frames, "crossfade", first, first + length, shares, 1.0)


def _morph(pair: Pair, warm_up: int, weights: Sequence[float]) -> _Join:
    way = plan_way(pair, warm_up, weights)
    frames: list[Frame] = []
    if way.agreement >= TRUST:
        morph = Morph(pair, way)
        frames = [morph.frame(t) for t in range(len(pair))]
    return _Join(frames, "morph", *way.span, list(way.texture), way.agreement)


def _weights(levels: Sequence[float] | None, count: int) -> list[float]:
    """1 in a pause, 2 in speech: two closed mouths are alike, and nobody looks for a change there."""
    if levels is None:
        return [1.0] * count
    return [1 + min(max((level - PAUSE_DB) / (SPEECH_DB - PAUSE_DB), 0.0), 1.0) for level in levels]


def _moves(pair: Pair, warm_up: int) -> list[float]:
    """The moves inside each rendering, at most 25 of either."""
    return [
        *seam_metrics.moves(pair.earlier[-FPS - 1 :]),
        *seam_metrics.moves(pair.later[warm_up : warm_up + FPS + 1]),
    ]


def _speed(pair: Pair, made: _Join, warm_up: int) -> float:
    """``SeamReport.speed``, on small copies."""
    # From the frame before the transition to the one after it.
    first, stop = max(made.first - 1, 0), min(made.stop + 1, len(pair))
    alone = []
    for rendering, begin in ((pair.earlier, 0), (pair.later, warm_up)):
        found = seam_metrics.speeds(small(frame, SPEED_SIDE) for frame in rendering[begin:])
        alone.append(seam_metrics.natural(found))
        alone += found[max(first - begin, 0) : max(stop - 1 - begin, 0)]
    shown = seam_metrics.speeds(small(frame, SPEED_SIDE) for frame in made.frames[first:stop])
    return max(shown, default=0.0) / max(*alone, LEAST_SPEED)


def _report(
    pair: Pair, made: _Join, warm_up: int, start: int, levels: Sequence[float] | None, gap: float
) -> SeamReport:
    touched = range(made.first, made.stop)
    blended = [t for t in touched if 0 < made.texture[t] < 1]
    checked = sorted({*blended[:: max(len(blended) // 4, 1)], *touched[:: max(len(touched) // 3, 1)]})
    sources = [(t, pair.at(t)) for t in checked]
    looks = [seam_metrics.fidelity(made.frames[t], both) for t, both in sources] or [(1.0, 1.0)]
    shown = seam_metrics.moves(made.frames[max(made.first - 1, 0) : made.stop + 1])
    usual = _moves(pair, warm_up)
    change = next((t for t, share in enumerate(made.texture) if share >= 0.5), len(pair) - 1)
    report = SeamReport(
        frame=start + made.first,
        frames=len(touched),
        method=made.method,
        jump=0.0,
        natural=0.0,
        median=0.0,
        speed=round(_speed(pair, made, warm_up), 2),
        sharpness=round(float(np.mean([sharp for _, sharp in looks])), 3),
        ghosting=round(min(similar for similar, _ in looks), 4),
        agreement=round(made.agreement, 3),
        colour_gap=round(gap, 2),
        colour_step=round(seam_metrics.colour_step(made.frames), 2),
        audio_db=None if levels is None else round(float(levels[change]), 1),
        verdict="",
    )
    return report.in_clip(
        max(shown, default=0.0), float(np.median(usual or [0.0])), seam_metrics.natural(usual)
    )
