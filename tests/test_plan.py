"""The planner against its rules, against tables worked out beforehand, and against brute force."""

from __future__ import annotations

import json
import math
from collections import Counter
from fractions import Fraction
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.errors import InvalidRequest
from pipeline.pauses import CHANGE, Pauses, place_overlaps
from pipeline.plan import (
    MAX_WINDOWS,
    MIN_OVERLAP,
    WARM_UP,
    Plan,
    calculate_segments,
    chain_segments,
    latents,
    naive_segments,
)

EXAMPLES = settings(derandomize=True, deadline=None, database=None, max_examples=400)


def check(plan: Plan, overlap: int, cap: int) -> None:
    """Everything that holds for any plan with this minimum overlap and this cap."""
    segments = plan.segments
    assert [s.index for s in segments] == list(range(len(segments)))
    assert segments[0].start == 0
    assert segments[-1].stop == plan.total_frames
    assert all(overlap <= shared < plan.window for shared in plan.overlaps)
    for left, right in pairwise(segments):
        assert left.start < right.start < left.stop < right.stop
    for first, third in zip(segments, segments[2:], strict=False):
        assert first.stop <= third.start
    for s in segments:
        assert 1 <= len(s.windows) <= cap
        assert s.rendered == s.windows[0] + sum(length - plan.motion for length in s.windows[1:])
        assert s.rendered == s.frames if s is not segments[-1] else s.rendered >= s.frames
        assert all(length == plan.window for length in s.windows[:-1])
        assert s.windows[-1] % 4 == 1
        assert s.windows[-1] <= plan.window
        if len(segments) > 1:
            assert s.windows[0] == plan.window
        if len(s.windows) > 1:
            assert s.windows[-1] > plan.motion
        if not plan.partial_windows:
            assert s.windows[-1] == plan.window


def hidden(plan: Plan, pauses: list[tuple[int, int]]) -> int:
    """Overlaps that have a pause for a seam, behind the frames of warm-up."""
    quiet = {t for first, stop in pauses for t in range(first, stop)}
    return sum(
        any(
            quiet.issuperset(range(t, t + CHANGE))
            for t in range(right.start + WARM_UP, left.stop - CHANGE + 1)
        )
        for left, right in pairwise(plan.segments)
    )


def surplus(plan: Plan) -> int:
    """Frames that are rendered and dropped at the end of the video."""
    return plan.segments[-1].rendered - plan.segments[-1].frames


def speed_up(plan: Plan) -> float:
    return plan.single / plan.makespan()


# Tables from the cost model: N, GPUs, speed-up of the naive plan, of ours, segments of ours.  No cap.
TABLE = [
    (250, 2, 1.33, 2.00, 2),
    (250, 4, 2.00, 2.00, 2),
    (250, 8, 4.00, 4.00, 5),
    (250, 64, 2.00, 4.00, 5),
    (500, 2, 1.75, 1.75, 2),
    (500, 4, 2.33, 3.50, 4),
    (500, 8, 3.50, 3.50, 4),
    (500, 16, 7.00, 7.00, 9),
    (1000, 2, 1.75, 2.00, 2),
    (1000, 4, 3.50, 3.50, 4),
    (1000, 8, 4.67, 7.00, 8),
    (1000, 16, 7.00, 7.00, 8),
    (1000, 64, 7.00, 14.0, 18),
    (2000, 2, 1.87, 2.00, 2),
    (2000, 4, 3.50, 3.50, 4),
    (2000, 8, 7.00, 7.00, 8),
    (2000, 16, 9.33, 14.0, 16),
    (2000, 64, 14.0, 28.0, 36),
    (5000, 4, 3.89, 3.89, 4),
    (5000, 8, 7.00, 7.78, 8),
    (5000, 16, 14.0, 14.0, 15),
    (5000, 64, 35.0, 35.0, 40),
    (10000, 2, 1.99, 1.99, 2),
    (10000, 4, 3.86, 3.97, 4),
    (10000, 16, 13.9, 15.4, 16),
    (10000, 64, 46.3, 46.3, 51),
    (90000, 8, 7.96, 7.96, 8),
    (90000, 64, 59.5, 62.5, 64),
]


