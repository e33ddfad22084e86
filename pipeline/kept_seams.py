"""Seams that are made: each is joined once, as soon as both its neighbours are there, and kept in the job.

    seams/0003-<digest>.mp4     the joined overlap, in the final encoding
    seams/0003-<digest>.json    its report; a seam that has one is whole

The digest is of both renderings and of the method: another take is another seam, and the same one is never
made twice.  What happens inside an overlap is ``seam``'s business, when it is made ``front``'s.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline import ffmpeg
from pipeline.frame_writer import FrameWriter
from pipeline.frames import read_stack
from pipeline.job import finished, storage_errors
from pipeline.seam import WARM_UP, Method, SeamReport, join_overlap
from pipeline.segment_files import SegmentFiles
from pipeline.speech import frame_levels

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Joint:
    """Where two segments meet: all that their seam is made of."""

    number: int
    start: int
    """The overlap's first frame in the job."""
    frames: int
    earlier: SegmentFiles
    """Its tail is one rendering of the overlap."""
    later: SegmentFiles
    """Its head is the other one."""
    method: Method = "morph"
    speech: tuple[Path, ...] = ()
    """The speakers' prepared tracks: seams look for a pause in all of them."""
    warm_up: int = WARM_UP


@dataclass(frozen=True, slots=True)
class KeptSeam:
    """A seam on disk."""

    path: Path
    frames: int
    report: SeamReport


def seam_workers() -> int:
    """Seams that a process makes at a time: one for each core, at most 4 (300 MB each at 480p)."""
    return min(os.cpu_count() or 1, 4)


_MAKING = threading.BoundedSemaphore(seam_workers())
"""A runner and a batch have many jobs in work at once, and each of them has its workers."""

Timed = Callable[[int], AbstractContextManager[None]]
"""Within it the seam of this number is made."""


def keep_seam(joint: Joint, folder: Path, timed: Timed = lambda _: nullcontext()) -> KeptSeam:
    """Make a seam, or find it where it was made before; waits while ``seam_workers`` others are being made.

    Raises ``MediaError``, ``StorageError``.
    """
    renderings = [joint.earlier.digest("tail"), joint.later.digest("head")]
    what = json.dumps([*renderings, joint.method, joint.warm_up, joint.start])
    name = f"{joint.number:04d}-{hashlib.sha256(what.encode()).hexdigest()[:16]}"
    path, notes = folder / f"{name}{ffmpeg.FINAL.suffix}", folder / f"{name}.json"
    known = _known(path, notes, joint.frames)
    if known is not None:
        return known
    with _MAKING, timed(joint.number):
        return _make(joint, path, notes)


def forget_seams(folder: Path, kept: Collection[Path]) -> None:
    """Remove all seams but those: of other takes, or made in another way.  Raises ``StorageError``."""
    stay = {path.stem for path in kept}
    with storage_errors(folder):
        for path in folder.glob("*"):
            if path.stem not in stay:
                path.unlink(missing_ok=True)


def _known(path: Path, notes: Path, frames: int) -> KeptSeam | None:
    try:
        told = json.loads(notes.read_text())
        if path.stat().st_size != told["bytes"]:
            return None
        return KeptSeam(path, frames, SeamReport(**told["report"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, not whole, or by another version of this program


def _make(joint: Joint, path: Path, notes: Path) -> KeptSeam:
    earlier = read_stack(joint.earlier.path("tail"), joint.frames)
    later = read_stack(joint.later.path("head"), joint.frames)
    tracks = [frame_levels(track, joint.start, joint.frames) for track in joint.speech]
    levels: Sequence[float] | None = [max(frame) for frame in zip(*tracks, strict=True)] or None
    frames, report = join_overlap(
        earlier, later, method=joint.method, warm_up=joint.warm_up, start=joint.start, levels=levels
    )
    with finished(path) as partial:
        with FrameWriter(partial, joint.earlier.width, joint.earlier.height, ffmpeg.FINAL) as writer:
            for frame in frames:
                writer.write(frame)
        size = partial.stat().st_size
    with finished(notes) as partial:
        partial.write_text(json.dumps({"bytes": size, "report": asdict(report)}, indent=1))
    log.info("seam at frame %d: %s over %d frames", report.frame, report.method, report.frames)
    return KeptSeam(path, joint.frames, report)
