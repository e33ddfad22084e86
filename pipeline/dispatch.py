"""Mapping segments to renderers: which goes where, another try after a loss, and when to give up.

Renderers are behind a protocol, so this runs with Ray actors and, in tests, with threads.  What happens to
a finished segment is ``render``'s business.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pipeline.errors import JobCancelled, PipelineError, RendererLost, RenderFailed, StorageError
from pipeline.messages import (
    RenderedSegment,
    RendererInfo,
    SegmentProgress,
    SegmentTask,
    WindowCheckpoint,
)
from pipeline.plan import Segment

TICK_SECONDS = 0.25
"""How often progress is asked for while nothing finishes."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Lanes:
    """The state of a pool: lanes that can take a segment now, and lanes that may come.

    Those that may come are being started, or are in use: by this job or by others.
    """

    ready: frozenset[int]
    coming: frozenset[int] = frozenset()


class Renderers(Protocol):
    """Lanes of a pool that others use too; a lane whose renderer is lost gets a new one."""

    def start(self, tick: Callable[[], None]) -> Sequence[RendererInfo]:
        """Wait until the engines answer; one entry for each lane that has one.

        ``tick`` is called meanwhile, and may raise.
        """

    def lanes(self) -> Lanes:
        """Which lanes can take a segment now, and which may come back."""

    def want(self, count: int, avoid: frozenset[int]) -> None:
        """So many lanes could be used now, none of ``avoid``; idle ones beyond that may go to others."""

    def arrival(self) -> Future[None]:
        """Done as soon as there is another lane."""

    def submit(self, task: SegmentTask, lane: int) -> Future[RenderedSegment]:
        """Render on a lane, which is given back then; ``RendererLost`` where another try makes sense."""

    def progress(self) -> Sequence[SegmentProgress]:
        """How far the segments in work are."""

    def windows(self, lane: int, segment: int, first: int) -> Sequence[WindowCheckpoint]:
        """Finished windows of the segment in work on a lane, from ``first`` on; those before are let go."""

    def cancel(self, lane: int | None = None) -> None:
        """Stop what is in work (on one lane), and wait for it."""


@dataclass(frozen=True, slots=True)
class _Attempt:
    segment: Segment
    number: int = 1
    lost_on: frozenset[int] = frozenset()
    second: bool = False
    """It is rendered elsewhere already; whichever is done first counts."""


Held = Sequence[tuple[int, int]]
"""Segments in work, each with its lane; a segment may be there twice."""


