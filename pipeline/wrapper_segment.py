"""One segment on one engine with the wrapper's nodes: one prompt, in which the node chains its own windows.

Other than in ``segment`` nothing is handed from window to window here, so a lost engine costs the segment.
How many frames and samples that means is explained in docs/workflows.md.  No Ray, no planning.
"""

from __future__ import annotations

import io
import json
import re
import threading
import time
import uuid
import wave
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pipeline import motion_frames
from pipeline.comfy_answers import OutputFile
from pipeline.comfy_client import ComfyClient
from pipeline.comfy_events import PromptProgress
from pipeline.errors import GraphError, JobCancelled, WorkflowError
from pipeline.frame_shelf import Discard, FrameShelf, count_nodes, picture_of, upload, window_seed
from pipeline.messages import NodeRuns, SegmentProgress, SegmentTask, WindowCheckpoint
from pipeline.segment import Report
from pipeline.segment_files import Frame, SegmentFiles, SegmentWriter
from pipeline.timeline import SAMPLES_PER_FRAME
from pipeline.workflow import Workflow

EXTRA_SAMPLES = 40
"""Samples past the last frame: 1 to 79 make the node's float arithmetic count exactly N frames, and give
wav2vec2 the 2N-1 features that are stretched to N without a shift."""

FETCHES = 4
"""Frames that are fetched and decoded at the same time, while the engine has nothing to do."""


