"""Who gets the next GPU: fixed traces, and what holds for any sequence of events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.simulation import RULES, Arrival, simulate
from bench.traces import batch, poisson
from pipeline.scheduling import Claim, FairShares, Speeds, gpus_for, weight_of
from pipeline.timeline import FPS

EXAMPLES = settings(derandomize=True, deadline=None, database=None, max_examples=200)
SEGMENT = 60.0
"""Seconds."""


@dataclass
class Pool:
    """Lanes that all take a minute for a segment, given away whenever one is free."""

    lanes: int
    shares: FairShares = field(default_factory=FairShares)
    wants: dict[str, int] = field(default_factory=dict)
    """Segments that are to be rendered."""
    given: list[tuple[str, int]] = field(default_factory=list)
    """All grants, in order."""
    free: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free = list(range(self.lanes))

    def enter(self, job: str, segments: int, priority: int = 0, at_most: int | None = None) -> None:
        claim = self.shares.enter(job, priority, at_most)
        claim.want = segments
        self.grant()

    def grant(self) -> None:
        for job, lane in self.shares.grant(self.free):
            self.free.remove(lane)
            self.given.append((job, lane))

    def minute(self) -> list[str]:
        """All lanes finish, one after the other; who got one meanwhile."""
        before = len(self.given)
        busy = [(claim.job, lane) for claim in self.shares.claims.values() for lane in sorted(claim.held)]
        for job, lane in sorted(busy, key=lambda pair: pair[1]):
            self.shares.served(job, SEGMENT)
            self.shares.returned(job, lane)
            self.free.append(lane)
            if not (claim := self.shares.claims[job]).held and not claim.want:
                self.shares.leave(job)
            self.grant()
        return [job for job, _ in self.given[before:]]


def test_a_short_job_gets_the_next_lane() -> None:
    """A long job has all lanes and wants a hundred more: who comes now gets the first one that is freed."""
    pool = Pool(4)
    pool.enter("long", 100)
    pool.minute()
    pool.enter("short", 1)
    assert pool.minute()[0] == "short"
    assert pool.minute() == ["long"] * 4


def test_lanes_are_shared_by_weight() -> None:
    """Three jobs that never have enough, one of them with twice the weight: half of all lanes are its."""
    pool = Pool(8)
    for job, priority in (("a", 25), ("b", 0), ("c", 0)):
        pool.enter(job, 1000, priority)
    for _ in range(5):
        pool.minute()  # the first to come had everything
    held = {job: len(claim.held) for job, claim in pool.shares.claims.items()}
    assert held == {"a": 4, "b": 2, "c": 2}


def test_jobs_that_outnumber_lanes_take_turns() -> None:
    """Six jobs on two lanes, a segment each time: nobody is ever more than two segments behind another."""
    pool = Pool(2)
    for number in range(6):
        pool.enter(f"job {number}", 1000)
    for _ in range(10):
        pool.minute()
        got = [job for job, _ in pool.given]
        counts = [got.count(job) for job in pool.shares.claims]
        assert max(counts) - min(counts) <= 2


def test_nobody_starves() -> None:
    """Every minute a new job comes, each with a better right by its share: the old one still goes on."""
    pool = Pool(1)
    pool.enter("old", 20)
    got = []
    for number in range(400):
        pool.enter(f"new {number}", 1)
        got += pool.minute()
        if got.count("old") == 19:
            break
    assert got.count("old") == 19
    waits = [number for number, job in enumerate(got) if job == "old"]
    assert max(after - before for before, after in pairwise(waits)) < 60


def test_a_job_of_low_priority_waits_but_is_reached() -> None:
    """A sixteenth of the weight, against newcomers all the time."""
    pool = Pool(1)
    pool.enter("busy", 1)
    pool.enter("poor", 1, priority=-100)
    got: list[str] = []
    for number in range(300):
        pool.enter(f"new {number}", 1)
        got += pool.minute()
        if "poor" in got:
            break
    assert "poor" in got


def test_a_priority_that_is_told_later_counts_in_the_weights_of_all() -> None:
    """A job that a new pool finds in work says its priority only then; when it leaves, its weight leaves."""
    shares = FairShares()
    shares.enter("plain")
    shares.enter("found")
    assert shares.enter("found", priority=25, at_most=2).at_most == 2
    shares.served("plain", 3.0)
    assert shares.virtual_time == 1.0
    shares.leave("found")
    shares.served("plain", 1.0)
    assert shares.virtual_time == 2.0


def test_nobody_gets_more_than_its_limit() -> None:
    """``at_most`` counts what is held; the rest goes to others, and to nobody where there are none."""
    pool = Pool(4)
    pool.enter("modest", 10, at_most=2)
    assert len(pool.free) == 2
    pool.enter("other", 10)
    assert {job: len(claim.held) for job, claim in pool.shares.claims.items()} == {"modest": 2, "other": 2}


def test_lanes_that_a_job_avoids_go_to_others() -> None:
    """It takes the first one that it does not avoid; where it avoids all, the next job has its turn."""
    shares = FairShares()
    shares.enter("a").want = 2
    shares.claims["a"].avoid = frozenset({0})
    assert shares.grant([0, 1, 2]) == [("a", 1), ("a", 2)]
    shares.enter("b").want = 1
    shares.claims["a"].want = 1
    assert shares.grant([0]) == [("b", 0)]
    assert shares.claims["a"].want == 1


def test_what_a_job_held_is_known_when_it_leaves() -> None:
    """Lanes of a job that a pool took over; leaving twice is no error, an unknown job no lane's holder."""
    shares = FairShares()
    shares.enter("a", held=[3, 4])
    shares.served("nobody", 5.0)
    shares.returned("nobody", 3)
    assert shares.leave("a") == {3, 4}
    assert shares.leave("a") == frozenset()
    shares.served("a", 1.0)
    assert shares.virtual_time == 5.0  # which it was served in; an empty pool stands still


