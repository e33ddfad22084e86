"""The pool: one renderer for each lane (GPU), replaced when it is lost.

Where Ray's errors become ours, once.  Which segment goes where is ``pipeline.dispatch``'s decision.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError

from actors.renderer import RendererActor
from pipeline.dispatch import Lanes
from pipeline.errors import ConfigurationError, EngineError, PipelineError, RendererLost
from pipeline.messages import (
    RenderedSegment,
    RendererInfo,
    SegmentProgress,
    SegmentTask,
    WindowCheckpoint,
)
from pipeline.settings import Settings

PROGRESS_SECONDS = 2.0
CANCEL_SECONDS = 5.0
STOP_SECONDS = 8.0
SCHEDULING_SECONDS = 60.0
"""How long Ray may take to find a GPU for a renderer, on top of the engine's own time to start."""

log = logging.getLogger(__name__)


class RendererPool:
    """Implements ``pipeline.dispatch.Renderers``; ``close`` leaves no process behind."""

    def __init__(self, lanes: int, settings: Settings, gpus_each: int = 1) -> None:
        self._settings, self._gpus_each = settings, gpus_each
        self._patience = settings.ready_seconds + SCHEDULING_SECONDS
        self._slots = {lane: self._spawn(lane) for lane in range(lanes)}
        self._work: dict[int, Future[RenderedSegment]] = {}  # by lane
        self._settling = ThreadPoolExecutor(1, thread_name_prefix="settling")

    def _spawn(self, lane: int) -> _Slot:
        renderer = RendererActor.options(num_gpus=self._gpus_each).remote(lane, self._settings)
        return _Slot(renderer, renderer.start.remote(), time.monotonic() + self._patience)

    def start(self) -> Sequence[RendererInfo]:
        """Wait until the engines answer; who the renderers are.

        A lane that can't start is left out and told in the log; raises its error when it is the last.
        """
        ray.wait(
            [slot.starting for slot in self._slots.values()],
            num_returns=len(self._slots),
            timeout=self._patience,
        )
        infos: list[RendererInfo] = []
        errors: list[PipelineError] = []
        for lane, slot in self._slots.items():
            found = self._outcome(lane, slot)
            if isinstance(found, RendererInfo):
                infos.append(found)
            else:
                errors.append(
                    found or ConfigurationError(f"GPU {lane} was not free within {self._patience:.0f} s")
                )
        if not infos:
            raise errors[0]
        for error in errors:
            log.warning("a GPU is left out: %s", error)
        return infos

    def _outcome(self, lane: int, slot: _Slot) -> RendererInfo | PipelineError | None:
        """How the start of a renderer ended; None while it goes on."""
        if not ray.wait([slot.starting], timeout=0)[0]:
            return None
        try:
            info: RendererInfo = ray.get(slot.starting)
        except RayError as error:
            return _ours(error, f"the renderer of GPU {lane}")
        return info

    def lanes(self) -> Lanes:
        """Lanes whose engine answers; those still starting count as long as they may take for it."""
        outcomes = {lane: self._outcome(lane, slot) for lane, slot in self._slots.items()}
        now = time.monotonic()
        return Lanes(
            ready=frozenset(lane for lane, found in outcomes.items() if isinstance(found, RendererInfo)),
            starting=frozenset(
                lane for lane, found in outcomes.items() if found is None and now < self._slots[lane].deadline
            ),
        )

    def trouble(self) -> str | None:
        """Why the first of the lanes that could not be started could not."""
        outcomes = (self._outcome(lane, slot) for lane, slot in self._slots.items())
        return next((str(found) for found in outcomes if isinstance(found, PipelineError)), None)

    def submit(self, task: SegmentTask, lane: int) -> Future[RenderedSegment]:
        """Render on a lane.  A lost renderer is replaced, and the future fails with ``RendererLost``."""
        slot = self._slots[lane]
        result: Future[RenderedSegment] = Future()
        self._work[lane] = result

        def settle(rays: Future[RenderedSegment]) -> None:
            # Whatever happens here, somebody waits for the result.
            try:
                error = rays.exception()
                self._work.pop(lane, None)  # or the last result stays in the object store
                if error is None:
                    result.set_result(rays.result())
                    return
                ours = _ours(error, f"the renderer of GPU {lane}")
                if isinstance(ours, EngineError):
                    self._replace(lane, slot)
                    ours = RendererLost(task.index, str(ours))
                result.set_exception(ours)
            except BaseException as trouble:
                result.set_exception(RendererLost(task.index, f"GPU {lane}: {trouble}"))
                raise

        def hand_over(rays: Future[RenderedSegment]) -> None:
            # Ray calls back on a thread of its core: a call into Ray from there waits for itself.
            with contextlib.suppress(RuntimeError):  # closed meanwhile: nobody waits for the result
                self._settling.submit(settle, rays)

        slot.renderer.render.remote(task).future().add_done_callback(hand_over)
        return result

    def _replace(self, lane: int, lost: _Slot) -> None:
        if self._slots[lane] is lost:
            ray.kill(lost.renderer)
            self._slots[lane] = self._spawn(lane)

    def progress(self) -> Sequence[SegmentProgress]:
        """What the busy renderers say; one that does not answer is left out."""
        asked = [self._slots[lane].renderer.progress.remote() for lane in list(self._work)]
        answers, _ = ray.wait(asked, num_returns=len(asked), timeout=PROGRESS_SECONDS) if asked else ([], [])
        seen: list[SegmentProgress] = []
        for answer in answers:
            try:
                progress = ray.get(answer)
            except RayError:
                continue  # its render call fails too, and tells why
            if progress is not None:
                seen.append(progress)
        return seen

    def windows(self, lane: int, segment: int, first: int) -> Sequence[WindowCheckpoint]:
        """Finished windows of the segment in work on a lane; none where its renderer does not answer."""
        if lane not in self._work:
            return ()
        asked = self._slots[lane].renderer.windows.remote(segment, first)
        try:
            found: Sequence[WindowCheckpoint] = ray.get(asked, timeout=PROGRESS_SECONDS)
        except RayError:
            return ()  # its render call fails too, and tells why
        return found

    def cancel(self) -> None:
        """Interrupt the engines in work and wait for them, a few seconds at most."""
        busy = dict(self._work)
        for lane in busy:
            self._slots[lane].renderer.cancel.remote()
        _, late = wait(busy.values(), timeout=CANCEL_SECONDS)
        for lane, work in busy.items():
            if work in late:
                log.warning("GPU %d did not stop within %g s; its engine is ended", lane, CANCEL_SECONDS)
                self._replace(lane, self._slots[lane])

    def close(self) -> None:
        """End all engines and renderers."""
        self._settling.shutdown(wait=True, cancel_futures=True)
        stopping = [slot.renderer.stop.remote() for slot in self._slots.values()]
        ray.wait(stopping, num_returns=len(stopping), timeout=STOP_SECONDS)
        for slot in self._slots.values():
            ray.kill(slot.renderer)


@dataclass(frozen=True, slots=True)
class _Slot:
    """One lane's renderer, its start that is under way or over, and until when it may take."""

    renderer: Any
    starting: Any
    deadline: float


def _ours(error: BaseException, who: str) -> PipelineError:
    """Ray's error as one of ours: what the actor raised, or ``EngineError`` for a lost actor."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, PipelineError):
            return cause
        log.error("%s failed in a way that nobody foresaw", who, exc_info=error)
        return PipelineError(f"{who}: {type(cause).__name__}: {cause}")
    if isinstance(error, RayActorError | ObjectLostError | GetTimeoutError):
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return EngineError(f"{who} is gone: {first_line}")
    return PipelineError(f"{who}: {type(error).__name__}: {error}")
