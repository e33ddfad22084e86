"""A pool of simulated GPUs: the real scheduling and the real planner, and an event queue in place of time.

Every job is planned by ``calculate_segments`` for as many GPUs as a rule says, and its segments go to lanes
by ``FairShares``, longest first, as ``pipeline.dispatch`` does.  A latent frame takes the same time on every
GPU; preparing, transport and joining take none.  What is simulated is who waits for whom, and what is
rendered twice because jobs are split.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from pipeline.plan import WINDOW, Plan, calculate_segments, latents
from pipeline.scheduling import FairShares, gpus_for

WINDOW_SECONDS = 12.0
"""Of a whole window on a GPU; all times scale with it."""
LATENT_SECONDS = WINDOW_SECONDS / latents(WINDOW)
MORE_JOBS = 2
"""A runner takes two jobs for each GPU and these, as ``actors.job_runner``; the others wait in its queue."""

Rule = Callable[[int, int, int, int], int]
"""GPUs, free ones, jobs in the pool or waiting, those of them without a plan: over how many one is cut."""

RULES: dict[str, Rule] = {
    "by load": gpus_for,
    "always split": lambda gpus, free, jobs, starting: gpus,
    "never split": lambda gpus, free, jobs, starting: 1,
}


@dataclass(frozen=True, slots=True)
class Arrival:
    """A job that comes at a time, with so many frames."""

    seconds: float
    frames: int
    priority: int = 0


@dataclass(slots=True)
class Done:
    """What became of a job; all times in seconds since the trace's begin."""

    arrival: Arrival
    gpus: int = 0
    """Over how many it was cut."""
    first: float = 0.0
    """Its first segment is there."""
    end: float = 0.0
    rendered: int = 0
    """Frames that its segments give together; more than it has are rendered twice, or past its end."""
    gpu_seconds: float = 0.0

    @property
    def turnaround(self) -> float:
        return self.end - self.arrival.seconds


@dataclass(slots=True)
class Outcome:
    """All jobs of a trace, in order, and what the GPUs did."""

    gpus: int
    jobs: list[Done] = field(default_factory=list)

    @property
    def makespan(self) -> float:
        return max(job.end for job in self.jobs)

    @property
    def busy(self) -> float:
        """Share of all GPUs' time, from the first arrival to the last end."""
        whole = self.makespan - min(job.arrival.seconds for job in self.jobs)
        return sum(job.gpu_seconds for job in self.jobs) / (self.gpus * whole)

    @property
    def twice(self) -> float:
        """Frames rendered beyond those of the videos, as a share of the latter."""
        asked = sum(job.arrival.frames for job in self.jobs)
        return sum(job.rendered for job in self.jobs) / asked - 1


@lru_cache(maxsize=100_000)
def plan_for(frames: int, gpus: int) -> Plan:
    """The planner's answer; it depends on nothing else."""
    return calculate_segments(frames, gpus)


def cost(windows: Sequence[int]) -> float:
    """Seconds of a segment on a GPU."""
    return LATENT_SECONDS * sum(map(latents, windows))


@dataclass(slots=True)
class _Job:
    done: Done
    left: list[float]
    """Seconds of the segments that nobody renders yet, shortest first."""
    open: int
    """Segments that are not finished."""


def simulate(
    arrivals: Sequence[Arrival], gpus: int, rule: Rule = gpus_for, shares: FairShares | None = None
) -> Outcome:
    """Run a trace to its end.  ``shares`` may be another order of service."""
    shares = FairShares() if shares is None else shares
    outcome = Outcome(gpus, [Done(arrival) for arrival in arrivals])
    coming = deque(sorted(range(len(arrivals)), key=lambda number: arrivals[number].seconds))
    waiting: list[tuple[int, int]] = []
    pool: dict[str, _Job] = {}
    free = list(range(gpus))
    ends: list[tuple[float, int, str, float]] = []
    now = 0.0
    while coming or ends or waiting:
        times = [ends[0][0]] if ends else []
        times += [arrivals[coming[0]].seconds] if coming else []
        now = min(times)
        while coming and arrivals[coming[0]].seconds <= now:
            number = coming.popleft()
            heapq.heappush(waiting, (-arrivals[number].priority, number))
        while ends and ends[0][0] <= now:
            _, lane, name, seconds = heapq.heappop(ends)
            _finish(shares, pool, name, lane, seconds, now)
            heapq.heappush(free, lane)
        _admit(shares, pool, waiting, outcome, gpus, len(free), rule)
        for name, lane in shares.grant(sorted(free)):
            free.remove(lane)
            seconds = pool[name].left.pop()
            heapq.heappush(ends, (now + seconds, lane, name, seconds))
    return outcome


def _finish(
    shares: FairShares, pool: dict[str, _Job], name: str, lane: int, seconds: float, now: float
) -> None:
    job = pool[name]
    shares.served(name, seconds)
    shares.returned(name, lane)
    job.done.gpu_seconds += seconds
    job.done.first = job.done.first or now
    job.open -= 1
    if not job.open:
        job.done.end = now
        shares.leave(name)
        del pool[name]


def _admit(
    shares: FairShares,
    pool: dict[str, _Job],
    waiting: list[tuple[int, int]],
    outcome: Outcome,
    gpus: int,
    free: int,
    rule: Rule,
) -> None:
    """Jobs from the queue into the pool, as many as a runner takes; each is cut as it comes in."""
    room = 2 * gpus + MORE_JOBS - len(pool)
    jobs, unplanned = len(pool) + len(waiting), len(waiting)
    while waiting and room > 0:
        _, number = heapq.heappop(waiting)
        done, name = outcome.jobs[number], str(number)
        done.gpus = rule(gpus, free, jobs, unplanned)
        plan = plan_for(done.arrival.frames, done.gpus)
        done.rendered = sum(segment.rendered for segment in plan.segments)
        claim = shares.enter(name, done.arrival.priority)
        claim.want = len(plan.segments)
        left = sorted(cost(segment.windows) for segment in plan.segments)
        pool[name] = _Job(done, left, len(left))
        room -= 1
        unplanned -= 1