@pytest.mark.parametrize(
    ("gpus", "free", "jobs", "starting", "at_most", "expected"),
    [
        (8, 8, 1, 1, None, 8),  # alone
        (8, 0, 1, 1, None, 8),  # its GPUs are all in use by itself, for now
        (8, 8, 2, 2, None, 4),
        (8, 8, 3, 3, None, 3),
        (8, 0, 8, 1, None, 1),  # as many jobs as GPUs: none is split
        (8, 0, 100, 92, None, 1),
        (8, 6, 8, 1, None, 6),  # the others are nearly done: what is free is used
        (8, 6, 8, 3, None, 2),
        (8, 8, 1, 1, 3, 3),
        (8, 8, 1, 1, 1, 1),
        (1, 1, 1, 1, None, 1),
        (0, 0, 1, 1, None, 1),  # no GPU yet
        (8, 8, 0, 0, None, 8),
    ],
)
def test_over_how_many_gpus_a_job_is_cut(
    gpus: int, free: int, jobs: int, starting: int, at_most: int | None, expected: int
) -> None:
    """The table of the rule."""
    assert gpus_for(gpus, free, jobs, starting, at_most) == expected


def test_speeds_are_learned_by_lane_and_by_kind() -> None:
    """A new lane starts with its kind's speed, a lane that gets slow is known within a few segments."""
    speeds = Speeds({"big": 10.0})
    speeds.learn(0, "big", 100, 10)
    speeds.learn(1, "small", 50, 10)
    assert speeds.relative({0: "big", 1: "small", 2: "big", 3: "small"}) == {0: 1.0, 1: 0.5, 2: 1.0, 3: 0.5}
    assert speeds.relative({0: "big", 4: "unknown"}) == {0: 1.0, 4: 1.0}
    for _ in range(5):
        speeds.learn(0, "big", 50, 10)  # it is hot
    hot = speeds.relative({0: "big", 1: "small"})
    assert hot[1] > 0.8
    speeds.forget(1)
    assert speeds.relative({1: "big"}) == {1: 1.0}
    before = dict(speeds.kinds)
    speeds.learn(0, "big", 0, 10)
    speeds.learn(0, "big", 10, 0)
    assert speeds.kinds == before


