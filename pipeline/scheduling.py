"""Who gets the next free GPU, and over how many a job is split: the arithmetic of a pool of many jobs.

No Ray, no clock, no files: the pool actor, the simulations and the tests drive the same code.

**Fair.**  A free lane goes to the waiting job that holds the fewest lanes for its weight.  Jobs that hold
equally many (none, where jobs outnumber GPUs) are served by virtual time: a job's *tag* is what it has been
served over its weight, and a job that comes in starts at the pool's virtual time, which every second of
service moves on by 1 over the weights of all jobs in the pool (generalised processor sharing; Demers, Keshav
and Shenker, 1989).  So a job that has just come goes before one that has had more than its share, and whoever
waits is reached by the virtual time in the end: nobody starves.

**Split by the load.**  A job that starts alone is cut for all GPUs; ``J`` jobs on ``G`` GPUs are cut for
``ceil(G / J)`` each, so from ``J >= G`` on for one GPU: no seam, no frame rendered twice, and the queue as a
whole is done sooner.  GPUs that are free just now are shared out among the jobs that are about to start.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

PRIORITY_STEP = 25
"""A job that has so much more priority gets twice the share."""


def weight_of(priority: int) -> float:
    """The share of a job of this priority (-100 to 100, see the service's API), 1 for 0.

    >>> weight_of(0), weight_of(50), weight_of(-100)
    (1.0, 4.0, 0.0625)
    """
    return float(2.0 ** (priority / PRIORITY_STEP))


def gpus_for(gpus: int, free: int, jobs: int, starting: int, at_most: int | None = None) -> int:
    """Over how many GPUs a job that starts now is cut.

    ``gpus``: those that work; ``free``: those that nobody has; ``jobs``: in the pool or waiting for it, this
    one included; ``starting``: those of them that have no plan yet, this one included.

    >>> [gpus_for(8, 8, 1, 1), gpus_for(8, 0, 3, 1), gpus_for(8, 0, 20, 12), gpus_for(8, 6, 8, 1)]
    [8, 3, 1, 6]
    """
    share = -(-gpus // max(1, jobs))
    spare = free // max(1, starting)
    found = min(max(share, spare, 1), max(gpus, 1))
    return found if at_most is None else max(1, min(found, at_most))


@dataclass(slots=True)
class Claim:
    """One job in the pool: what it may have, what it has, and what it wants more."""

    job: str
    weight: float
    order: int
    """Jobs that came earlier have a smaller one."""
    tag: float
    """Seconds of service over weight, from the virtual time at which it came in."""
    at_most: int | None = None
    """Lanes at once; None: no limit."""
    want: int = 0
    """Lanes that it could use now, beside those it holds."""
    avoid: frozenset[int] = frozenset()
    """Lanes that it does not want."""
    held: set[int] = field(default_factory=set)

    @property
    def open(self) -> int:
        """Lanes that may be granted to it."""
        limit = self.want if self.at_most is None else min(self.want, self.at_most - len(self.held))
        return max(0, limit)


class FairShares:
    """The jobs of a pool, and whose turn it is."""

    def __init__(self) -> None:
        self.claims: dict[str, Claim] = {}
        self.virtual_time = 0.0
        self._orders = 0
        self._weights = 0.0
        """Of all claims together."""

    def enter(
        self, job: str, priority: int = 0, at_most: int | None = None, held: Iterable[int] = ()
    ) -> Claim:
        """Take a job in; of one that is here already, priority and limit may be others now."""
        claim, weight = self.claims.get(job), weight_of(priority)
        if claim is None:
            self._orders += 1
            claim = self.claims[job] = Claim(
                job, weight, self._orders, self.virtual_time, at_most, held=set(held)
            )
            self._weights += weight
        elif (weight, at_most) != (claim.weight, claim.at_most):
            self._weights += weight - claim.weight
            claim.weight, claim.at_most = weight, at_most
        return claim

    def leave(self, job: str) -> frozenset[int]:
        """Forget a job; the lanes it held."""
        claim = self.claims.pop(job, None)
        if claim is None:
            return frozenset()
        # Sums of powers of two and their inverses go wrong by rounding only; an empty pool is exact again.
        self._weights = self._weights - claim.weight if self.claims else 0.0
        return frozenset(claim.held)

    def served(self, job: str, seconds: float) -> None:
        """A job had a GPU for so long."""
        if not self.claims:
            return
        self.virtual_time += seconds / self._weights
        if job in self.claims:
            self.claims[job].tag += seconds / self.claims[job].weight

    def grant(self, free: Sequence[int]) -> list[tuple[str, int]]:
        """Give the free lanes away, the first of them first; who gets which.  Their claims hold them then.

        A claim takes the first free lane that it does not avoid.  Takes a look at each claim, and the
        logarithm of their number for each lane.
        """
        given: list[tuple[str, int]] = []
        left = list(free)
        if not left:
            return given
        hungry = [_turn(claim) for claim in self.claims.values() if claim.open]
        heapq.heapify(hungry)
        by_order = {claim.order: claim for claim in self.claims.values()} if hungry else {}
        while left and hungry:
            claim = by_order[hungry[0][-1]]
            lane = next((lane for lane in left if lane not in claim.avoid), None)
            if lane is not None:
                left.remove(lane)
                claim.held.add(lane)
                claim.want -= 1
                given.append((claim.job, lane))
            if lane is not None and claim.open:
                heapq.heapreplace(hungry, _turn(claim))
            else:
                heapq.heappop(hungry)
        return given

    def returned(self, job: str, lane: int) -> None:
        """A job gives a lane back."""
        if job in self.claims:
            self.claims[job].held.discard(lane)


def _turn(claim: Claim) -> tuple[float, float, int]:
    return (len(claim.held) / claim.weight, claim.tag, claim.order)


LEARNING_RATE = 0.3
"""Weight of a segment that was just measured in the mean; a GPU that gets hot shows within a few."""


class Speeds:
    """How fast lanes are, in units of work a second: learned by lane, and by kind of GPU for new lanes.

    A unit is a latent frame times pixels times sampler steps, so that jobs of different sizes can be compared
    roughly; plans only use ratios.
    """

    def __init__(self, kinds: Mapping[str, float] | None = None) -> None:
        self.kinds = dict(kinds or {})
        """Units a second of each kind (name of the GPU, engine); kept across runs."""
        self._lanes: dict[int, float] = {}

    def learn(self, lane: int, kind: str, units: float, seconds: float) -> None:
        """A lane did so many units in so many seconds."""
        if units <= 0 or seconds <= 0:
            return
        rate = units / seconds
        self._lanes[lane] = _moved(self._lanes.get(lane), rate)
        self.kinds[kind] = _moved(self.kinds.get(kind), rate)

    def forget(self, lane: int) -> None:
        """The lane is gone; its number may come back as another GPU."""
        self._lanes.pop(lane, None)

    def relative(self, lanes: Mapping[int, str]) -> dict[int, float]:
        """Speed of each lane (its kind given) over the fastest; a kind that nobody knows counts as the mean.

        >>> speeds = Speeds({"a": 10.0, "b": 5.0})
        >>> speeds.relative({0: "a", 1: "b", 2: "a"})
        {0: 1.0, 1: 0.5, 2: 1.0}
        """
        known = {lane: self._lanes.get(lane, self.kinds.get(kind)) for lane, kind in lanes.items()}
        rates = [rate for rate in known.values() if rate]
        if not rates:
            return dict.fromkeys(lanes, 1.0)
        fastest, mean = max(rates), sum(rates) / len(rates)
        return {lane: (rate or mean) / fastest for lane, rate in known.items()}


def _moved(mean: float | None, value: float) -> float:
    return value if mean is None else mean + LEARNING_RATE * (value - mean)
