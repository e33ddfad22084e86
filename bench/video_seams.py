"""Seams of video mode beside those of image mode: ``python -m bench.video_seams``.

The source is a video of a person who moves: the real talking-head video of the shared data, or, without it,
one that the draft engine drew.  The draft engine renders two neighbouring segments of it several times:

    image    all windows are conditioned by the source's first frame, as a portrait
    video    each window by the source's frame at its start, as the model's own programs do it
    shared   the same, but windows that reach into an overlap by the source's frame at which the later segment
             starts, so that both renderings of the overlap follow one picture: what ``preparation`` does

The draft engine's head sways around the pose of the picture, whatever the picture is of, and goes to a new
one within half a second; ``bench.real_poses`` says how the real model does.  Printed: how far the two
renderings of an overlap are apart (97th percentile of the flow between them in pixels, mean over the frames
behind the warm-up), and the jump of a hard cut and of the morph.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bench.seam_footage import REAL_VIDEO, ROOT
from pipeline import seam_metrics
from pipeline.colours import Stack, small
from pipeline.draft import media
from pipeline.draft.drawing import Puppet, Voice, Window, draw_window
from pipeline.draft.face import find_face
from pipeline.frames import read_frames
from pipeline.optical_flow import flow_between, luma, reach
from pipeline.plan import MOTION, WARM_UP, Segment
from pipeline.preparation import picture_frames, window_starts
from pipeline.seam import join_overlap

SIZE, LENGTH, OVERLAP = 320, 153, 40


def source() -> Stack:
    """The frames of the video, or of a drawn one: a portrait that sways twice as far as others."""
    if REAL_VIDEO.is_file():
        return np.stack([small(frame, SIZE) for frame in read_frames(REAL_VIDEO)])
    portrait = media.fit(media.load_pictures(ROOT / "examples" / "portrait.png"), SIZE, SIZE)[0]
    return rendered([portrait], (375,), 99)


def rendered(pictures: Sequence[npt.NDArray[np.uint8]], windows: Sequence[int], seed: int) -> Stack:
    """A chain of silent windows, each conditioned by its picture."""
    shown: list[npt.NDArray[np.uint8]] = []
    for number, (picture, length) in enumerate(zip(pictures, windows, strict=True)):
        face = find_face(picture)
        motion = np.stack(shown[-MOTION:]) if shown else None
        voice = Voice(face, np.zeros(length, np.float32))
        window = Window(Puppet(picture, [face]), (voice,), length, 100 * seed + number, motion)
        shown += list(draw_window(window))[MOTION if shown else 0 :]
    return np.stack(shown)


def overlaps(video: Stack, way: str, seeds: int) -> list[tuple[Stack, Stack]]:
    """The frames behind the warm-up of each overlap, as both segments render them."""
    step = LENGTH - OVERLAP
    found = []
    for seed, start in itertools.product(range(seeds), range(0, len(video) - LENGTH - step + 1, 36)):
        pair = [Segment(i, start + i * step, start + i * step + LENGTH, (81, 81), i) for i in (0, 1)]
        made = []
        for segment, after in zip(pair, (pair[1].start, None), strict=True):
            starts = window_starts(segment, MOTION)
            if way == "image":
                numbers = [0] * len(starts)
            elif way == "video":
                numbers = starts
            else:
                numbers = picture_frames(starts, segment.windows, after)
            made.append(rendered([video[n] for n in numbers], segment.windows, 2 * seed + segment.index))
        found.append((made[0][step:][WARM_UP:], made[1][:OVERLAP][WARM_UP:]))
    return found


def measures(pairs: list[tuple[Stack, Stack]]) -> dict[str, float]:
    """Means over all overlaps."""
    apart, cut, shown = [], [], []
    for earlier, later in pairs:
        apart += [reach(flow_between(luma(a), luma(b))) for a, b in zip(earlier, later, strict=True)]
        natural = seam_metrics.unit([*seam_metrics.moves(earlier), *seam_metrics.moves(later)])
        middle = len(earlier) // 2
        cut.append(seam_metrics.difference(earlier[middle - 1], later[middle]) / natural)
        frames, _ = join_overlap(earlier, later, warm_up=0)
        shown.append(max(seam_metrics.moves(frames)) / natural)
    found = {"apart": apart, "hard cut": cut, "morph": shown}
    return {key: float(np.mean(values)) for key, values in found.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2, help="takes of each pair of segments")
    options = parser.parse_args()
    video = source()
    print(
        "the real video" if REAL_VIDEO.is_file() else "a drawn video", f"at {SIZE} pixels, medians of moves"
    )
    for way in ("image", "video", "shared"):
        found = measures(overlaps(video, way, options.seeds))
        print(f"{way:8}" + "".join(f"  {key} {value:6.2f}" for key, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