@pytest.mark.parametrize(("frames", "gpus", "naive", "ours", "count"), TABLE)
def test_whole_windows_give_the_speed_ups_of_the_table(
    frames: int, gpus: int, naive: float, ours: float, count: int
) -> None:
    """With whole windows the speed-up and the number of segments are those of the cost model."""
    plan = calculate_segments(frames, gpus, partial_windows=False, max_windows=1300)
    assert speed_up(naive_segments(frames, gpus)) == pytest.approx(naive, rel=0.004)
    assert speed_up(plan) == pytest.approx(ours, rel=0.004)
    assert len(plan.segments) == count
    partial = calculate_segments(frames, gpus, max_windows=1300)
    assert partial.makespan() <= plan.makespan()


@pytest.mark.parametrize(
    ("frames", "gpus", "overlaps"),
    [(1000, 2, {26}), (1000, 4, {62, 63}), (1000, 8, {32}), (10000, 8, {62, 63}), (140, 4, {40, 41})],
)
def test_overlaps_are_as_wide_as_the_makespan_allows(frames: int, gpus: int, overlaps: set[int]) -> None:
    """Idle GPUs render wider overlaps: nobody waits longer for it."""
    plan = calculate_segments(frames, gpus, partial_windows=False)
    assert set(plan.overlaps) == overlaps
    lean = calculate_segments(frames, gpus, partial_windows=False, overlap_frames=MIN_OVERLAP)
    assert lean.makespan() == plan.makespan()


def test_partial_windows_make_the_thousand_frames_faster() -> None:
    """A shorter last window beats whole windows on 4 and 8 GPUs; on 2, 7 windows fit exactly."""
    makespans = [calculate_segments(1000, gpus).makespan() for gpus in (2, 4, 8)]
    assert makespans == [7, 78 / 21, 41 / 21]


@pytest.mark.parametrize(
    ("frames", "windows"),
    [(1, (1,)), (2, (5,)), (60, (61,)), (80, (81,)), (81, (81,)), (82, (81, 13)), (99, (81, 29))],
)
def test_a_short_job_is_one_segment(frames: int, windows: tuple[int, ...]) -> None:
    """Below 100 frames one GPU renders everything, with the smallest windows that hold it."""
    (segment,) = calculate_segments(frames, 8).segments
    assert (segment.start, segment.stop, segment.windows, segment.gpu) == (0, frames, windows, 0)
    (whole,) = calculate_segments(frames, 8, partial_windows=False).segments
    assert whole.windows == (81,) * len(windows)
    assert calculate_segments(frames, 1).makespan() == calculate_segments(frames, 1).single


def test_from_a_hundred_frames_on_a_job_is_split() -> None:
    """100 frames are two windows on two GPUs, with all that both render as overlap."""
    plan = calculate_segments(100, 8)
    assert [(s.start, s.stop, s.gpu) for s in plan.segments] == [(0, 81, 0), (19, 100, 1)]


def test_a_short_job_goes_to_the_fastest_gpu() -> None:
    """Where speeds are known, the one GPU of a short job is the fastest."""
    assert calculate_segments(50, 3, speeds=[1, 2, 1.5]).segments[0].gpu == 1
    assert calculate_segments(90, 3, speeds=[1, 2, 1.5]).segments[0].gpu == 1


@pytest.mark.parametrize("frames", [50, 1000, 90_000])
def test_without_multi_gpu_everything_is_on_lane_0(frames: int) -> None:
    """``use_multi_gpu=False`` plans for GPU 0 alone; only the cap makes several segments of it."""
    plan = calculate_segments(frames, 8, use_multi_gpu=False)
    check(plan, MIN_OVERLAP, MAX_WINDOWS)
    assert {s.gpu for s in plan.segments} == {0}
    assert plan.segments == calculate_segments(frames, 1).segments
    assert len(plan.segments) == {50: 1, 1000: 1, 90_000: 64}[frames]


@pytest.mark.parametrize("gpus", [1, 8, 64, 1000])
@pytest.mark.parametrize("partial", [False, True])
def test_an_hour_is_capped(gpus: int, partial: bool) -> None:
    """90,000 frames are at least 64 segments of at most 20 windows, on any number of GPUs."""
    plan = calculate_segments(90_000, gpus, partial_windows=partial)
    check(plan, MIN_OVERLAP, MAX_WINDOWS)
    assert len(plan.segments) >= 64
    assert gpus == 1000 or plan.makespan() <= 1.03 * plan.single / gpus


