"""Colours of one long chain against those of joined segments, in a model of a drift.

``python -m bench.drift [--plot FILE]``

The model: the draft engine's drawing gets 0.005 levels warmer with each frame (red up, blue down), from the
colours of the frames that a window continues; a new chain starts from the reference picture.  That
InfiniteTalk drifts after about a minute is its authors' word; how fast was not measured.  Segments, seams and
what is done to the colours of a window (``colour_drift``) are the pipeline's.  The plot shows the red
channel's distance from the reference.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pipeline.colour_drift import NOTHING, find_drift
from pipeline.colours import Stack
from pipeline.draft import media
from pipeline.draft.drawing import Puppet, Voice, Window, draw_window
from pipeline.draft.face import find_face
from pipeline.plan import MOTION, Segment, calculate_segments
from pipeline.seam import join_overlap

ROOT = Path(__file__).resolve().parent.parent
SIZE, FRAMES, DRIFT = 64, 4500, 0.005
COLOURS = ("#c02020", "#e09020", "#2050c0", "#20a040", "#808080")
STEP_FRAMES = 50
"""A step is looked for between means of so many frames: breath, not noise."""


def chain(
    windows: Sequence[int], seed: int, drift: float = DRIFT, *, match: bool = False
) -> Iterator[np.ndarray]:
    """The frames of a chain of windows, each continuing from the frames of the one before as they are shown.

    ``match``: with their colours matched, as ``segment`` does it.
    """
    portrait = media.fit(media.load_pictures(ROOT / "examples" / "portrait.png"), SIZE, SIZE)[0]
    face = find_face(portrait)
    puppet, motion = Puppet(portrait, [face]), None
    for number, length in enumerate(windows):
        voice = Voice(face, np.zeros(length, np.float32))
        drawn = list(draw_window(Window(puppet, (voice,), length, seed * 1000 + number, motion, drift)))
        new = drawn[0 if motion is None else len(motion) :]
        colours = find_drift([portrait] * len(new), new.__getitem__) if match else NOTHING
        shown = [colours.corrected(t, frame) for t, frame in enumerate(new)]
        yield from shown
        motion = np.stack(shown[-MOTION:])


def joined(
    segments: tuple[Segment, ...], drift: float = DRIFT, *, match: bool = False
) -> Iterator[np.ndarray]:
    """The frames of all segments, seams made as a job makes them."""
    kept: Stack | None = None
    for segment, after in zip(segments, (*segments[1:], None), strict=True):
        frames = np.stack(list(chain(segment.windows, segment.index, drift, match=match)))[: segment.frames]
        head = 0 if kept is None else len(kept)
        tail = 0 if after is None else segment.stop - after.start
        if kept is not None:
            yield from join_overlap(kept, frames[:head])[0]
        yield from frames[head : len(frames) - tail]
        kept = frames[len(frames) - tail :]


def colours(frames: Iterator[np.ndarray]) -> np.ndarray:
    """How far red and blue are from the first frame, levels of 255: [frames, 2]; of the lowest rows."""
    levels = np.array([frame[-8:, :, ::2].reshape(-1, 2).mean(axis=0) for frame in frames])
    return np.asarray(levels - levels[0])


def measures(levels: np.ndarray) -> dict[str, float]:
    """Largest and mean distance from the reference; largest change from frame to frame, and within 2 s."""
    return {
        "largest drift": float(np.abs(levels).max()),
        "mean drift": float(np.abs(levels).mean()),
        "largest step": float(np.abs(np.diff(levels, axis=0)).max()),
        "largest turn in 2 s": float(np.abs(levels[STEP_FRAMES:] - levels[:-STEP_FRAMES]).max()),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", type=Path, metavar="FILE")
    options = parser.parse_args()
    plan = calculate_segments(FRAMES, 8)
    one = (81,) * (1 + -(-(FRAMES - 81) // 72))
    rows = {
        "one chain": colours(chain(one, 1))[:FRAMES],
        "one chain, matched": colours(chain(one, 1, match=True))[:FRAMES],
        f"{len(plan.segments)} segments": colours(joined(plan.segments)),
        f"{len(plan.segments)} segments, matched": colours(joined(plan.segments, match=True)),
        "without drift, matched": colours(joined(plan.segments, 0.0, match=True)),
    }
    for name, levels in rows.items():
        print(f"{name:24}" + "".join(f"  {key} {value:6.2f}" for key, value in measures(levels).items()))
    if options.plot is not None:
        plot(rows, options.plot)


def plot(rows: dict[str, np.ndarray], target: Path) -> None:
    """Red against time, one line each."""
    from PIL import Image, ImageDraw

    width, height, top = 900, 300, max(float(levels.max()) for levels in rows.values()) + 1
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    for colour, (name, levels) in zip(COLOURS, rows.items(), strict=True):
        points = [
            (40 + t / len(levels) * (width - 60), height - 25 - (level + 2) / (top + 2) * (height - 50))
            for t, level in enumerate(levels[:, 0])
        ]
        draw.line(points, fill=colour, width=2)
        draw.text((50, 12 + 14 * list(rows).index(name)), name, fill=colour)
    for level in range(0, int(top) + 1, 5):
        y = height - 25 - (level + 2) / (top + 2) * (height - 50)
        draw.text((8, y - 5), str(level), fill="black")
        draw.line([(36, y), (width - 20, y)], fill="#e0e0e0")
    draw.text(
        (40, height - 18), f"red above the reference, levels of 255; 0 to {FRAMES // 25} s", fill="black"
    )
    picture.save(target)


if __name__ == "__main__":
    main()
