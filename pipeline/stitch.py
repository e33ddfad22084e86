"""Finished segments in, one video out: seams are made and encoded, everything else is copied.

How a seam is made is ``kept_seams``' business, how ffmpeg is called ``ffmpeg``'s, the user's track
``sound``'s.  Memory does not grow with the length: a worker holds the two renderings of one overlap.
"""

from __future__ import annotations

import itertools
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline import ffmpeg, seam_metrics
from pipeline.errors import MediaError, StorageError
from pipeline.frames import check_video, stream_header
from pipeline.kept_seams import Joint, KeptSeam, keep_seam, seam_workers
from pipeline.plan import Plan
from pipeline.seam import WARM_UP, Method, SeamReport
from pipeline.segment_files import SegmentFiles
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
    fps: int = FPS,
    shown: int | None = None,
    seam: Method = "morph",
    speech: Sequence[Path] = (),
    seams: Path | None = None,
    tick: Callable[[], None] = lambda: None,
) -> tuple[SeamReport, ...]:
    """Join ``segments`` in the plan's overlaps, add the ``track`` (of ``sound.make_track``), write an mp4.

    ``target`` appears when its frames were counted by decoding.  ``work`` gets a temporary directory.
    ``seam`` says how; ``speech`` are the speakers' prepared tracks: seams look for a pause in all of them.
    Those that are in the folder ``seams`` already are taken from there, the others are kept there.
    At another rate than 25 ``fps`` the result has ``shown`` frames and is encoded once more.
    ``tick`` is called now and then while frames are counted; what it raises ends the work.
    Raises ``MediaError``, ``StorageError``.
    """
    _check(plan, segments)
    partial = target.with_name(f".{target.name}.partial")
    try:
        with tempfile.TemporaryDirectory(prefix="stitch-", dir=work) as name:
            folder = Path(name)
            all_joints = joints(plan, segments, seam, speech, warm_up)
            made = _seams(all_joints, seams or folder)
            parts = video_parts(segments, made)
            _join(parts, track, partial, folder, fps, shown)
            seen, count = seam_metrics.ClipMoves(), itertools.count()

            def watch(luma: npt.NDArray[np.uint8]) -> None:
                seen.add(luma)
                if next(count) % FPS == 0:
                    tick()

            check_video(partial, plan.total_frames if shown is None else shown, fps, watch)
            partial.replace(target)
    except OSError as error:
        raise StorageError(str(target), error.strerror or str(error)) from error
    finally:
        partial.unlink(missing_ok=True)
    reports = tuple(kept.report for kept in made.values())
    return reports if fps != FPS else _in_clip(reports, seen, all_joints)


def joints(
    plan: Plan,
    segments: Sequence[SegmentFiles],
    method: Method,
    speech: Sequence[Path],
    warm_up: int = WARM_UP,
) -> list[Joint]:
    """Where the segments meet; none for neighbours that share no frame."""
    starts = [segment.start for segment in plan.segments[1:]]
    pairs = zip(starts, plan.overlaps, segments, segments[1:], strict=False)
    return [
        Joint(number, start, frames, before, after, method, tuple(speech), warm_up)
        for number, (start, frames, before, after) in enumerate(pairs)
        if frames
    ]


def _seams(wanted: Sequence[Joint], folder: Path) -> dict[int, KeptSeam]:
    with ThreadPoolExecutor(seam_workers(), thread_name_prefix="seam") as pool:
        made = {joint.number: pool.submit(keep_seam, joint, folder) for joint in wanted}
        try:
            return {number: seam.result() for number, seam in made.items()}
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def video_parts(segments: Sequence[SegmentFiles], seams: Mapping[int, KeptSeam]) -> list[tuple[Path, int]]:
    """The files ``(path, frames)`` that make the video, in order: bodies and, between them, seams."""
    parts = []
    for number, files in enumerate(segments):
        if files.frames["body"]:
            parts.append((files.path("body"), files.frames["body"]))
        if number in seams:
            parts.append((seams[number].path, seams[number].frames))
    return parts


def _check(plan: Plan, segments: Sequence[SegmentFiles]) -> None:
    overlaps = (0, *plan.overlaps, 0)
    for number, (segment, files) in enumerate(zip(plan.segments, segments, strict=True)):
        head, tail = overlaps[number], overlaps[number + 1]
        wanted = {"head": head, "body": segment.frames - head - tail, "tail": tail}
        if dict(files.frames) != wanted:
            raise MediaError(f"segment {number} has the frames {dict(files.frames)}, the plan wants {wanted}")


def _in_clip(
    reports: Sequence[SeamReport],
    seen: seam_metrics.ClipMoves,
    wanted: Sequence[Joint],
) -> tuple[SeamReport, ...]:
    """The reports with jumps as they are in the finished file, beside all of its motion away from seams."""
    spans = [(joint.start, joint.start + joint.frames) for joint in wanted]
    away = seen.away_from(spans)
    if len(away) < FPS:  # too short a clip to say what is usual in it
        return tuple(reports)
    usual, natural = float(np.median(away)), seam_metrics.natural(away)
    return tuple(
        report.in_clip(seen.jump(report.frame, report.frame + report.frames), usual, natural)
        for report in reports
    )


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