def render_all(
    segments: Sequence[Segment],
    task_for: Callable[[Segment, int], SegmentTask],
    renderers: Renderers,
    max_attempts: int,
    tick: Callable[[Held], Iterable[int]],
    planned: Sequence[int] = (),
    sent: Callable[[SegmentTask, int, Future[RenderedSegment]], None] = lambda *_: None,
) -> Iterator[RenderedSegment]:
    """Yield tasks as they finish: longest segment first, each on its planned lane, or on any that comes.

    ``planned``: the lanes that the GPUs of the plan stand for.  ``sent`` hears of each task that goes out.
    A segment of which windows are left (``RenderedSegment.left``) goes on with another task.  One whose
    renderer is lost, or has no room on its disk, gets another try on another lane, ``max_attempts`` for each
    task; a lane that lost that many in a row is left alone.  Any other error ends the job: ``RenderFailed``
    with the segment and what its renderer said.  Whatever ends the iteration cancels what is still in work.

    ``tick`` gets the segments in work and their lanes several times a second, and says which of them are held
    up: when nothing waits, those are run a second time, once, and the slower run is cancelled.
    """
    lane_of = dict(enumerate(planned))
    waiting = [_Attempt(segment) for segment in segments]
    running: dict[Future[RenderedSegment], tuple[_Attempt, int]] = {}
    losses: Counter[int] = Counter()
    twice: set[int] = set()
    reason = "no engine answers"
    try:
        while waiting or running:
            state = renderers.lanes()
            busy = {lane for _, lane in running.values()}
            usable = frozenset(lane for lane in state.ready | state.coming if losses[lane] < max_attempts)
            for lane in sorted((usable & state.ready) - busy):
                if chosen := _choose(waiting, lane, usable, lane_of):
                    waiting.remove(chosen)
                    task = task_for(chosen.segment, chosen.number)
                    future = renderers.submit(task, lane)
                    running[future] = (chosen, lane)
                    sent(task, lane, future)
            renderers.want(len(waiting), _unwanted(waiting, state.ready | state.coming, usable))
            if not running and not usable:
                raise RenderFailed(waiting[0].segment.index, f"no renderer is left; {reason}")
            waited: set[Future[Any]] = {*running, renderers.arrival()}
            done, _ = wait(waited, timeout=TICK_SECONDS, return_when=FIRST_COMPLETED)
            slow = tick([(attempt.segment.index, lane) for attempt, lane in running.values()])
            if not any(not attempt.second for attempt in waiting):
                for attempt, _ in list(running.values()):
                    if attempt.segment.index in slow and attempt.segment.index not in twice:
                        twice.add(attempt.segment.index)
                        log.info("segment %d is held up, and run a second time", attempt.segment.index)
                        waiting.append(replace(attempt, number=1, second=True))
            for future in done & running.keys():
                if future not in running:
                    continue  # its twin was done first
                attempt, lane = running.pop(future)
                others = [other for other in running if running[other][0].segment is attempt.segment]
                try:
                    rendered = future.result()
                except (RendererLost, StorageError) as lost:  # a full disk is its node's alone
                    reason = lost.reason if isinstance(lost, RendererLost) else str(lost)
                    losses[lane] += 1
                    if others:
                        log.warning("segment %d lost one of its two runs: %s", attempt.segment.index, reason)
                    else:
                        waiting = [entry for entry in waiting if entry.segment is not attempt.segment]
                        waiting.append(_another_try(attempt, lane, lost, reason, max_attempts))
                except JobCancelled:
                    raise
                except PipelineError as error:
                    raise RenderFailed(attempt.segment.index, f"GPU {lane}: {error}") from error
                else:
                    losses[lane] = 0
                    yield rendered  # whose windows are stored then: the next task goes on from them
                    waiting = [entry for entry in waiting if entry.segment is not attempt.segment]
                    for other in others:
                        if not rendered.left:
                            renderers.cancel(running.pop(other)[1])
                    if rendered.left and not others:
                        waiting.append(_Attempt(attempt.segment))
    finally:
        if running:
            renderers.cancel()


def _choose(
    waiting: Sequence[_Attempt], lane: int, usable: frozenset[int], lane_of: dict[int, int]
) -> _Attempt | None:
    """The longest segment planned for this lane, else the longest of all.

    Not one that was lost here, unless it was lost on every lane that is left.
    """
    fit = [a for a in waiting if lane not in a.lost_on or usable <= a.lost_on]
    return max(
        fit,
        key=lambda a: (
            not a.second,
            lane_of.get(a.segment.gpu, a.segment.gpu) == lane,
            a.segment.rendered,
            -a.segment.index,
        ),
        default=None,
    )


def _unwanted(waiting: Sequence[_Attempt], lanes: frozenset[int], usable: frozenset[int]) -> frozenset[int]:
    """Lanes on which nothing that waits could be rendered."""
    return frozenset(
        lane
        for lane in lanes
        if lane not in usable
        or (waiting and all(lane in a.lost_on and not usable <= a.lost_on for a in waiting))
    )


def _another_try(
    attempt: _Attempt, lane: int, lost: RendererLost | StorageError, reason: str, max_attempts: int
) -> _Attempt:
    if attempt.number >= max_attempts:
        if isinstance(lost, StorageError):
            raise lost
        raise RenderFailed(attempt.segment.index, f"lost {attempt.number} renderers; {reason}") from lost
    log.warning(
        "segment %d lost its renderer and gets another try: %s",
        attempt.segment.index,
        reason,
        extra={"segment": attempt.segment.index, "gpu": lane, "attempt": attempt.number + 1},
    )
    return _Attempt(attempt.segment, attempt.number + 1, attempt.lost_on | {lane})