def test_lanes_take_turns() -> None:
    """Where a lane has several segments, the first ones of all lanes come first in the video."""
    plan = calculate_segments(20_000, 4)
    assert [s.gpu for s in plan.segments] == [0, 1, 2, 3] * (len(plan.segments) // 4)
    # Five segments of one window in two rounds: nobody gets a second one while others have none.
    plan = calculate_segments(290, 4, max_windows=1)
    assert [s.gpu for s in plan.segments] == [0, 1, 2, 3, 0]


def test_gpus_that_can_not_help_get_nothing() -> None:
    """The fewest segments of the least makespan are planned, so some lanes stay empty."""
    plan = calculate_segments(250, 64, partial_windows=False)
    assert {s.gpu for s in plan.segments} == set(range(5))
    slow = calculate_segments(1000, 3, speeds=[1, 1, 0.001])
    assert {s.gpu for s in slow.segments} == {0, 1}


def test_speeds_shape_the_segments() -> None:
    """A GPU of double speed gets about double the frames, and never fewer than a slower one."""
    plan = calculate_segments(3000, 3, speeds=[1.0, 2.0, 0.5], max_windows=40)
    frames = {s.gpu: s.frames for s in plan.segments}
    assert frames[1] > frames[0] > frames[2]
    assert frames[1] / frames[0] == pytest.approx(2, rel=0.05)
    loads = [sum(map(latents, s.windows)) / 21 for s in sorted(plan.segments, key=lambda s: s.gpu)]
    assert plan.makespan([1.0, 2.0, 0.5]) == max(loads[0], loads[1] / 2, loads[2] / 0.5)
    assert plan.makespan() == max(loads)


def test_only_the_ends_are_shorter_than_two_overlaps() -> None:
    """Only the first and the last segment may be too short for two seams, however many slow GPUs."""
    plan = calculate_segments(499, 6, speeds=[7, 1, 1.1, 1.2, 1.1, 0.9], max_windows=6, overlap_frames=59)
    check(plan, 59, 6)
    assert [s.gpu for s in plan.segments] == [2, 0, 0, 3]
    assert [s.rendered < 2 * 59 for s in plan.segments] == [True, False, False, True]


def test_equal_speeds_are_no_speeds() -> None:
    """Speeds are relative: the same number for all changes nothing."""
    assert calculate_segments(5000, 5, speeds=[0.3] * 5) == calculate_segments(5000, 5)


def test_overlap_frames_is_the_least_overlap() -> None:
    """The caller's overlap is kept where the frames come out even, and never undercut."""
    assert calculate_segments(1026 - 26, 2, overlap_frames=26, partial_windows=False).overlaps == (26,)
    for overlap in (9, 17, 40, 62, 80):
        for frames in (100, 250, 999, 1000, 5001):
            plan = calculate_segments(frames, 4, overlap_frames=overlap)
            check(plan, overlap, MAX_WINDOWS)
            # What nobody can save is less than a latent, except in segments that have no window to spare.
            if all(len(s.windows) > 2 for s in plan.segments):
                assert sum(plan.overlaps) - overlap * len(plan.overlaps) < 4


def test_the_naive_plan_is_the_documents() -> None:
    """N // k frames each, the rest to the last, half a window in front, whole windows."""
    plan = naive_segments(1003, 4)
    assert [(s.start, s.stop) for s in plan.segments] == [(0, 250), (210, 500), (460, 750), (710, 1003)]
    assert [len(s.windows) for s in plan.segments] == [4, 4, 4, 4]
    assert set(plan.overlaps) == {40}
    assert [(s.start, s.stop) for s in naive_segments(99, 4).segments] == [(0, 99)]
    assert [(s.start, s.stop, s.gpu) for s in naive_segments(120, 500).segments] == [(0, 120, 499)]


def test_a_plan_survives_json() -> None:
    """The job directory gives back the plan that was stored there."""
    for plan in (calculate_segments(1234, 5), naive_segments(1234, 5)):
        assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize("damage", [{"window": None}, {"segments": None}, {"segments": [{}]}, {"extra": 1}])
def test_a_damaged_plan_is_refused(damage: dict[str, Any]) -> None:
    """A stored plan with a missing or unknown key is an error of ours, not a traceback."""
    data = calculate_segments(1000, 2).to_json() | damage
    with pytest.raises(InvalidRequest, match="plan: is damaged"):
        Plan.from_json({key: value for key, value in data.items() if value is not None})


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("total_frames", {"total_frames": 0}),
        ("gpu_count", {"gpu_count": 0}),
        ("window", {"window": 80}),
        ("window", {"window": 1}),
        ("motion", {"motion": 0}),
        ("motion", {"motion": 81}),
        ("speeds", {"speeds": [1]}),
        ("speeds", {"speeds": [1, 0]}),
        ("speeds", {"speeds": [1, math.inf]}),
        ("speeds", {"speeds": [1, math.nan]}),
        ("overlap_frames", {"overlap_frames": 8}),
        ("overlap_frames", {"overlap_frames": 81}),
        ("min_overlap", {"min_overlap": 8}),
        ("min_overlap", {"window": 21}),
        ("max_windows", {"max_windows": 0}),
        ("max_windows", {"max_windows": 3, "overlap_frames": 60}),
    ],
)
def test_what_can_not_be_planned_is_refused(field: str, arguments: dict[str, Any]) -> None:
    """A wrong argument is named."""
    with pytest.raises(InvalidRequest) as caught:
        calculate_segments(**({"total_frames": 1000, "gpu_count": 2} | arguments))
    assert caught.value.field == field