def window_count(frames: int, window: int, motion: int) -> int:
    """Windows that the node renders for so many frames of speech; each is a whole one.

    >>> [window_count(frames, 81, 9) for frames in (1, 81, 82, 153, 154)]
    [1, 1, 2, 2, 3]
    """
    return 1 + max(0, -(-(frames - window) // (window - motion)))


def rendered_frames(windows: int, window: int, motion: int) -> int:
    """Frames that the node gives for so many windows, each frame once.

    >>> rendered_frames(3, 81, 9)
    225
    """
    return window + (windows - 1) * (window - motion)


def render_segment(
    task: SegmentTask,
    client: ComfyClient,
    folder: Path,
    *,
    report: Report,
    discard: Discard,
    cancelled: threading.Event,
    silent_after: float,
    keep: Callable[[WindowCheckpoint], None],
) -> tuple[tuple[float, ...], dict[str, NodeRuns]]:
    """Render ``task`` in ``folder`` and hand it to ``keep`` in one piece: seconds of each window, what ran.

    ``task.speech`` (and ``speech_2``) hold one WAV that begins with the segment and lasts for all frames of
    all windows; ``portraits`` one picture for all windows, or one for each.  Raises ``GraphError``,
    ``EngineError``, ``JobCancelled``, ``MediaError``, ``StorageError``, ``WorkflowError``.
    """
    recipe = task.recipe
    window, motion = _window(recipe.workflow)
    if motion != recipe.motion:
        raise WorkflowError(recipe.workflow.file, f"repeats {motion} frames, the plan {recipe.motion}")
    windows = window_count(task.frames, window, motion)
    total = rendered_frames(windows, window, motion)
    attempt = uuid.uuid4().hex[:8]
    clock = _Clock(task, recipe.workflow.slot_node("seed"), windows, total // (window - motion) + 1, report)
    graph = recipe.workflow.fill(
        {
            **dict(recipe.presets),
            **_second_speaker(client, task, total),
            "portrait": upload(client, _pictures(task, windows), "png"),
            # Under its own name: what ComfyUI still has of another attempt is spoilt (docs/workflows.md).
            "speech": client.upload(f"s{task.index:04d}-{attempt}.wav", _heard(task.speech[0], total)),
            "frames_total": total + 1,
            "prompt": single_prompt(recipe.prompt),
            "negative": recipe.negative,
            "seed": window_seed(recipe.seed, task.index, 0),
            "width": recipe.width,
            "height": recipe.height,
            "frames": f"{recipe.job}/s{task.index:04d}-{attempt}/f",
            "steps": recipe.steps,
        }
    )
    outputs = client.run(
        graph, on_progress=clock.see, cancelled=cancelled, silent_after=silent_after, job=recipe.job
    )
    files = outputs[recipe.workflow.slot_node("frames")]
    if len(files) != total:
        raise GraphError("frames", f"the segment gave {len(files)} frames instead of {total}")
    body = task.frames - task.head - task.tail
    with SegmentWriter(folder, task.head, body, task.tail, recipe.width, recipe.height) as writer:
        _store(FrameShelf(client, task, discard), writer, files[: task.frames], task, cancelled)
    discard(files[task.frames :])
    nodes: dict[str, NodeRuns] = {}
    count_nodes(nodes, graph, clock.seen)
    keep(WindowCheckpoint(task.index, 0, SegmentFiles.in_folder(folder).to_arrays(), None))
    return clock.finish(), nodes


def single_prompt(prompt: str) -> str:
    """The prompt without the marks at which the wrapper would cut it into several.

    It gives the parts between ``|`` to one window each, counting from the segment's first, and takes
    ``[1]`` for a change of scene; other brackets stay.

    >>> single_prompt("she smiles | [1] he nods")
    'she smiles , (1) he nods'
    """
    return re.sub(r"\[(\d+)\]", r"(\1)", prompt.replace("|", ","))


class _Clock:
    """Turns the steps of the sampler, counted over all windows, into windows done and their seconds."""

    def __init__(self, task: SegmentTask, sampler: str, windows: int, estimate: int, report: Report) -> None:
        self.seen = PromptProgress("")
        self._index, self._steps, self._sampler = task.index, task.recipe.steps, sampler
        self._windows, self._report = windows, report
        # The node's own estimate is one window too many as soon as there are two.
        self._maxima = {windows * self._steps, estimate * self._steps}
        self._seconds: list[float] = []
        self._since = time.monotonic()
        report(SegmentProgress(self._index, 0, 0.0, ()))

    def see(self, seen: PromptProgress) -> None:
        """A word of the engine.  Loading weights counts steps in the same node, but up to another number."""
        self.seen = seen
        if seen.node != self._sampler or seen.maximum not in self._maxima:
            return
        done, step = divmod(min(seen.value, self._windows * self._steps), self._steps)
        self._done(min(done, self._windows - 1))  # the last is done when its frames are there
        if done == self._windows:
            step = self._steps
        self._report(
            SegmentProgress(self._index, len(self._seconds), step / self._steps, tuple(self._seconds))
        )

    def finish(self) -> tuple[float, ...]:
        """The seconds of every window."""
        self._done(self._windows)
        self._report(SegmentProgress(self._index, self._windows, 0.0, tuple(self._seconds)))
        return tuple(self._seconds)

    def _done(self, windows: int) -> None:
        new = windows - len(self._seconds)
        if new > 0:
            now = time.monotonic()
            self._seconds += [(now - self._since) / new] * new
            self._since = now


def _window(workflow: Workflow) -> tuple[int, int]:
    """Frames of a window, and how many of them repeat the window before, as the file says."""
    inputs = json.loads(workflow.text)[workflow.slot_node("width")]["inputs"]
    try:
        window, motion = int(inputs["frame_window_size"]), int(inputs["motion_frame"])
    except (KeyError, TypeError, ValueError):
        raise WorkflowError(
            workflow.file, "frame_window_size and motion_frame must be numbers in the node with slot 'width'"
        ) from None
    if not 0 < motion < window or window % 4 != 1:
        raise WorkflowError(workflow.file, f"windows of {window} frames that repeat {motion}")
    return window, motion


def _second_speaker(client: ComfyClient, task: SegmentTask, frames: int) -> dict[str, object]:
    if not task.speech_2:
        return {}
    people = [picture_of(mask) for mask in task.masks]
    nobody = np.where(np.maximum.reduce(people) > 127, 0, 255).astype(np.uint8)
    return {
        "speech_2": upload(client, _heard(task.speech_2[0], frames), "wav"),
        "masks": upload(client, motion_frames.pack([*people, nobody]), "png"),
    }


def _pictures(task: SegmentTask, windows: int) -> bytes:
    """The file for LoadImage: one picture, or a batch of which the node gives one to each window."""
    if len(task.portraits) == 1:
        return task.portraits[0]
    return motion_frames.pack([picture_of(picture) for picture in task.portraits[:windows]])


def _heard(speech: bytes, frames: int) -> bytes:
    """The speech, of exactly the length at which the node counts ``frames`` frames."""
    with wave.open(io.BytesIO(speech), "rb") as source:
        parameters = source.getparams()
        samples = frames * SAMPLES_PER_FRAME + EXTRA_SAMPLES
        width = parameters.nchannels * parameters.sampwidth
        content = source.readframes(samples).ljust(samples * width, b"\0")
    target = io.BytesIO()
    with wave.open(target, "wb") as wav:
        wav.setparams(parameters)
        wav.writeframes(content)
    return target.getvalue()


def _store(
    shelf: FrameShelf,
    writer: SegmentWriter,
    files: list[OutputFile],
    task: SegmentTask,
    cancelled: threading.Event,
) -> None:
    """Fetch the frames, some at a time, and write them in order.

    The node's own ``colormatch`` stays off: it fits each frame's statistics to the picture's, whatever moves.
    So a drift adds up from window to window, and is taken out of all of them here.
    """
    some = 4 * FETCHES
    window, motion = _window(task.recipe.workflow)

    def fetch(file: OutputFile) -> Frame:
        if cancelled.is_set():
            raise JobCancelled(task.recipe.job)
        return shelf.fetch(file)

    pictures = [picture_of(png) for png in task.portraits]
    of_window = [max(0, (t - motion) // (window - motion)) for t in range(len(files))]
    colours = shelf.colours(
        [pictures[min(w, len(pictures) - 1)] for w in of_window], lambda t: fetch(files[t])
    )
    with ThreadPoolExecutor(FETCHES, thread_name_prefix="frames") as pool:
        for start in range(0, len(files), some):
            part = files[start : start + some]
            shown = [colours.corrected(t, frame) for t, frame in enumerate(pool.map(fetch, part), start)]
            shelf.store(writer, [], part, shown, colours)
