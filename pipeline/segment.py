"""One segment on one engine: window after window, each continuing from the last frames of the one before.

A window is one prompt: it is the unit of progress and of cancelling, and a chain of windows in one graph
would cost memory quadratically in ComfyUI.  A finished window leaves as a ``WindowCheckpoint``, and nothing
of it stays here, so that a chain can be of any length and be continued by anybody.  Its frames are in their
picture's colours by then, and these are what the next window continues, so that a drift does not add up.
How to talk to the engine is in ``comfy_client``, how frames become files in ``segment_files``.  No Ray, no
planning.
"""

from __future__ import annotations

import shutil
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from pipeline import motion_frames
from pipeline.comfy_answers import OutputFile
from pipeline.comfy_client import ComfyClient
from pipeline.comfy_events import PromptProgress
from pipeline.errors import GraphError
from pipeline.frame_shelf import Discard, FrameShelf, count_nodes, picture_of, upload, window_seed
from pipeline.messages import NodeRuns, SegmentProgress, SegmentTask, WindowCheckpoint
from pipeline.segment_files import Frame, SegmentFiles, SegmentWriter

Report = Callable[[SegmentProgress], None]
Keep = Callable[[WindowCheckpoint], None]


def render_segment(
    task: SegmentTask,
    client: ComfyClient,
    folder: Path,
    *,
    report: Report,
    discard: Discard,
    cancelled: threading.Event,
    silent_after: float,
    keep: Keep,
) -> tuple[tuple[float, ...], dict[str, NodeRuns]]:
    """Render the windows of ``task``, each of which goes to ``keep``: the seconds of each window, what ran.

    While the engine samples the next window, the frames of the last one are fetched and encoded, in
    ``folder``, where nothing stays.
    Raises ``GraphError``, ``EngineError``, ``JobCancelled``, ``MediaError``, ``StorageError``.
    """
    attempt = uuid.uuid4().hex[:8]
    recipe = task.recipe
    shelf = FrameShelf(client, task, discard)
    parts = window_parts(task)
    motion: bytes | None = None if task.motion is None else task.motion.tobytes()
    seconds: list[float] = []
    nodes: dict[str, NodeRuns] = {}
    last_seen = PromptProgress("")

    def following(seen: PromptProgress) -> None:
        nonlocal last_seen
        last_seen = seen
        tell(seen.fraction)

    def tell(fraction: float) -> None:
        report(SegmentProgress(task.index, task.first + len(seconds), fraction, tuple(seconds)))

    tell(0.0)
    with ThreadPoolExecutor(1, thread_name_prefix="frames") as background:
        storing: Future[None] | None = None
        for number in range(len(task.speech)):
            window = task.first + number
            length = task.windows[window]
            portrait = task.portraits[min(number, len(task.portraits) - 1)]
            began = time.monotonic()
            graph = recipe.workflow.fill(
                {
                    **_more(client, task, number),
                    "portrait": upload(client, portrait, "png"),
                    "speech": upload(client, task.speech[number], "wav"),
                    "motion": None if motion is None else upload(client, motion, "png"),
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
            early, late = files[: -recipe.motion], files[-recipe.motion :]
            known = [shelf.fetch(file) for file in late]
            colours = shelf.colours([picture_of(portrait)] * new, partial(_frame_of, shelf, early, known))
            last = [colours.corrected(t, frame) for t, frame in enumerate(known, len(early))]
            motion = motion_frames.pack(last) if window + 1 < len(task.windows) else None
            store = partial(shelf.store, early=early, late=late, last=last, colours=colours)
            storing = background.submit(_finish, task, window, parts[window], store, folder, motion, keep)
            seconds.append(time.monotonic() - began)
            tell(0.0)
        if storing is not None:
            storing.result()
    return tuple(seconds), nodes


def _frame_of(shelf: FrameShelf, early: list[OutputFile], known: list[Frame], t: int) -> Frame:
    return known[t - len(early)] if t >= len(early) else shelf.fetch(early[t])


def rest(task: SegmentTask, done: WindowCheckpoint) -> SegmentTask:
    """The task without the windows up to ``done``."""
    windows = done.window + 1 - task.first
    return replace(
        task,
        first=done.window + 1,
        motion=done.motion,
        portraits=task.portraits if len(task.portraits) == 1 else task.portraits[windows:],
        speech=task.speech[windows:],
        context=task.context[windows:],
        speech_2=task.speech_2[windows:],
    )


def window_parts(task: SegmentTask) -> list[tuple[int, int, int]]:
    """New frames of each window of the segment that belong to its head, its body and its tail."""
    tail = task.frames - task.tail
    parts, stop = [], 0
    for window, length in enumerate(task.windows):
        start = stop
        stop = min(task.frames, start + length - (task.recipe.motion if window else 0))
        bounds = [min(max(start, edge), stop) for edge in (0, task.head, tail, task.frames)]
        parts.append((bounds[1] - bounds[0], bounds[2] - bounds[1], bounds[3] - bounds[2]))
    return parts


def _finish(
    task: SegmentTask,
    window: int,
    parts: tuple[int, int, int],
    store: Callable[[SegmentWriter], None],
    folder: Path,
    motion: bytes | None,
    keep: Keep,
) -> None:
    """Make a window's files, and hand them on."""
    with SegmentWriter(folder, *parts, task.recipe.width, task.recipe.height) as writer:
        store(writer)
    last = None if motion is None else np.frombuffer(motion, np.uint8)
    keep(WindowCheckpoint(task.index, window, SegmentFiles.in_folder(folder).to_arrays(), last))
    shutil.rmtree(folder)


def _more(client: ComfyClient, task: SegmentTask, window: int) -> dict[str, object]:
    """Values for the slots that not every workflow has; ``window`` counts those of this task."""
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