speeds_of = st.lists(st.sampled_from([0.3, 0.5, 0.7, 1.0, 1.0, 1.5, 2.0]), min_size=1, max_size=9)


@EXAMPLES
@given(
    frames=st.integers(1, 12_000),
    speeds=speeds_of,
    overlap=st.integers(9, 80),
    soft=st.booleans(),
    cap=st.integers(6, 30),
    partial=st.booleans(),
)
def test_every_plan_keeps_the_rules(
    frames: int, speeds: list[float], overlap: int, soft: bool, cap: int, partial: bool
) -> None:
    """Cover, order, overlaps, caps and window lengths hold for any job; little is rendered for nothing."""
    wish: dict[str, Any] = {"min_overlap": overlap} if soft else {"overlap_frames": overlap}
    plan = calculate_segments(
        frames, len(speeds), speeds=speeds, max_windows=cap, partial_windows=partial, **wish
    )
    check(plan, overlap, cap)
    # With pauses: the same windows in the same time, the same rules, and never fewer seams in a pause.
    pauses = [(t, t + 6) for t in range(17, frames, 61)]
    moved = calculate_segments(
        frames,
        len(speeds),
        speeds=speeds,
        max_windows=cap,
        partial_windows=partial,
        pauses=pauses,
        **wish,
    )
    check(moved, overlap, cap)
    assert [(s.windows, s.gpu) for s in moved.segments] == [(s.windows, s.gpu) for s in plan.segments]
    assert moved.makespan(speeds) == plan.makespan(speeds)
    assert hidden(moved, pauses) >= hidden(plan, pauses)
    # A split job renders whole windows first, so a segment of one window can't give frames back.
    assert surplus(plan) < (4 if partial and len(plan.segments[-1].windows) > 1 else 72) or frames <= 81


