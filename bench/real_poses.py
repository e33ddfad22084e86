"""How closely real renderings keep to the pictures that conditioned them: ``python -m bench.real_poses``.

    --video SOURCE RENDERED    a source video and what InfiniteTalk made of it; may be given several times
    --image RENDERED           what it made of a picture, which is its first frame

Nothing is rendered here.  The project's own page shows such videos (docs/seams.md says where); they are for
academic use and no part of this repository.

Where the head is: the median of the optical flow in the face's box from the first picture on, in heights of
the face (turns of the head are not seen).  A window's picture is the source's frame of its first frame's
number, as in InfiniteTalk's own program.  Printed:

    strays   how far the head is from where the window's picture has it: mean and 95th percentile
    follows  of the way from where a window finds the head to where its picture has it, the share that the
             window goes: 1 copies the picture's pose, 0 ignores it (least squares; 95 % by resampling)
    apart    how far two renderings of an overlap would be apart: the rendering as it is, and one that starts
             at a frame of it from that frame's picture and strays as the videos' own first windows do.
             ``image``: all pictures are the first; ``own``: each window's is that at its start; ``shared``:
             the window that reaches into the overlap has the later one's picture, and ``follows`` it
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np

from pipeline.colours import Floats, Stack, small
from pipeline.draft.face import find_face
from pipeline.frames import Frame, read_frames
from pipeline.optical_flow import flow_between, luma
from pipeline.plan import MOTION, WARM_UP

SIDE = 448
"""Pixels of the longer side of the copies that are looked at."""
WINDOW, OVERLAP = 81, 40
STRIDE = WINDOW - MOTION
SETTLED = 30
"""Frames after which a window has gone where it goes."""


@dataclass(frozen=True, slots=True)
class Take:
    """Where the head is in each frame, [frames, 2], in face heights from the first picture."""

    name: str
    rendered: Floats
    source: Floats | None

    def picture(self, frame: int) -> Floats:
        """Where the head is in the picture of a window that starts at ``frame``."""
        if self.source is None:
            return np.zeros(2)
        return np.asarray(self.source[min(frame, len(self.source) - 1)])

    @property
    def windows(self) -> Iterator[tuple[int, int]]:
        """First and stop of each window's frames that are long enough to say something."""
        for first in count(0, STRIDE):
            stop = min(first + WINDOW, len(self.rendered))
            if stop - first < SETTLED + MOTION:
                return
            yield first, stop

    def strays(self) -> Floats:
        """Distance from the window's picture, frame by frame."""
        return np.concatenate(
            [_far(self.rendered[first:stop] - self.picture(first)) for first, stop in self.windows]
        )

    def steps(self) -> list[tuple[Floats, Floats]]:
        """Of each later window: the way to its picture, and the way that it went."""
        found = []
        for first, stop in list(self.windows)[1:]:
            start = self.rendered[first + MOTION - 1]
            found.append((self.picture(first) - start, self.rendered[first + SETTLED : stop].mean(0) - start))
        return found

    def apart(self, way: str, onsets: Sequence[Floats], follows: float) -> float:
        """Mean distance of two renderings of an overlap's frames behind the warm-up."""
        found = []
        for start in range(STRIDE, len(self.rendered) - OVERLAP, 4):
            own, later = self.picture(start - start % STRIDE), self.picture(start)
            earlier = self.rendered[start + WARM_UP : start + OVERLAP]
            if way == "image":
                later = np.zeros(2)
            elif way == "shared":
                earlier = earlier + follows * (later - own)
            found += [_far(earlier - later - onset).mean() for onset in onsets]
        return float(np.mean(found))


def _far(offsets: Floats) -> Floats:
    return np.asarray(np.hypot(offsets[:, 0], offsets[:, 1]))


def looked_at(path: Path, shape: tuple[int, ...] | None = None) -> Stack:
    """Small copies; cut to the middle where ``shape`` is wider or higher, as the model's program does."""
    frames = []
    for frame in read_frames(path):
        height, width = frame.shape[:2]
        if shape is not None:
            cut_height, cut_width = (
                min(height, width * shape[0] // shape[1]),
                min(width, height * shape[1] // shape[0]),
            )
            top, left = (height - cut_height) // 2, (width - cut_width) // 2
            frame = frame[top : top + cut_height, left : left + cut_width]
        frames.append(small(frame, SIDE))
    return np.stack(frames)


def heads(first: Frame, frames: Stack) -> Floats:
    """Where the head of ``first`` is in each frame."""
    face = find_face(first)
    rows = slice(max(round(face.y - 0.75 * face.height), 0), round(face.y + 0.35 * face.height))
    columns = slice(max(round(face.x - 0.5 * face.height), 0), round(face.x + 0.5 * face.height))
    flow, found = None, []
    for frame in frames:
        flow = flow_between(luma(first), luma(frame), flow)
        found.append(np.median(flow[rows, columns].reshape(-1, 2), axis=0))
    return np.asarray(found) / face.height


def takes(videos: Sequence[tuple[Path, Path]], images: Sequence[Path]) -> Iterator[Take]:
    """One after the other."""
    for source, rendered in videos:
        frames = looked_at(rendered)
        pictures = looked_at(source, frames.shape[1:3])
        size = frames.shape[1:3]
        pictures = pictures[:, : size[0], : size[1]]
        yield Take(rendered.name, heads(pictures[0], frames), heads(pictures[0], pictures))
    for rendered in images:
        frames = looked_at(rendered)
        yield Take(rendered.name, heads(frames[0], frames), None)


def follow(steps: Sequence[tuple[Floats, Floats]]) -> tuple[float, float, float]:
    """The share of the way to its picture that a window goes, and the ends of its 95 % interval."""
    to, gone = (np.array(part) for part in zip(*steps, strict=True))

    def share(which: slice | Floats) -> float:
        return float((to[which] * gone[which]).sum() / (to[which] ** 2).sum())

    draws = np.random.default_rng(0).integers(0, len(to), (2000, len(to)))
    low, high = np.percentile([share(draw) for draw in draws], [2.5, 97.5])
    return share(slice(None)), float(low), float(high)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--video", nargs=2, type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument("--image", type=Path, action="append", default=[], metavar="FILE")
    options = parser.parse_args()
    found = list(takes(options.video, options.image))
    if not found:
        parser.error("nothing to look at")
    steps = [step for take in found if take.source is not None for step in take.steps()]
    share = 0.0
    if len(steps) > 1:
        share, low, high = follow(steps)
        print(f"follows {share:.2f} ({low:.2f} to {high:.2f}) of the way, {len(steps)} windows")
    onsets = [take.rendered[WARM_UP:OVERLAP] for take in found]
    for take in found:
        strays = take.strays()
        ways = ("image",) if take.source is None else ("image", "own", "shared")
        apart = ", ".join(f"{way} {take.apart(way, onsets, share):.3f}" for way in ways)
        print(
            f"{take.name:20} {len(take.rendered):4} frames  strays {strays.mean():.3f}"
            f" ({np.percentile(strays, 95):.3f})  apart: {apart}"
        )


if __name__ == "__main__":
    main()
