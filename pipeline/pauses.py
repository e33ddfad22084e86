"""Where segments overlap, so that seams fall into pauses of the speech: arithmetic on frames, nothing else.

A chain of windows has a fixed length, but the plan is free in how the frames that segments have to spare are
shared out among their overlaps; that moves the overlaps in time.  No window is added or taken away.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

CHANGE = 5
"""Frames within which a seam's texture changes: a pause this long hides all of it."""

REACH = 60
"""Frames that a segment may be moved away from where an even share of the spare frames puts it."""

Ranges = Sequence[tuple[int, int]]
"""Frames ``[first, stop)`` each."""


class Pauses:
    """Pauses of a speech, to ask in constant time how long a pause a stretch of frames has."""

    def __init__(self, pauses: Ranges, frames: int) -> None:
        runs = [0] * (frames + 1)
        for first, stop in pauses:
            for t in range(max(first, 0), min(stop, frames)):
                runs[t + 1] = runs[t] + 1
        self._frames = frames
        # Of each length: where the latest pause of so many frames begins that ends by a frame.
        self._latest: list[list[int]] = []
        for length in range(1, CHANGE + 1):
            latest, seen = [-1], -1
            for stop in range(1, frames + 1):
                seen = stop - length if runs[stop] >= length else seen
                latest.append(seen)
            self._latest.append(latest)

    def within(self, first: int, stop: int) -> int:
        """Frames of the longest pause inside ``[first, stop)``, at most ``CHANGE``."""
        stop = min(stop, self._frames)
        for length in range(CHANGE, 0, -1):
            if self._latest[length - 1][stop] >= first:
                return length
        return 0


def place_overlaps(
    lengths: Sequence[int],
    overlaps: Sequence[int],
    total_frames: int,
    least: int,
    most: int,
    warm_up: int,
    pauses: Ranges,
) -> list[int]:
    """Overlaps for segments of ``lengths`` frames: the most that have a pause, then the most even ones.

    ``overlaps`` are what an even share gives; each result is between ``least`` and ``most`` frames, three
    segments never share a frame, and all ``total_frames`` are covered.  An overlap's first ``warm_up``
    frames can't show the later segment, so the pause must lie behind them.  The best by dynamic programming
    over the frames given to the overlaps so far; where short segments leave no choice, ``overlaps``.
    """
    if not pauses:
        return list(overlaps)
    quiet = Pauses(pauses, total_frames)
    ends = list(accumulate(lengths))
    spare = ends[-1] - total_frames
    even = list(accumulate(overlaps))
    caps = []
    for i, (left, right) in enumerate(pairwise(lengths)):
        inside = ([left] if i else []) + ([right] if i + 2 < len(lengths) else [])
        caps.append(min([most, left, right, *(length // 2 for length in inside)]))
    if any(overlap > cap for overlap, cap in zip(overlaps, caps, strict=True)):
        return list(overlaps)
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for i, cap in enumerate(caps):
        found: dict[int, tuple[int, tuple[int, ...]]] = {}
        for used, (cost, chosen) in best.items():
            for overlap in range(least, cap + 1):
                given = used + overlap
                if given > spare or abs(given - even[i]) > REACH:
                    continue
                stop = ends[i] - used
                run = quiet.within(stop - overlap + warm_up, stop)
                price = cost + (overlap - overlaps[i]) ** 2
                price += 1_000_000 * (CHANGE - run) + 1_000_000_000 * (run < CHANGE)
                if given not in found or price < found[given][0]:
                    found[given] = (price, (*chosen, overlap))
        best = found
    return list(min(best.values())[1]) if best else list(overlaps)