@settings(EXAMPLES, max_examples=60)
@given(
    frames=st.integers(330, 441),
    starts=st.lists(st.integers(60, 400), min_size=1, max_size=4, unique=True),
    least=st.integers(9, 26),
)
def test_no_other_overlaps_have_more_pauses(frames: int, starts: list[int], least: int) -> None:
    """Three chains of two windows, against every way to share their spare frames out."""
    lengths = (153, 153, 153)
    spare = sum(lengths) - frames
    if spare < 2 * least:
        return
    even = [min(spare // 2, 76), min(spare - spare // 2, 76)]
    pauses = [(start, start + 6) for start in starts]
    quiet = Pauses(pauses, frames)

    def count(first: int, second: int) -> int:
        ends = (153, 306 - first)
        spans = [(end - o + WARM_UP, end) for end, o in zip(ends, (first, second), strict=True)]
        return sum(quiet.within(*span) >= CHANGE for span in spans)

    found = place_overlaps(lengths, even, frames, least, 80, WARM_UP, pauses)
    assert sum(found) <= spare
    every = [(a, b) for a, b in product(range(least, 77), repeat=2) if a + b <= spare]
    assert count(*found) == max(count(*both) for both in every)


@EXAMPLES
@given(frames=st.integers(100, 20_000), speeds=speeds_of, partial=st.booleans())
def test_no_plan_is_slower_than_the_naive_one(frames: int, speeds: list[float], partial: bool) -> None:
    """From 100 frames on ours is at least as fast; the naive plan knows no cap, so ours must not bind."""
    naive = naive_segments(frames, len(speeds))
    cap = max(MAX_WINDOWS, *(len(s.windows) for s in naive.segments))
    ours = calculate_segments(frames, len(speeds), partial_windows=partial, max_windows=cap)
    assert ours.makespan() <= naive.makespan()
    shaped = calculate_segments(
        frames, len(speeds), speeds=speeds, partial_windows=partial, max_windows=len(naive.segments) * cap
    )
    assert shaped.makespan(speeds) <= naive.makespan(speeds) * (1 + 1e-9)


@st.composite
def small_jobs(draw: st.DrawFn) -> dict[str, Any]:
    """A job with few possibilities: tiny windows, 1 to 4 GPUs."""
    window, motion = draw(st.sampled_from([(9, 1), (13, 5), (17, 5), (21, 9), (17, 6)]))
    overlap = draw(st.integers(motion, window - 1))
    interior = max(1, math.ceil((2 * overlap - motion) / (window - motion)))
    cap = draw(st.integers(1 if interior == 1 else 2 * interior, 2 * interior + 5))
    speeds = draw(
        st.one_of(
            st.integers(1, 4).map(lambda count: [1.0] * count),
            st.lists(st.sampled_from([0.25, 0.3, 0.5, 0.7, 1.0, 1.1]), min_size=1, max_size=4),
        )
    )
    return {
        "total_frames": draw(st.integers(100, 170)),
        "gpu_count": len(speeds),
        "speeds": speeds,
        "window": window,
        "motion": motion,
        draw(st.sampled_from(["min_overlap", "overlap_frames"])): overlap,
        "max_windows": cap,
        "partial_windows": draw(st.booleans()),
    }


class Brute:
    """All sets of chains: by dynamic programming over every chain that there is, in units of a latent."""

    def __init__(self, job: dict[str, Any], most_units: int) -> None:
        window, motion = job["window"], job["motion"]
        self.overlap = job.get("overlap_frames") or job["min_overlap"]
        self.frames, full = job["total_frames"], latents(window)
        chains = set()
        for count in range(1, job["max_windows"] + 1):
            length = window + (count - 1) * (window - motion)
            chains.add((count * full, length))
            if job["partial_windows"] and count < job["max_windows"]:
                chains |= {
                    (count * full + latents(last), length + last - motion)
                    for last in range(motion + 1, window)
                    if last % 4 == 1
                }
        # best[n, s, u]: most frames of n chains, s of them too short for two seams, that cost u units.
        most = most_units // full
        self.best = np.full((most + 1, 3, most_units + 1), -(10**6))
        self.best[0, 0] = 0
        for n, s, (units, length) in product(range(1, most + 1), range(3), chains):
            before = s - (length < 2 * self.overlap)
            if before >= 0 and units <= most_units:
                longer = self.best[n - 1, before, : most_units + 1 - units] + length
                np.maximum(self.best[n, s, units:], longer, out=self.best[n, s, units:])

    def fewest(self, units: list[int]) -> int | None:
        """Fewest segments that cover the job when lane ``i`` may use ``units[i]``; None if none do."""
        total = {(0, 0): 0}
        for lane in units:
            merged: dict[tuple[int, int], int] = {}
            options = [
                (n, s, int(length)) for (n, s), length in np.ndenumerate(self.best[:, :, lane]) if length >= 0
            ]
            for ((n, s), length), (more, shorts, extra) in product(total.items(), options):
                if s + shorts <= 2:
                    key = (n + more, s + shorts)
                    merged[key] = max(merged.get(key, 0), length + extra)
            total = merged
        lengths = ((n, length - (n - 1) * self.overlap) for (n, _), length in total.items() if n)
        return min((n for n, length in lengths if length >= self.frames), default=None)


@EXAMPLES
@given(small_jobs())
@example(  # 0.3 as a float is a little less than 3/10, which must not cost a window
    {
        "total_frames": 185,
        "gpu_count": 4,
        "speeds": [0.3, 1.5, 0.5, 0.75],
        "window": 9,
        "motion": 7,
        "max_windows": 10,
        "partial_windows": True,
        "overlap_frames": 7,
    }
)
def test_makespan_and_segments_equal_brute_force(job: dict[str, Any]) -> None:
    """No set of chains is faster, and none as fast has fewer segments."""
    plan = calculate_segments(**job)
    check(plan, job.get("overlap_frames") or job["min_overlap"], job["max_windows"])
    speeds = [Fraction(str(speed)) for speed in job["speeds"]]
    load: Counter[int] = Counter()
    for s in plan.segments:
        load[s.gpu] += sum(map(latents, s.windows))
    least = max(units / speeds[gpu] for gpu, units in load.items())
    before = max((math.ceil(least * speed) - 1) / speed for speed in speeds)
    brute = Brute(job, int(least * max(speeds)))
    assert brute.fewest([int(least * speed) for speed in speeds]) == len(plan.segments)
    assert brute.fewest([int(before * speed) for speed in speeds]) is None


@EXAMPLES
@given(small_jobs())
def test_no_overlap_can_be_wider_and_no_window_can_go(job: dict[str, Any]) -> None:
    """One frame more of overlap would cost time or a segment; one window less would break an overlap."""
    plan = calculate_segments(**job)
    stride = plan.window - plan.motion
    lengths = [s.rendered for s in plan.segments]
    assert surplus(plan) < stride
    if "overlap_frames" in job:
        overlap = job["overlap_frames"]
        spare = sum(lengths) - (len(lengths) - 1) * overlap - plan.total_frames
        for s in plan.segments:
            inner = 0 < s.index < len(lengths) - 1
            gain = s.windows[-1] - plan.motion
            assert len(s.windows) == 1 or gain > spare or (inner and s.rendered - gain < 2 * overlap)
    elif plan.overlaps and min(plan.overlaps) < plan.window - 1:
        wider = {key: value for key, value in job.items() if key != "min_overlap"}
        wider |= {"overlap_frames": min(plan.overlaps) + 1, "max_windows": job["max_windows"]}
        try:
            other = calculate_segments(**wider)
        except InvalidRequest:  # a cap that is too low for the wider overlap
            return
        assert (other.makespan(job["speeds"]), len(other.segments)) > (
            plan.makespan(job["speeds"]),
            len(plan.segments),
        )


@EXAMPLES
@given(st.integers(1, 100_000), st.integers(1, 9))
def test_one_chain_has_no_seam(frames: int, gpus: int) -> None:
    """Without a bound all is one segment on one GPU, as the planner makes it for one GPU without a cap."""
    plan = chain_segments(frames, gpus)
    check(plan, MIN_OVERLAP, frames)
    assert len(plan.segments) == 1
    assert plan.makespan() == pytest.approx(plan.single)
    assert plan.segments == calculate_segments(frames, 1, max_windows=10**6).segments


@EXAMPLES
@given(st.integers(1, 20_000), st.integers(1, 9), st.integers(81, 4000), st.integers(9, 80))
def test_chains_are_bounded_and_few(frames: int, gpus: int, longest: int, overlap: int) -> None:
    """No chain is longer, one chain fewer could not cover the video, and all GPUs have their share."""
    if max(81, 2 * overlap) > longest - 3 and frames > longest:
        return
    plan = chain_segments(frames, gpus, max_frames=longest, overlap_frames=overlap)
    check(plan, overlap, frames)
    count = len(plan.segments)
    assert all(s.frames <= longest for s in plan.segments)
    assert count == 1 or (count - 1) * (longest - 3 - overlap) < frames - overlap
    per_gpu = Counter(s.gpu for s in plan.segments)
    assert max(per_gpu.values()) - min(per_gpu.get(gpu, 0) for gpu in range(min(gpus, count))) <= 1


def test_chains_too_short_for_their_seams_are_refused() -> None:
    """The bound has to leave room for two overlaps; the message says which one would do."""
    assert [s.gpu for s in chain_segments(1000, 2, max_frames=400).segments] == [0, 1, 0]
    with pytest.raises(InvalidRequest, match=r"max_chain_seconds: must be at least 6\.44 s"):
        chain_segments(1000, 2, max_frames=150, overlap_frames=80)
    with pytest.raises(InvalidRequest, match="overlap_frames"):
        chain_segments(1000, 2, overlap_frames=81)