# --- whatever happens --------------------------------------------------------------------------------

EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("enter"), st.integers(0, 9), st.integers(-100, 100), st.none() | st.integers(1, 3)),
        st.tuples(st.just("want"), st.integers(0, 9), st.integers(0, 5), st.frozensets(st.integers(0, 5))),
        st.tuples(st.just("return"), st.integers(0, 5), st.floats(0, 1e4), st.none()),
        st.tuples(st.just("leave"), st.integers(0, 9), st.none(), st.none()),
    ),
    max_size=60,
)


def simply(claims: Sequence[Claim], free: Sequence[int]) -> list[tuple[str, int]]:
    """What ``grant`` shall give, said in the plainest way: for each lane a look at everybody."""
    held = {claim.job: len(claim.held) for claim in claims}
    left, given = list(free), []
    stuck: set[str] = set()
    while left:
        open_ = [
            claim
            for claim in claims
            if claim.job not in stuck
            and claim.want > sum(job == claim.job for job, _ in given)
            and (claim.at_most is None or held[claim.job] < claim.at_most)
        ]
        if not open_:
            break
        claim = min(open_, key=lambda claim: (held[claim.job] / claim.weight, claim.tag, claim.order))
        fit = [lane for lane in left if lane not in claim.avoid]
        if not fit:
            stuck.add(claim.job)
            continue
        left.remove(fit[0])
        held[claim.job] += 1
        given.append((claim.job, fit[0]))
    return given


@EXAMPLES
@given(EVENTS)
def test_grants_are_right_whatever_happens(events: list[tuple[str, int, object, object]]) -> None:
    """No lane is given twice, nobody gets too many or one that it avoids, none is left that one wants."""
    shares, free = FairShares(), list(range(6))
    for what, number, first, second in events:
        job = f"job {number}"
        if what == "enter":
            shares.enter(job, first, second)  # type: ignore[arg-type]
        elif what == "want" and job in shares.claims:
            shares.claims[job].want, shares.claims[job].avoid = first, second  # type: ignore[assignment]
        elif what == "leave":
            free += sorted(shares.leave(job))
        elif what == "return":
            for claim in shares.claims.values():
                if number in claim.held:
                    shares.served(claim.job, first)  # type: ignore[arg-type]
                    shares.returned(claim.job, number)
                    free.append(number)
                    break
        expected = simply(list(shares.claims.values()), free)
        given_now = shares.grant(free)
        assert given_now == expected
        for _, lane in given_now:
            free.remove(lane)
        held = [lane for claim in shares.claims.values() for lane in claim.held]
        assert sorted(held + free) == list(range(6))
        for claim in shares.claims.values():
            assert claim.at_most is None or len(claim.held) <= claim.at_most
            assert not (claim.open and set(free) - claim.avoid)


# --- in simulation -----------------------------------------------------------------------------------


def test_a_short_job_starts_within_a_segment() -> None:
    """An hour's video has all eight GPUs; a clip that comes meanwhile waits for one segment at most."""
    outcome = simulate([Arrival(0.0, 3600 * FPS), Arrival(100.0, 50)], 8)
    hour, clip = outcome.jobs
    longest = 20 * 12.0  # a chain of the most windows
    assert clip.end - 100.0 <= longest + 12.0
    assert hour.end > 5 * clip.end


def test_the_rule_is_about_as_good_as_the_better_of_the_two_extremes() -> None:
    """Mean turnaround: near to always splitting while GPUs are idle, to never splitting when they are not."""
    for load in (0.3, 0.8, 1.1):
        trace = poisson(8, load, count=200)
        found = {
            name: sum(job.turnaround for job in simulate(trace, 8, rule).jobs) for name, rule in RULES.items()
        }
        assert found["by load"] <= 1.12 * min(found.values())
    at_once = {name: simulate(batch(), 8, rule) for name, rule in RULES.items()}
    assert at_once["by load"].makespan < 0.95 * at_once["always split"].makespan
    assert at_once["by load"].busy > 0.97
    assert weight_of(25) == 2
