"""What travels between driver and renderers: frozen, typed, safe to send twice.

Values only: no handles, no open files, nothing of Ray.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.settings import Settings
from pipeline.workflow import Workflow

Blob = npt.NDArray[np.uint8]
"""Bytes as a uint8 array: Ray shares those between processes of a node without a copy."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is the same for every segment of a job."""

    job: str
    workflow: Workflow
    prompt: str
    seed: int
    steps: int
    width: int
    height: int
    motion: int
    negative: str = ""
    """The negative prompt, for workflows that take one."""
    presets: tuple[tuple[str, object], ...] = ()
    """Slots whose value the request gives in place of the workflow's own."""
    color_match: bool = False
    """Whether frames get their picture's colours before they are encoded (``colour_drift``)."""


@dataclass(frozen=True, slots=True)
class SegmentTask:
    """All that a renderer needs to make one segment."""

    recipe: Recipe
    index: int
    frames: int
    """Frames of the job that the segment covers; more may be rendered, they are dropped at the end."""
    windows: tuple[int, ...]
    """The length of each window in frames; later windows repeat ``motion`` frames of the one before.
    All of the segment's, also those that this task leaves to others (``first``)."""
    head: int
    tail: int
    """Frames shared with the segment before and with the one after."""
    portraits: tuple[bytes, ...]
    """PNG of the picture that conditions each window of this task; one for all, or one for each."""
    speech: tuple[bytes, ...]
    """WAV of each window's own time (16 kHz mono), for the windows of this task; its first sample is
    ``context`` frames before the window's frame 0.  One for all windows where a prompt renders the whole
    segment."""
    attempt: int = 1
    context: tuple[int, ...] = ()
    """Frames of each window's speech that lie before it; none for workflows without such a slot."""
    speech_2: tuple[bytes, ...] = ()
    """The same times of the second speaker's track."""
    masks: tuple[bytes, ...] = ()
    """PNG of where each of two speakers is, white on black."""
    first: int = 0
    """The first window of this task; those before are finished, and it ends after ``len(speech)`` windows."""
    motion: Blob | None = None
    """The last frames of the window before ``first``, as ``WindowCheckpoint.motion``."""


@dataclass(frozen=True, slots=True)
class NodeRuns:
    """How often the nodes of one class ran, and how often the engine still had their output."""

    ran: int = 0
    cached: int = 0

    def __add__(self, other: NodeRuns) -> NodeRuns:
        return NodeRuns(self.ran + other.ran, self.cached + other.cached)


@dataclass(frozen=True, slots=True)
class WindowCheckpoint:
    """A finished window: what of the segment's files it gives, and what the next window goes on from."""

    segment: int
    window: int
    """Counted from 0, the segment's first."""
    files: dict[str, Blob]
    """``SegmentFiles.to_arrays`` of its frames: parts of the segment's head, body and tail."""
    motion: Blob | None
    """Its last ``Recipe.motion`` frames as they are shown, lossless (``motion_frames.pack``); None for the
    last window."""


@dataclass(frozen=True, slots=True)
class RenderedSegment:
    """The end of a task: its windows that nobody has fetched yet, how long each took, and what ran for it."""

    index: int
    lane: int
    node: str
    attempt: int
    windows: tuple[WindowCheckpoint, ...]
    window_seconds: tuple[float, ...]
    nodes: dict[str, NodeRuns]
    """By node class."""
    left: int = 0
    """Windows of the segment that are still to be rendered, by another task."""


@dataclass(frozen=True, slots=True)
class SegmentProgress:
    """How far a renderer is with its segment."""

    index: int
    windows_done: int
    """Of all the segment's windows, those of earlier tasks too."""
    fraction: float
    """Of the window that is being rendered, 0 to 1."""
    window_seconds: tuple[float, ...]
    """Of the windows done by this task, the last of ``windows_done``."""


@dataclass(frozen=True, slots=True)
class RendererInfo:
    """Who a renderer is, once its engine answers."""

    lane: int
    node: str
    engine: str
    engine_version: str
    profile: str
    port: int
    pid: int
    engine_pid: int
    guard_pid: int
    device: str
    memory_gb: float
    speed: float = 1.0
    """Over that of the pool's fastest GPU, as far as it was measured."""


@dataclass(frozen=True, slots=True)
class RendererState:
    """What a renderer knows of itself."""

    lane: int
    node_id: str
    """Ray's."""
    index: int
    """Which of its node's GPUs it stands for."""
    info: RendererInfo | None
    """None until its engine has answered."""
    job: str | None
    """Whose segment is in work."""
    lease: int
    """And under which lease."""
    settings: Settings
