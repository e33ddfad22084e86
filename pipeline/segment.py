"""One segment on one engine: window after window, each continuing from the last frames of the one before.

A window is one prompt: it is the unit of progress and of cancelling, and a chain of windows in one graph
would cost memory quadratically in ComfyUI.  How to talk to the engine is in ``comfy_client``, how frames
become files in ``segment_files``.  No Ray, no planning.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from pipeline import motion_frames
from pipeline.comfy_client import ComfyClient
from pipeline.comfy_events import PromptProgress
from pipeline.errors import GraphError
from pipeline.frame_shelf import Discard, FrameShelf, count_nodes, upload, window_seed
from pipeline.messages import NodeRuns, SegmentProgress, SegmentTask
from pipeline.segment_files import SegmentFiles, SegmentWriter

Report = Callable[[SegmentProgress], None]


def render_segment(
    task: SegmentTask,
    client: ComfyClient,
    folder: Path,
    *,
    report: Report,
    discard: Discard,
    cancelled: threading.Event,
    silent_after: float,
) -> tuple[SegmentFiles, tuple[float, ...], dict[str, NodeRuns]]:
    """Render every window of ``task`` into ``folder``: the files, the seconds of each window, what ran.

    While the engine samples the next window, the frames of the last one are fetched and encoded.
    Raises ``GraphError``, ``EngineError``, ``JobCancelled``, ``MediaError``, ``StorageError``.
    """
    attempt = uuid.uuid4().hex[:8]
    recipe = task.recipe
    body = task.frames - task.head - task.tail
    seconds: list[float] = []
    nodes: dict[str, NodeRuns] = {}
    last_seen = PromptProgress("")

    def following(seen: PromptProgress) -> None:
        nonlocal last_seen
        last_seen = seen
        report(SegmentProgress(task.index, len(seconds), seen.fraction, tuple(seconds)))

    report(SegmentProgress(task.index, 0, 0.0, ()))
    with (
        SegmentWriter(folder, task.head, body, task.tail, recipe.width, recipe.height) as writer,
        ThreadPoolExecutor(1, thread_name_prefix="frames") as background,
    ):
        shelf = FrameShelf(client, writer, task, discard)
        storing: Future[None] | None = None
        motion: str | None = None
        for window, length in enumerate(task.windows):
            began = time.monotonic()
            graph = recipe.workflow.fill(
                {
                    **_more(client, task, window),
                    "portrait": upload(client, task.portraits[min(window, len(task.portraits) - 1)], "png"),
                    "speech": upload(client, task.speech[window], "wav"),
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
            count_nodes(nodes, graph, last_seen)
            files = outputs[recipe.workflow.slot_node("frames")]
            new = length if window == 0 else length - recipe.motion
            if len(files) != new:
                raise GraphError("frames", f"window {window} gave {len(files)} frames instead of {new}")
            if storing is not None:
                storing.result()
            late = files[-recipe.motion :]
            last = [shelf.fetch(file) for file in late]
            motion = (
                upload(client, motion_frames.pack(last), "png") if window + 1 < len(task.windows) else None
            )
            storing = background.submit(shelf.store, files[: -recipe.motion], late, last)
            seconds.append(time.monotonic() - began)
            report(SegmentProgress(task.index, len(seconds), 0.0, tuple(seconds)))
        if storing is not None:
            storing.result()
    return SegmentFiles.in_folder(folder), tuple(seconds), nodes


def _more(client: ComfyClient, task: SegmentTask, window: int) -> dict[str, object]:
    """Values for the slots that not every workflow has."""
    values = dict(task.recipe.presets)
    if task.recipe.workflow.has("context"):
        values |= {"context": task.context[window], "negative": task.recipe.negative}
    if task.speech_2:
        first, second = task.masks
        values |= {
            "speech_2": upload(client, task.speech_2[window], "wav"),
            "mask_1": upload(client, first, "png"),
            "mask_2": upload(client, second, "png"),
        }
    return values
