"""One segment on one engine: window after window, each continuing from the last frames of the one before.

A window is one prompt: it is the unit of progress and of cancelling, and a chain of windows in one graph
would cost memory quadratically in ComfyUI.  How to talk to the engine is in ``comfy_client``, how frames
become files in ``segment_files``.  No Ray, no planning.
"""

from __future__ import annotations

import hashlib
import io
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline import motion_frames
from pipeline.comfy_answers import OutputFile
from pipeline.comfy_client import ComfyClient
from pipeline.comfy_events import PromptProgress
from pipeline.errors import EngineError, GraphError
from pipeline.messages import SegmentProgress, SegmentTask
from pipeline.segment_files import Frame, SegmentFiles, SegmentWriter

Report = Callable[[SegmentProgress], None]
Discard = Callable[[list[OutputFile]], None]


def window_seed(job_seed: int, segment: int, window: int) -> int:
    """The sampler's seed of one window: different in every segment, the same in every attempt.

    With one seed for all, segments would open with the same motion (equal noise on an equal picture).

    >>> window_seed(1, 0, 0) != window_seed(1, 1, 0)
    True
    """
    digest = hashlib.sha256(f"{job_seed}/{segment}/{window}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def render_segment(
    task: SegmentTask,
    client: ComfyClient,
    folder: Path,
    *,
    report: Report,
    discard: Discard,
    cancelled: threading.Event,
    silent_after: float,
) -> tuple[SegmentFiles, tuple[float, ...]]:
    """Render every window of ``task`` into ``folder``; the files and the seconds of each window.

    While the engine samples the next window, the frames of the last one are fetched and encoded.
    Raises ``GraphError``, ``EngineError``, ``JobCancelled``, ``MediaError``, ``StorageError``.
    """
    attempt = uuid.uuid4().hex[:8]
    recipe = task.recipe
    body = task.frames - task.head - task.tail
    seconds: list[float] = []

    def following(seen: PromptProgress) -> None:
        report(SegmentProgress(task.index, len(seconds), seen.fraction, tuple(seconds)))

    report(SegmentProgress(task.index, 0, 0.0, ()))
    with (
        SegmentWriter(folder, task.head, body, task.tail, recipe.width, recipe.height) as writer,
        ThreadPoolExecutor(1, thread_name_prefix="frames") as background,
    ):
        shelf = _Shelf(client, writer, task, discard)
        storing: Future[None] | None = None
        motion: str | None = None
        for window, length in enumerate(task.windows):
            began = time.monotonic()
            graph = recipe.workflow.fill(
                {
                    "portrait": _upload(client, task.portraits[min(window, len(task.portraits) - 1)], "png"),
                    "speech": _upload(client, task.speech[window], "wav"),
                    "motion": motion,
                    "prompt": recipe.prompt,
                    "seed": window_seed(recipe.seed, task.index, window),
                    "width": recipe.width,
                    "height": recipe.height,
                    "length": length,
                    "frames": f"{recipe.job}/s{task.index:04d}-{attempt}/w{window:03d}",
                    "steps": recipe.steps,
                }
            )
            outputs = client.run(
                graph, on_progress=following, cancelled=cancelled, silent_after=silent_after, job=recipe.job
            )
            files = outputs[recipe.workflow.slot_node("frames")]
            new = length if window == 0 else length - recipe.motion
            if len(files) != new:
                raise GraphError("frames", f"window {window} gave {len(files)} frames instead of {new}")
            if storing is not None:
                storing.result()
            late = files[-recipe.motion :]
            last = [shelf.fetch(file) for file in late]
            motion = (
                _upload(client, motion_frames.pack(last), "png") if window + 1 < len(task.windows) else None
            )
            storing = background.submit(shelf.store, files[: -recipe.motion], late, last)
            seconds.append(time.monotonic() - began)
            report(SegmentProgress(task.index, len(seconds), 0.0, tuple(seconds)))
        if storing is not None:
            storing.result()
    return SegmentFiles.in_folder(folder), tuple(seconds)


class _Shelf:
    """Takes frames out of the engine and puts them, in order, into the segment's files."""

    def __init__(
        self, client: ComfyClient, writer: SegmentWriter, task: SegmentTask, discard: Discard
    ) -> None:
        self._client, self._writer, self._discard = client, writer, discard
        self._left = task.frames
        self._shape = (task.recipe.height, task.recipe.width, 3)

    def fetch(self, file: OutputFile) -> Frame:
        """One decoded frame."""
        try:
            with Image.open(io.BytesIO(self._client.view(file))) as picture:
                frame = np.asarray(picture.convert("RGB"))
        except (OSError, SyntaxError) as error:
            raise EngineError(
                f"the engine gave a frame that is no picture: {file['filename']}: {error}"
            ) from None
        if frame.shape != self._shape:
            raise GraphError(
                "frames",
                f"a frame is {frame.shape[1]}x{frame.shape[0]}, not {self._shape[1]}x{self._shape[0]}",
            )
        return frame

    def store(self, early: list[OutputFile], late: list[OutputFile], last: list[Frame]) -> None:
        """Write a window: ``early`` is still to be fetched, ``last`` are the frames of ``late``."""
        for file in early:
            self._write(self.fetch(file))
        for frame in last:
            self._write(frame)
        self._discard(early + late)

    def _write(self, frame: Frame) -> None:
        if self._left:  # the last window may be longer than what is left of the segment
            self._writer.write(frame)
            self._left -= 1


def _upload(client: ComfyClient, content: bytes, suffix: str) -> str:
    """Give a file to the engine under a name made of its content; what is there already stays."""
    return client.upload(f"{hashlib.sha256(content).hexdigest()[:24]}.{suffix}", content)
