"""Finished segments in, one video out: seams are made and encoded, everything else is copied.

What happens inside an overlap is ``seam``'s business, how ffmpeg is called ``ffmpeg``'s, the user's track
``sound``'s.  Memory does not grow with the length: a worker holds the two renderings of one overlap.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from contextvars import Context, copy_context
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import ffmpeg, seam_metrics
from pipeline.errors import MediaError, StorageError
from pipeline.frame_writer import FrameWriter
from pipeline.frames import check_video, read_stack, stream_header
from pipeline.plan import Plan
from pipeline.seam import WARM_UP, Method, SeamReport, join_overlap
from pipeline.segment_files import SegmentFiles
from pipeline.speech import frame_levels
from pipeline.timeline import FPS

log = logging.getLogger(__name__)


def stitch(
    plan: Plan,
    segments: Sequence[SegmentFiles],
    track: tuple[Path, int],
    target: Path,
    work: Path,
    *,
    warm_up: int = WARM_UP,
    workers: int | None = None,
    fps: int = FPS,
    shown: int | None = None,
    seam: Method = "morph",
    speech: Sequence[Path] = (),
    timed: Callable[[int], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> tuple[SeamReport, ...]:
    """Join ``segments`` in the plan's overlaps, add the ``track`` (of ``sound.make_track``), write an mp4.

    ``target`` appears when its frames were counted by decoding.  ``work`` gets a temporary directory.
    ``workers`` seams are made at a time, by default one for each core, at most 4 (300 MB each at 480p).
    ``seam`` says how; ``speech`` are the speakers' prepared tracks: seams look for a pause in all of them.
    At another rate than 25 ``fps`` the result has ``shown`` frames and is encoded once more.
    Each seam is made within its ``timed(number)``.
    Raises ``MediaError``, ``StorageError``.
    """
    _check(plan, segments)
    starts = [segment.start for segment in plan.segments[1:]]
    joints = list(zip(segments, segments[1:], plan.overlaps, starts, strict=False))
    partial = target.with_name(f".{target.name}.partial")
    try:
        with tempfile.TemporaryDirectory(prefix="stitch-", dir=work) as name:
            folder = Path(name)
            with ThreadPoolExecutor(
                workers or min(os.cpu_count() or 1, 4), thread_name_prefix="seam"
            ) as pool:
                seams = [
                    pool.submit(
                        _timed_seam,
                        copy_context(),
                        timed(number),
                        *joint,
                        folder / f"seam-{number:05d}{ffmpeg.FINAL.suffix}",
                        warm_up,
                        seam,
                        speech,
                    )
                    for number, joint in enumerate(joints)
                    if joint[2]
                ]
                try:
                    reports = tuple(seam.result() for seam in seams)
                except BaseException:
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise
            parts = _parts(segments, plan.overlaps, folder)
            _join(parts, track, partial, folder, fps, shown)
            seen = seam_metrics.ClipMoves()
            check_video(partial, plan.total_frames if shown is None else shown, fps, seen.add)
            partial.replace(target)
    except OSError as error:
        raise StorageError(str(target), error.strerror or str(error)) from error
    finally:
        partial.unlink(missing_ok=True)
    return reports if fps != FPS else _in_clip(reports, seen, starts, plan.overlaps)


def _check(plan: Plan, segments: Sequence[SegmentFiles]) -> None:
    overlaps = (0, *plan.overlaps, 0)
    for number, (segment, files) in enumerate(zip(plan.segments, segments, strict=True)):
        head, tail = overlaps[number], overlaps[number + 1]
        wanted = {"head": head, "body": segment.frames - head - tail, "tail": tail}
        if dict(files.frames) != wanted:
            raise MediaError(f"segment {number} has the frames {dict(files.frames)}, the plan wants {wanted}")


def _timed_seam(context: Context, timed: AbstractContextManager[None], *joint: Any) -> SeamReport:
    """``context``: the caller's, or logs would not say whose seam it is."""

    def make() -> SeamReport:
        with timed:
            return _seam(*joint)

    return context.run(make)


def _seam(
    before: SegmentFiles,
    after: SegmentFiles,
    overlap: int,
    start: int,
    target: Path,
    warm_up: int,
    method: Method,
    speech: Sequence[Path],
) -> SeamReport:
    earlier = read_stack(before.path("tail"), overlap)
    later = read_stack(after.path("head"), overlap)
    tracks = [frame_levels(track, start, overlap) for track in speech]
    levels = [max(frame) for frame in zip(*tracks, strict=True)] or None
    frames, report = join_overlap(earlier, later, method=method, warm_up=warm_up, start=start, levels=levels)
    with FrameWriter(target, before.width, before.height, ffmpeg.FINAL) as writer:
        for frame in frames:
            writer.write(frame)
    log.info("seam at frame %d: %s over %d frames", report.frame, report.method, report.frames)
    return report


def _in_clip(
    reports: Sequence[SeamReport],
    seen: seam_metrics.ClipMoves,
    starts: Sequence[int],
    overlaps: Sequence[int],
) -> tuple[SeamReport, ...]:
    """The reports with jumps as they are in the finished file, beside all of its motion away from seams."""
    spans = [(start, start + overlap) for start, overlap in zip(starts, overlaps, strict=True) if overlap]
    away = seen.away_from(spans)
    if len(away) < FPS:  # too short a clip to say what is usual in it
        return tuple(reports)
    usual, natural = float(np.median(away)), seam_metrics.natural(away)
    return tuple(
        report.in_clip(seen.jump(report.frame, report.frame + report.frames), usual, natural)
        for report in reports
    )


def _parts(segments: Sequence[SegmentFiles], overlaps: Sequence[int], folder: Path) -> list[tuple[Path, int]]:
    parts = []
    for number, files in enumerate(segments):
        if files.frames["body"]:
            parts.append((files.path("body"), files.frames["body"]))
        if number < len(overlaps) and overlaps[number]:
            parts.append((folder / f"seam-{number:05d}{ffmpeg.FINAL.suffix}", overlaps[number]))
    return parts


def _join(
    parts: Sequence[tuple[Path, int]],
    track: tuple[Path, int],
    target: Path,
    folder: Path,
    fps: int,
    shown: int | None,
) -> None:
    """Copy; or, for another rate or where other encoders were at work, encode all once more.

    A file with several parameter sets is played by ffmpeg, but not by every player.
    """
    mixed = len({stream_header(path) for path, _ in parts}) > 1
    if mixed:
        log.warning("segments come from different encoders: the whole video is encoded again")
    if mixed or fps != FPS:
        whole = folder / f"whole{ffmpeg.FINAL.suffix}"
        ffmpeg.encode_again(parts, whole, folder, fps, shown)
        parts = [(whole, sum(frames for _, frames in parts) if shown is None else shown)]
    ffmpeg.join(parts, track, target, folder, fps)
