"""How far a job is and how long it may still take; pure values, no clock and no drawing.

Filled in by ``render``, shown by the command line.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from pipeline.plan import Segment, latents

Stage = Literal["preparing", "starting", "rendering", "joining", "finished"]
SegmentStage = Literal["waiting", "rendering", "finished"]


@dataclass(frozen=True, slots=True)
class SegmentState:
    """One segment as a user sees it."""

    segment: Segment
    stage: SegmentStage
    lane: int | None = None
    windows_done: int = 0
    fraction: float = 0.0
    window_seconds: tuple[float, ...] = ()
    """Of the last of the windows done: those of an earlier start of the job were not timed."""

    @property
    def cost(self) -> int:
        """Latent frames of all its windows."""
        return sum(latents(length) for length in self.segment.windows)

    @property
    def done(self) -> float:
        """Latent frames rendered so far."""
        if self.stage == "finished":
            return self.cost
        lengths = self.segment.windows
        whole = sum(latents(length) for length in lengths[: self.windows_done])
        current = latents(lengths[self.windows_done]) if self.windows_done < len(lengths) else 0
        return whole + self.fraction * current


@dataclass(frozen=True, slots=True)
class JobProgress:
    """A snapshot of a job."""

    job: str
    stage: Stage
    lanes: int = 0
    states: tuple[SegmentState, ...] = ()

    @property
    def windows_done(self) -> int:
        return sum(len(s.segment.windows) if s.stage == "finished" else s.windows_done for s in self.states)

    @property
    def windows_total(self) -> int:
        return sum(len(state.segment.windows) for state in self.states)

    @property
    def fraction(self) -> float:
        """Share of the rendering that is done, by cost, 0 to 1."""
        total = sum(state.cost for state in self.states)
        return sum(state.done for state in self.states) / total if total else 0.0

    @property
    def eta_seconds(self) -> float | None:
        """Seconds until the last segment is rendered; None until a window of this job has been timed.

        The time that a latent frame took in the windows done so far (median), and the rest of the segments
        given longest first to the lanes.  Joining comes on top: some seconds for each seam.
        """
        rate = _seconds_per_latent(self.states)
        if rate is None:
            return None
        running = [state.cost - state.done for state in self.states if state.stage == "rendering"]
        loads = running + [0.0] * max(0, self.lanes - len(running))
        if not loads:
            return None
        heapq.heapify(loads)
        waiting = (state.cost - state.done for state in self.states if state.stage == "waiting")
        for cost in sorted(waiting, reverse=True):
            heapq.heapreplace(loads, loads[0] + cost)
        return max(loads) * rate


def _seconds_per_latent(states: Sequence[SegmentState]) -> float | None:
    timed = []
    for state in states:
        first = max(0, state.windows_done - len(state.window_seconds))
        lengths = state.segment.windows[first:]
        timed += [s / latents(n) for s, n in zip(state.window_seconds, lengths, strict=False)]
    return median(timed) if timed else None
