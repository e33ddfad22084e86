"""The pool: one renderer for each lane (GPU), replaced when it is lost.

Where Ray's errors become ours, once.  Which segment goes where is ``pipeline.render``'s decision.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError

from actors.renderer import RendererActor
from pipeline.errors import EngineError, PipelineError, RendererLost
from pipeline.messages import RenderedSegment, RendererInfo, SegmentProgress, SegmentTask
from pipeline.settings import Settings

PROGRESS_SECONDS = 2.0
CANCEL_SECONDS = 5.0
STOP_SECONDS = 8.0

log = logging.getLogger(__name__)


class RendererPool:
    """Renderers of one job; ``close`` leaves no process behind.  Implements ``pipeline.render.Renderers``."""

    def __init__(self, lanes: int, settings: Settings) -> None:
        self._settings = settings
        self._renderers: list[Any] = [self._spawn(lane) for lane in range(lanes)]
        self._starting = [renderer.start.remote() for renderer in self._renderers]
        self._work: dict[int, tuple[int, Future[RenderedSegment]]] = {}  # by lane: segment, its future
        self._settling = ThreadPoolExecutor(1, thread_name_prefix="settling")

    def _spawn(self, lane: int) -> Any:
        return RendererActor.remote(lane, self._settings)

    def start(self) -> Sequence[RendererInfo]:
        """Wait until every engine answers; raises what the first failing one said."""
        infos: list[RendererInfo] = []
        for lane, reference in enumerate(self._starting):
            try:
                infos.append(ray.get(reference))
            except RayError as error:
                raise _ours(error, f"the renderer of GPU {lane}") from None
        return infos

    def submit(self, task: SegmentTask, lane: int) -> Future[RenderedSegment]:
        """Render on a lane.  A lost renderer is replaced, and the future fails with ``RendererLost``."""
        renderer = self._renderers[lane]
        result: Future[RenderedSegment] = Future()
        self._work[lane] = (task.index, result)

        def settle(rays: Future[RenderedSegment]) -> None:
            error = rays.exception()
            if error is None:
                result.set_result(rays.result())
                return
            ours = _ours(error, f"the renderer of GPU {lane}")
            if isinstance(ours, EngineError):
                self._replace(lane, renderer)
                ours = RendererLost(task.index, str(ours))
            result.set_exception(ours)

        def hand_over(rays: Future[RenderedSegment]) -> None:
            # Ray calls back on a thread of its core: a call into Ray from there waits for itself.
            with contextlib.suppress(RuntimeError):  # closed meanwhile: nobody waits for the result
                self._settling.submit(settle, rays)

        renderer.render.remote(task).future().add_done_callback(hand_over)
        return result

    def _replace(self, lane: int, lost: Any) -> None:
        if self._renderers[lane] is lost:
            ray.kill(lost)
            self._renderers[lane] = self._spawn(lane)
            self._starting[lane] = self._renderers[lane].start.remote()

    def progress(self) -> Sequence[SegmentProgress]:
        """What the busy renderers say; one that does not answer is left out."""
        asked = [
            self._renderers[lane].progress.remote()
            for lane, (_, work) in self._work.items()
            if not work.done()
        ]
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

    def cancel(self) -> None:
        """Interrupt the engines in work and wait for them, a few seconds at most."""
        busy = {lane: work for lane, (_, work) in self._work.items() if not work.done()}
        for lane in busy:
            self._renderers[lane].cancel.remote()
        for lane, work in busy.items():
            try:
                work.exception(timeout=CANCEL_SECONDS)
            except TimeoutError:
                log.warning("GPU %d did not stop within %g s; its engine is ended", lane, CANCEL_SECONDS)

    def close(self) -> None:
        """End all engines and renderers."""
        self._settling.shutdown(wait=True, cancel_futures=True)
        stopping = [renderer.stop.remote() for renderer in self._renderers]
        ray.wait(stopping, num_returns=len(stopping), timeout=STOP_SECONDS)
        for renderer in self._renderers:
            ray.kill(renderer)


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
