"""``python -m bench.stitching [--json]``: what joining costs, at a real size.

10,000 frames of 832x480 in 8 segments: seconds, resident memory, and the share of the result's frames that
are bit by bit what the renderers encoded (hash of the decoded planes).  *alike*: both renderings of every
overlap are equal, so seams are plain cuts and what is left is joining.  *poses*: the later rendering has
the head elsewhere, so seams are morphs.  Half the length stands beside it for the memory, and encoding
everything once more for the time (``--reencode``).  The sound is made while GPUs render and not in here.  So
are seams, mostly: *seams there* is what is left then, copying, and counting by decoding.  CPU seconds are
those of both runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from PIL import Image

from pipeline import ffmpeg
from pipeline.frames import Frame
from pipeline.plan import Plan, Segment
from pipeline.segment_files import MANIFEST, SegmentFiles, SegmentWriter
from pipeline.stitch import stitch
from pipeline.timeline import FPS

ROOT = Path(__file__).resolve().parent.parent
OVERLAP = 62
"""What the planner gives to 10,000 frames on 8 GPUs."""
SWAY, OTHER_POSE = 9.0, 12.0
"""Pixels that the head moves, and by which the renderings of one moment differ."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--segments", type=int, default=8)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--reencode", action="store_true", help="measure encoding everything too (minutes)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    size = options.width, options.height
    with tempfile.TemporaryDirectory(prefix="bench-stitching-") as name:
        folder = Path(name)
        alike, poses = _footage(folder, options.frames // options.segments, size)
        whole, half = options.segments, max(options.segments // 2, 2)
        runs = [("alike", alike, half, FPS), ("alike", alike, whole, FPS)]
        runs += [("poses", poses, half, FPS), ("poses", poses, whole, FPS)]
        if options.reencode:
            runs.append(("alike, at 30 fps", alike, whole, 30))
        rows = [_row(folder, *run) for run in runs]
    if options.json:
        print(json.dumps({"width": size[0], "height": size[1], "cores": os.cpu_count(), "rows": rows}))
        return
    head = "footage            segments   frames  seconds  seams there  CPU    memory  with ffmpeg    copied"
    print(f"{head}  seams")
    for row in rows:
        print(
            f"{row['footage']:<17}  {row['segments']:>8}  {row['frames']:>7}  {row['seconds']:>7.1f}"
            f"  {row['seconds_with_seams']:>11.1f}  {row['cpu_seconds']:>3.0f}  {row['memory_mb']:>5} MB"
            f"  {row['with_ffmpeg_mb']:>8} MB  {row['identical']:>8.2%}  {row['seams']}"
        )


def _footage(folder: Path, step: int, size: tuple[int, int]) -> tuple[dict[str, Path], dict[str, Path]]:
    """The first, a middle and the last segment of each kind of footage; all middle ones are alike.

    What a segment shows repeats with the segments, so the overlaps of neighbours show the same moments.
    """
    with Image.open(ROOT / "examples" / "portrait.png") as picture:
        portrait = np.asarray(picture.convert("RGB").resize((size[0] + 64, size[1] + 64)))

    def frame(t: int, pose: float = 0.0) -> Frame:
        turn = 2 * np.pi * (t % step) / step
        across = 32 + SWAY * np.sin(round(step / 40) * turn) + pose
        down = 32 + SWAY * np.sin(round(step / 65) * turn)
        moved = cv2.warpAffine(portrait, np.array([[1, 0, -across], [0, 1, -down]]), size)
        return np.asarray(moved, np.uint8)

    alike: dict[str, Path] = {}
    poses: dict[str, Path] = {}
    with SegmentWriter(folder / "elsewhere", OVERLAP, 0, 0, *size) as writer:
        for t in range(OVERLAP):
            writer.write(frame(t, OTHER_POSE))
    other = SegmentFiles.in_folder(folder / "elsewhere").to_arrays()
    for kind, head, tail in (("first", 0, OVERLAP), ("middle", OVERLAP, OVERLAP), ("last", OVERLAP, 0)):
        frames = step + tail
        with SegmentWriter(folder / kind, head, frames - head - tail, tail, *size) as writer:
            for t in range(frames):
                writer.write(frame(t))
        alike[kind] = poses[kind] = folder / kind
        if head:  # the same body behind another head
            arrays = SegmentFiles.in_folder(folder / kind).to_arrays()
            manifest, given = (json.loads(bytes(files[MANIFEST])) for files in (arrays, other))
            manifest["files"]["head.mkv"] = given["files"]["head.mkv"]
            arrays |= {
                "head.mkv": other["head.mkv"],
                MANIFEST: np.frombuffer(json.dumps(manifest).encode(), np.uint8),
            }
            poses[kind] = SegmentFiles.store(folder / f"{kind}-elsewhere", arrays).folder
    return alike, poses


def _row(folder: Path, footage: str, kinds: dict[str, Path], count: int, fps: int) -> dict[str, Any]:
    names = ["first", *["middle"] * (count - 2), "last"]
    files = [SegmentFiles.in_folder(kinds[name]) for name in names]
    step = files[0].frames["body"]
    frames = count * step
    sound = folder / "sound.m4a"
    tone = ["-f", "lavfi", "-i", f"sine=f=220:r=48000:d={frames / FPS}"]
    subprocess.run([ffmpeg.binary(), "-v", "error", "-y", *tone, str(sound)], check=True)
    # A process of its own: its memory is that of joining and of nothing else.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        measured, methods = process.submit(_stitch, files, step, sound, fps).result()
    target = files[0].folder.parent / "talk.mp4"
    bodies = {name: _hashes(kinds[name] / "body.mp4") for name in set(names)}
    found = _hashes(target)
    same, place = 0, 0
    for number, name in enumerate(names):
        place = number * step + (OVERLAP if number else 0)
        body = bodies[name]
        same += sum(a == b for a, b in zip(body, found[place : place + len(body)], strict=fps == FPS))
    target.unlink()
    return {
        "footage": footage,
        "segments": count,
        "frames": len(found),
        **measured,
        "identical": same / len(found),
        "seams": ", ".join(f"{number} {method}" for method, number in Counter(methods).items()),
    }


def _stitch(
    files: list[SegmentFiles], step: int, sound: Path, fps: int
) -> tuple[dict[str, float], list[str]]:
    """Seconds on the clock and of all cores, peak MB with and without the largest ffmpeg; each seam's method.

    A child's peak is never less than what its parent had when it was started: an upper bound.
    """
    count, target = len(files), files[0].folder.parent / "talk.mp4"
    segments = tuple(
        Segment(i, i * step, (i + 1) * step + (OVERLAP if i < count - 1 else 0), windows=(81,), gpu=i)
        for i in range(count)
    )
    plan = Plan(total_frames=count * step, segments=segments, window=81, motion=9)
    (work := target.with_name("work")).mkdir()
    began = time.monotonic()
    shown = plan.total_frames * fps // FPS
    (kept := work / "seams").mkdir()
    seams = stitch(plan, files, (sound, 0), target, work, fps=fps, shown=shown, seams=kept)
    seconds = time.monotonic() - began
    began = time.monotonic()
    stitch(plan, files, (sound, 0), target, work, fps=fps, shown=shown, seams=kept)
    ready = time.monotonic() - began
    shutil.rmtree(work)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    own, children = (usage.ru_maxrss >> 10 for usage in used)
    measured = {
        "seconds": round(seconds, 1),
        "seconds_with_seams": round(ready, 1),
        "cpu_seconds": round(sum(usage.ru_utime + usage.ru_stime for usage in used), 1),
        "memory_mb": own,
        "with_ffmpeg_mb": own + children,
    }
    return measured, [seam.method for seam in seams]


def _hashes(path: Path) -> list[bytes]:
    """Of the decoded planes of each frame."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        return [hashlib.blake2b(frame.to_ndarray().tobytes()).digest() for frame in container.decode(stream)]


if __name__ == "__main__":
    main()
