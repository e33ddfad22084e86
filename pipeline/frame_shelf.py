"""Between an engine and a segment's files: uploads, finished frames in true colours, what was run for them.

What all segment runners share (``segment``, ``wrapper_segment``).  No windows, no Ray.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from pipeline.colour_drift import NOTHING, DriftCorrection, find_drift
from pipeline.comfy_answers import OutputFile
from pipeline.comfy_client import ComfyClient
from pipeline.comfy_events import PromptProgress
from pipeline.errors import EngineError, GraphError, MediaError
from pipeline.messages import NodeRuns, SegmentTask
from pipeline.segment_files import Frame, SegmentWriter
from pipeline.workflow import Graph

Discard = Callable[[list[OutputFile]], None]
"""Deletes files of the engine that were fetched."""


def window_seed(job_seed: int, segment: int, window: int) -> int:
    """The sampler's seed of one window: different in every segment, the same in every attempt.

    With one seed for all, segments would open with the same motion (equal noise on an equal picture).

    >>> window_seed(1, 0, 0) != window_seed(1, 1, 0)
    True
    """
    digest = hashlib.sha256(f"{job_seed}/{segment}/{window}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


class FrameShelf:
    """Takes frames out of the engine and puts them, in order, into files."""

    def __init__(self, client: ComfyClient, task: SegmentTask, discard: Discard) -> None:
        self._client, self._discard = client, discard
        self._shape = (task.recipe.height, task.recipe.width, 3)
        self._match = task.recipe.color_match

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

    def colours(self, references: Sequence[Frame], frame_at: Callable[[int], Frame]) -> DriftCorrection:
        """What has to be done to the colours of some frames, as ``find_drift``; nothing if not asked for."""
        return find_drift(references, frame_at) if self._match else NOTHING

    def store(
        self,
        writer: SegmentWriter,
        early: list[OutputFile],
        late: list[OutputFile],
        last: list[Frame],
        colours: DriftCorrection,
    ) -> None:
        """Write frames: ``early`` are still to be fetched and corrected, ``last`` are ``late``, corrected.

        The last window may be longer than what is left of the segment: what is too much is dropped.
        """
        for t, file in enumerate(early[: writer.missing]):
            writer.write(colours.corrected(t, self.fetch(file)))
        for frame in last[: writer.missing]:
            writer.write(frame)
        self._discard(early + late)


def picture_of(png: bytes) -> Frame:
    """The pixels of one of the job's own pictures.  Raises ``MediaError``."""
    try:
        with Image.open(io.BytesIO(png)) as opened:
            return np.asarray(opened.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise MediaError(f"a picture of the job can't be read: {error}") from None


def upload(client: ComfyClient, content: bytes, suffix: str) -> str:
    """Give a file to the engine under a name made of its content; what is there already stays."""
    return client.upload(f"{hashlib.sha256(content).hexdigest()[:24]}.{suffix}", content)


def count_nodes(nodes: dict[str, NodeRuns], graph: Graph, seen: PromptProgress) -> None:
    """Add what a prompt ran, and what it found in the engine's cache."""
    for node_id, node in graph.items():
        runs = NodeRuns(ran=node_id in seen.done - seen.cached, cached=node_id in seen.cached)
        nodes[node["class_type"]] = nodes.get(node["class_type"], NodeRuns()) + runs
