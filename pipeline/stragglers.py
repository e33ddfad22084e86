"""Which segments a slow GPU holds up: those are worth a second run, on a GPU that has nothing else to do.

A pure rule: no clock, no lanes.  Windows are checkpoints and seeds belong to windows, so a second run goes on
from the last stored window and gives the same frames; whichever run is first counts.  It costs a GPU that was
idle.  Each segment is run twice at most once (``dispatch``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

SLOWER = 1.5
"""A run must be slower than the others by this factor, and by one whole window, before it is run twice."""


@dataclass(frozen=True, slots=True)
class Run:
    """A segment in work."""

    segment: int
    left: float
    """Latent frames from its last stored window to its end."""
    window: float
    """Latent frames of the window in work."""
    waited: float
    """Seconds since its last window was done, or since it began."""
    pace: float | None
    """Seconds for a latent frame in its windows so far; None: none was timed."""


def held_up(runs: Iterable[Run], others: Iterable[float]) -> list[int]:
    """Segments that a second run would finish sooner; ``others``: paces of the job's finished segments.

    A window that is not done counts with the time it has taken already, so a hung engine is noticed, too.

    >>> slow = Run(0, left=84.0, window=21.0, waited=10.0, pace=2.0)
    >>> held_up([slow], others=[1.0])
    [0]
    >>> held_up([slow], others=[1.5])
    []
    >>> held_up([Run(0, left=21.0, window=21.0, waited=60.0, pace=None)], others=[1.0])
    [0]
    """
    runs = list(runs)
    found = []
    for run in runs:
        known = [*others, *(other.pace for other in runs if other is not run and other.pace is not None)]
        if not known or run.left <= 0:
            continue
        usual = median(known)
        pace = max(run.pace or 0.0, run.waited / run.window)
        if pace * run.left > SLOWER * usual * run.left + usual * run.window:
            found.append(run.segment)
    return found
