"""Mapping segments to renderers: order, another try, giving up; with threads in the renderers' place."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from pipeline.dispatch import Held, Lanes, render_all
from pipeline.errors import GraphError, JobCancelled, RendererLost, RenderFailed, StorageError
from pipeline.messages import RenderedSegment, RendererInfo, SegmentProgress, WindowCheckpoint
from pipeline.plan import Segment

Work = Callable[[int, int, int], None]
"""What a renderer does with (segment, attempt, lane); it raises what should go wrong."""


class ThreadRenderers:
    """Lanes that are threads; ``log`` tells who did what."""

    def __init__(self, work: Work, lanes: int) -> None:
        self._work = work
        self.state = Lanes(frozenset(range(lanes)))
        self._threads = ThreadPoolExecutor(8)
        self.log: list[tuple[int, int, int]] = []
        self.cancelled = threading.Event()
        self.cancelled_lanes: list[int] = []
        self.wanted: list[tuple[int, frozenset[int]]] = []
        self.windows_of_a_task = 20
        self.rendered: Counter[int] = Counter()

    def start(self, tick: Callable[[], None]) -> Sequence[RendererInfo]:
        return ()

    def lanes(self) -> Lanes:
        return self.state

    def submit(self, task: Any, lane: int) -> Future[RenderedSegment]:
        segment, attempt = task

        def run() -> RenderedSegment:
            self.log.append((segment.index, attempt, lane))
            self._work(segment.index, attempt, lane)
            self.rendered[segment.index] += self.windows_of_a_task
            left = max(0, len(segment.windows) - self.rendered[segment.index])
            return RenderedSegment(segment.index, lane, "here", attempt, (), (1.0,), {}, left)

        return self._threads.submit(run)

    def want(self, count: int, avoid: frozenset[int]) -> None:
        self.wanted.append((count, avoid))

    def arrival(self) -> Future[None]:
        return Future()

    def progress(self) -> Sequence[SegmentProgress]:
        return ()

    def windows(self, lane: int, segment: int, first: int) -> Sequence[WindowCheckpoint]:
        return ()

    def cancel(self, lane: int | None = None) -> None:
        if lane is None:
            self.cancelled.set()
        else:
            self.cancelled_lanes.append(lane)


def segments(*windows: int) -> list[Segment]:
    """Segments of so many windows, each planned for a lane of its own."""
    return [Segment(i, 100 * i, 100 * i + 120, (81,) * n, i) for i, n in enumerate(windows)]


def run(work: Work, parts: list[Segment], lanes: int, attempts: int = 3) -> tuple[list[int], ThreadRenderers]:
    renderers = ThreadRenderers(work, lanes)
    done = render_all(parts, lambda s, n: (s, n), renderers, attempts, lambda _: ())  # type: ignore[arg-type, return-value]
    return [rendered.index for rendered in done], renderers


def nothing(_segment: int, _attempt: int, _lane: int) -> None:
    """All goes well."""


def test_every_segment_is_rendered_once_on_its_planned_lane() -> None:
    """With a lane for each segment, the plan is followed."""
    indices, renderers = run(nothing, segments(2, 3, 1), lanes=3)
    assert sorted(indices) == [0, 1, 2]
    assert sorted(renderers.log) == [(0, 1, 0), (1, 1, 1), (2, 1, 2)]
    assert not renderers.cancelled.is_set()


def test_the_longest_segment_goes_first() -> None:
    """One lane takes its own segment first and then the longest of the others."""
    _, renderers = run(nothing, segments(2, 3, 5, 4), lanes=1)
    assert [segment for segment, _, _ in renderers.log] == [0, 2, 3, 1]


def test_an_idle_lane_takes_what_was_planned_for_another() -> None:
    """While lane 0 is busy with segment 0, lane 1 renders the rest."""
    rest_done = threading.Event()
    left = {1, 2, 3}

    def work(segment: int, _attempt: int, _lane: int) -> None:
        if segment == 0:
            assert rest_done.wait(10)
            return
        left.discard(segment)
        if not left:
            rest_done.set()

    parts = [Segment(i, 100 * i, 100 * i + 120, (81,), 0) for i in range(4)]
    _, renderers = run(work, parts, lanes=2)
    assert {lane for segment, _, lane in renderers.log if segment} == {1}


def test_a_lost_segment_gets_another_try_on_another_lane() -> None:
    """A renderer that is lost costs one attempt, and the next is elsewhere."""

    def work(segment: int, attempt: int, _lane: int) -> None:
        if segment == 1 and attempt == 1:
            raise RendererLost(1, "the engine died")

    indices, renderers = run(work, segments(1, 1), lanes=2)
    assert sorted(indices) == [0, 1]
    first, second = [lane for segment, _, lane in renderers.log if segment == 1]
    assert first != second


def test_a_long_segment_is_several_tasks_and_losses_count_for_each() -> None:
    """Five windows in tasks of two are three tasks; a loss in each of them ends nothing with two attempts."""

    def work(_segment: int, attempt: int, _lane: int) -> None:
        if attempt == 1:
            raise RendererLost(0, "bad luck")

    renderers = ThreadRenderers(work, 2)
    renderers.windows_of_a_task = 2
    done = render_all(segments(5), lambda s, n: (s, n), renderers, 2, lambda _: ())  # type: ignore[arg-type, return-value]
    assert [rendered.left for rendered in done] == [3, 1, 0]
    assert [attempt for _, attempt, _ in renderers.log] == [1, 2, 1, 2, 1, 2]


def test_attempts_are_bounded_and_the_last_reason_is_told() -> None:
    """A segment that loses every renderer ends the job with the reason, after max_attempts."""

    def work(segment: int, _attempt: int, _lane: int) -> None:
        if segment == 1:
            raise RendererLost(1, "out of luck")

    with pytest.raises(RenderFailed, match="segment 1 can't be rendered: lost 2 renderers; out of luck"):
        run(work, segments(1, 1), lanes=3, attempts=2)


def test_a_lane_that_loses_everything_is_left_alone() -> None:
    """A broken lane takes no more segments after max_attempts losses in a row; the others finish the job."""

    def work(segment: int, _attempt: int, lane: int) -> None:
        if lane == 0:
            raise RendererLost(segment, "broken GPU")

    indices, renderers = run(work, segments(1, 1, 1, 1, 1, 1), lanes=2, attempts=2)
    assert sorted(indices) == [0, 1, 2, 3, 4, 5]
    assert sum(lane == 0 for _, _, lane in renderers.log) == 2


def test_a_graph_error_ends_the_job_at_once() -> None:
    """What would end the same way again is not tried again; the rest is cancelled."""
    hold = threading.Event()

    def work(segment: int, _attempt: int, _lane: int) -> None:
        if segment == 0:
            raise GraphError("Sampler (KSampler)", "CUDA out of memory")
        hold.wait(10)

    renderers = ThreadRenderers(work, 2)
    done = render_all(segments(1, 1), lambda s, n: (s, n), renderers, 3, lambda _: ())  # type: ignore[arg-type, return-value]
    with pytest.raises(RenderFailed, match=r"segment 0 .*GPU 0: Sampler \(KSampler\): CUDA out of memory"):
        list(done)
    hold.set()
    assert renderers.cancelled.is_set()
    assert [entry for entry in renderers.log if entry[0] == 0] == [(0, 1, 0)]


@pytest.mark.parametrize("error", [StorageError("/x", "No space left on device"), RenderFailed(0, "x")])
def test_a_full_disk_is_told_as_it_is(error: Exception) -> None:
    """StorageError passes unchanged; other errors of ours name the segment."""

    def work(_segment: int, _attempt: int, _lane: int) -> None:
        raise error

    with pytest.raises(type(error)):
        run(work, segments(1), lanes=1)


def test_a_full_disk_of_one_node_is_not_the_others() -> None:
    """The segment gets another try on a lane of another node."""

    def work(_segment: int, _attempt: int, lane: int) -> None:
        if lane == 0:
            raise StorageError("/scratch", "No space left on device")

    indices, renderers = run(work, segments(1), lanes=2)
    assert indices == [0]
    assert [lane for _, _, lane in renderers.log] == [0, 1]


def test_a_cancelled_segment_cancels_the_job() -> None:
    """A renderer that was told to stop does not get its segment back."""

    def work(_segment: int, _attempt: int, _lane: int) -> None:
        raise JobCancelled("j")

    with pytest.raises(JobCancelled):
        run(work, segments(1), lanes=1)


def test_a_segment_lost_on_the_last_good_lane_is_tried_there_again() -> None:
    """Lane 0 is left alone after its losses; a single loss on lane 1 does not leave the segment nowhere."""
    lost_on_one = threading.Event()

    def work(segment: int, _attempt: int, lane: int) -> None:
        if lane == 0:
            raise RendererLost(segment, "broken GPU")
        if segment == 3 and not lost_on_one.is_set():
            lost_on_one.set()
            raise RendererLost(segment, "a crash")

    indices, _ = run(work, segments(1, 1, 1, 1), lanes=2, attempts=2)
    assert sorted(indices) == [0, 1, 2, 3]


def test_a_lane_that_is_starting_gets_nothing_yet() -> None:
    """A replaced renderer takes work when its engine answers; until then the other lane does it all."""
    renderers = ThreadRenderers(nothing, 2)
    renderers.state = Lanes(ready=frozenset({1}), coming=frozenset({0}))
    done = render_all(segments(1, 1, 1), lambda s, n: (s, n), renderers, 3, lambda _: ())  # type: ignore[arg-type, return-value]
    assert len(list(done)) == 3
    assert {lane for _, _, lane in renderers.log} == {1}


def test_waiting_for_a_lane_ends_with_it() -> None:
    """With nothing ready the job waits for what is starting, and fails when that has gone too."""
    renderers = ThreadRenderers(nothing, 1)
    renderers.state = Lanes(ready=frozenset(), coming=frozenset({0}))
    ticks = 0

    def tick(_: Held) -> Iterable[int]:
        nonlocal ticks
        ticks += 1
        if ticks == 3:
            renderers.state = Lanes(ready=frozenset())
        return ()

    with pytest.raises(RenderFailed, match="no renderer is left; no engine answers"):
        list(render_all(segments(1), lambda s, n: (s, n), renderers, 3, tick))  # type: ignore[arg-type, return-value]
    assert ticks == 3


def test_leaving_early_cancels_what_is_in_work() -> None:
    """Closing the iterator (Ctrl-C) stops the renderers."""
    hold = threading.Event()

    def work(segment: int, _attempt: int, _lane: int) -> None:
        if segment:
            hold.wait(10)

    renderers = ThreadRenderers(work, 2)
    done = render_all(segments(1, 1), lambda s, n: (s, n), renderers, 3, lambda _: ())  # type: ignore[arg-type, return-value]
    assert next(done).index == 0
    done.close()  # type: ignore[attr-defined]
    assert renderers.cancelled.is_set()
    hold.set()


def test_a_held_up_segment_is_run_twice_and_the_faster_run_counts() -> None:
    """Lane 0 is stuck: its segment is run a second time on lane 1, idle by then; lane 0 is cancelled."""
    stuck = threading.Event()

    def work(segment: int, _attempt: int, lane: int) -> None:
        if lane == 0:
            stuck.wait(10)
            raise JobCancelled("j")

    renderers = ThreadRenderers(work, 2)
    done = render_all(
        segments(2, 1), lambda s, n: (s, n), renderers, 3, lambda held: {index for index, _ in held}
    )  # type: ignore[arg-type, return-value]
    assert sorted(rendered.index for rendered in done) == [0, 1]
    stuck.set()
    assert sorted(renderers.log) == [(0, 1, 0), (0, 1, 1), (1, 1, 1)]
    assert renderers.cancelled_lanes == [0]
    assert not renderers.cancelled.is_set()


def test_a_second_run_that_is_lost_costs_nothing() -> None:
    """The first run goes on; no attempt is counted, and there is no third run."""
    second_lost = threading.Event()

    def work(segment: int, _attempt: int, lane: int) -> None:
        if segment == 0 and lane == 0:
            assert second_lost.wait(10)
        elif segment == 0:
            second_lost.set()
            raise RendererLost(0, "bad luck")

    renderers = ThreadRenderers(work, 2)
    done = render_all(
        segments(2, 1), lambda s, n: (s, n), renderers, 1, lambda held: {index for index, _ in held}
    )  # type: ignore[arg-type, return-value]
    assert sorted(rendered.index for rendered in done) == [0, 1]
    assert [entry for entry in renderers.log if entry[0] == 0] == [(0, 1, 0), (0, 1, 1)]


def test_a_lane_that_is_of_no_use_is_not_asked_for() -> None:
    """The lane on which the only segment was lost is avoided, as long as another may come."""

    def work(_segment: int, _attempt: int, lane: int) -> None:
        if lane == 0:
            raise RendererLost(0, "a crash")

    renderers = ThreadRenderers(work, 2)
    renderers.state = Lanes(ready=frozenset({0}), coming=frozenset({1}))

    def tick(held: Held) -> Iterable[int]:
        if (1, frozenset({0})) in renderers.wanted:
            renderers.state = Lanes(ready=frozenset({0, 1}))
        return ()

    done = render_all(segments(1), lambda s, n: (s, n), renderers, 3, tick)  # type: ignore[arg-type, return-value]
    assert [rendered.lane for rendered in done] == [1]
