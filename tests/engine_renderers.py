"""Lanes without Ray: threads that render on one running engine, one segment at a time each."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from pipeline.comfy_client import ComfyClient
from pipeline.dispatch import Lanes
from pipeline.messages import (
    RenderedSegment,
    RendererInfo,
    SegmentProgress,
    SegmentTask,
    WindowCheckpoint,
)
from pipeline.segment import render_segment


class EngineRenderers:
    """What ``render_all`` asks for."""

    def __init__(self, url: str, lanes: int, threads: ThreadPoolExecutor) -> None:
        self._url, self._lanes, self._threads = url, lanes, threads
        self._stop = threading.Event()
        self.seeds: list[int] = []

    def start(self, tick: Callable[[], None]) -> Sequence[RendererInfo]:
        word = "here"
        return [
            RendererInfo(lane, word, "draft", word, word, 0, 0, 0, 0, word, 0.0)
            for lane in range(self._lanes)
        ]

    def lanes(self) -> Lanes:
        return Lanes(frozenset(range(self._lanes)))

    def submit(self, task: SegmentTask, lane: int) -> Future[RenderedSegment]:
        return self._threads.submit(self._render, task, lane)

    def _render(self, task: SegmentTask, lane: int) -> RenderedSegment:
        windows: list[WindowCheckpoint] = []
        with tempfile.TemporaryDirectory() as folder:
            seconds, nodes = render_segment(
                task,
                ComfyClient(self._url),
                Path(folder) / "window",
                report=lambda _: None,
                discard=lambda _: None,
                cancelled=self._stop,
                silent_after=30,
                keep=windows.append,
            )
        return RenderedSegment(
            index=task.index,
            lane=lane,
            node="here",
            attempt=task.attempt,
            windows=tuple(windows),
            window_seconds=seconds,
            nodes=dict(nodes),
            left=len(task.windows) - task.first - len(seconds),
        )

    def want(self, count: int, avoid: frozenset[int]) -> None:
        pass

    def arrival(self) -> Future[None]:
        return Future()

    def windows(self, lane: int, segment: int, first: int) -> Sequence[WindowCheckpoint]:
        return ()

    def progress(self) -> Sequence[SegmentProgress]:
        return ()

    def cancel(self, lane: int | None = None) -> None:
        self._stop.set()


def engine_renderers(url: str, lanes: int = 2) -> Callable[[], AbstractContextManager[EngineRenderers]]:
    """What ``render_video`` opens."""

    @contextmanager
    def opened() -> Iterator[EngineRenderers]:
        with ThreadPoolExecutor(lanes) as threads:
            yield EngineRenderers(url, lanes, threads)

    return opened
