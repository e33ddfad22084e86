"""``python -m bench.seams [--json]``: every way of joining, on every kind of disagreement, side by side.

The measures are ``pipeline.seam_metrics``', the same as in every result's report, but on all frames of the
transition and with motion from all frames of the footage.  ``--plot FILE`` draws them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from bench.seam_footage import REAL_VIDEO, Footage, Trial, footage
from bench.seam_plot import draw
from pipeline import seam_metrics
from pipeline.frames import Frame
from pipeline.morph import mixed
from pipeline.seam import CROSSFADE, WARM_UP, Method, join_overlap
from pipeline.timeline import FPS

GOALS = {"jump": 1.3, "speed": 1.1, "sharpness": 0.85, "ghosting": 0.98, "colour_step": 0.5}
"""Of docs/seams.md: jump and speed at most, in natural 99th percentiles; colour step at most, in levels."""

HEAD = (
    "footage",
    "method",
    "J_full/nat",
    "J_flow/nat",
    "alone",
    "sharpness",
    "aSSIM",
    "colour: all / alone / mid",
    "frames",
    "goals missed",
)

Made = tuple[list[Frame], int, int]
"""The overlap's frames, and those in ``[first, stop)`` that are neither rendering's own."""


def hard_cut(trial: Trial) -> Made:
    """In the middle, whatever is there."""
    middle = len(trial.earlier) // 2
    return [*trial.earlier[:middle], *trial.later[middle:]], middle, middle


def short_crossfade(trial: Trial) -> Made:
    """Eight frames around the best pair."""
    count = len(trial.earlier)
    best = min(range(WARM_UP, count), key=lambda t: seam_metrics.difference(trial.earlier[t], trial.later[t]))
    first = min(max(best - CROSSFADE // 2, WARM_UP), count - CROSSFADE)
    pairs = list(zip(trial.earlier, trial.later, strict=True))
    blend = [mixed(*pairs[first + i], (i + 1) / (CROSSFADE + 1)) for i in range(CROSSFADE)]
    return [*trial.earlier[:first], *blend, *trial.later[first + CROSSFADE :]], first, first + CROSSFADE


def joined(method: Method) -> Callable[[Trial], Made]:
    """What the pipeline does with ``seam: METHOD``."""

    def make(trial: Trial) -> Made:
        frames, report = join_overlap(trial.earlier, trial.later, method=method, levels=trial.levels)
        return frames, report.frame, report.frame + report.frames

    return make


METHODS: dict[str, Callable[[Trial], Made]] = {
    "hard cut": hard_cut,
    "best-pair cut": joined("cut"),
    "crossfade 40": joined("crossfade"),
    "crossfade 8": short_crossfade,
    "morph": joined("morph"),
}


@dataclass(frozen=True, slots=True)
class Natural:
    """What motion does in undisturbed footage: 99th percentiles of moves and speeds, each over the median of
    the 25 frames on either side."""

    jump: float
    speed: float

    @classmethod
    def of(cls, footage: Footage) -> Natural:
        jumps = [m for frames in footage.sources for m in seam_metrics.relative(seam_metrics.moves(frames))]
        speeds = [s for frames in footage.sources for s in seam_metrics.relative(seam_metrics.speeds(frames))]
        return cls(seam_metrics.natural(jumps), seam_metrics.natural(speeds))


def measured(trial: Trial, natural: Natural, method: str) -> dict[str, float]:
    """Make one seam, measure it; ``alone`` is J_flow of the renderings themselves in the same frames."""
    began = time.monotonic()
    frames, first, stop = METHODS[method](trial)
    seconds = time.monotonic() - began
    around = [trial.before[-FPS - 1 :], trial.after[: FPS + 1]]
    # The overlap's neighbours stand for what is before its first and after its last frame.
    span = [trial.before[-1], *frames, trial.after[0]][first : stop + 2]
    alone = [
        [trial.before[-1], *trial.earlier][first : stop + 2],
        [*trial.later, trial.after[0]][max(first - 1, 0) : stop + 1],
    ]
    looks = [
        seam_metrics.fidelity(frames[t], (trial.earlier[t], trial.later[t])) for t in _checked(first, stop)
    ] or [(1.0, 1.0)]
    usual_move = seam_metrics.unit([m for part in around for m in seam_metrics.moves(part)])
    usual_speed = seam_metrics.unit([s for part in around for s in seam_metrics.speeds(part)])
    return {
        "jump": max(seam_metrics.moves(span)) / usual_move / natural.jump,
        "speed": max(seam_metrics.speeds(span)) / usual_speed / natural.speed,
        "alone": max(max(seam_metrics.speeds(part), default=0.0) for part in alone)
        / usual_speed
        / natural.speed,
        "sharpness": float(np.mean([sharp for _, sharp in looks])),
        "ghosting": float(np.mean([similar for similar, _ in looks])),
        "worst_frame": min(similar for similar, _ in looks),
        "colour_step": colour_step_all(span),
        "colour_alone": max(map(colour_step_all, alone)),
        "colour_step_middle": seam_metrics.colour_step(span),
        "frames": stop - first,
        "changed": float(
            np.mean([np.abs(f.astype(int) - a).mean() for f, a in zip(frames, trial.earlier, strict=True)])
        ),
        "seconds": seconds,
    }


def colour_step_all(frames: Sequence[Frame]) -> float:
    """Largest change of a channel's mean over *all* pixels, which motion changes too: the goal's definition.

    A result's verdict takes the middle half of the changes, ``seam_metrics.colour_step``.
    """
    means = [frame.reshape(-1, 3).mean(axis=0) for frame in frames]
    return float(max((np.abs(b - a).max() for a, b in pairwise(means)), default=0.0))


def _checked(first: int, stop: int) -> Sequence[int]:
    """At most 8 frames of a transition."""
    return (
        sorted({int(t) for t in np.linspace(first, stop - 1, min(stop - first, 8))}) if stop > first else []
    )


def rows(kind: Footage, pool: ProcessPoolExecutor) -> list[dict[str, Any]]:
    """One row for each method."""
    natural = Natural.of(kind)
    jobs = {name: pool.map(measured, kind.trials, repeat(natural), repeat(name)) for name in METHODS}
    return [_row(kind, natural, name, list(found)) for name, found in jobs.items()]


def _row(kind: Footage, natural: Natural, name: str, found: list[dict[str, float]]) -> dict[str, Any]:
    """The worst seam decides; means stand beside it."""
    worst = {
        key: (min if key in ("sharpness", "ghosting", "worst_frame") else max)(seam[key] for seam in found)
        for key in found[0]
    }
    mean = {key: float(np.mean([seam[key] for seam in found])) for key in found[0]}
    missed = [
        key
        for key, goal in GOALS.items()
        if (worst[key] < goal if key in ("sharpness", "ghosting") else worst[key] > goal)
    ]
    return {
        "footage": kind.name,
        "method": name,
        "seams": len(found),
        "natural": {"jump": round(natural.jump, 2), "speed": round(natural.speed, 2)},
        "worst": {key: round(value, 4) for key, value in worst.items()},
        "mean": {key: round(value, 4) for key, value in mean.items()},
        "missed": missed,
    }


def line_of(row: dict[str, Any]) -> str:
    """The worst seam, and the mean of all in brackets."""
    worst, mean = row["worst"], row["mean"]
    both = [f"{worst[key]:.2f} ({mean[key]:.2f})" for key in ("jump", "speed", "sharpness")]
    both.insert(2, f"{worst['alone']:.2f}")
    ghost = f"{worst['ghosting']:.3f} ({mean['ghosting']:.3f})"
    # The renderings themselves do as much in those frames: the goal asks for less than nature there.
    nature = {
        "speed": worst["speed"] <= GOALS["speed"] * worst["alone"],
        "colour_step": worst["colour_step"] <= worst["colour_alone"] + 0.02,
    }
    missed = [f"{key}*" if nature.get(key) else key for key in row["missed"]]
    steps = f"{worst['colour_step']:.2f} / {worst['colour_alone']:.2f} / {worst['colour_step_middle']:.2f}"
    ends = [steps, f"{mean['frames']:.0f}", ", ".join(missed) or "-"]
    return _line([row["footage"], row["method"], *both, ghost, *ends])


def _line(cells: Sequence[str]) -> str:
    widths = (12, 13, 12, 12, 5, 12, 14, 25, 6, 0)
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def main() -> None:
    options = _options()
    if options.read is not None:
        result = json.loads(options.read.read_text())
        print(_line(HEAD), *(line_of(row) for row in result["rows"]), sep="\n")
    else:
        result = _run(options)
    if options.json:
        print(json.dumps(result, indent=1))
    if options.plot is not None:
        draw(result["rows"], result["goals"]).save(options.plot)


def _run(options: argparse.Namespace) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    kinds: dict[str, str] = {}
    if not options.json:
        if not options.video.is_file():
            print(f"{options.video} is not here: the draft engine's footage only")
        print(_line(HEAD), flush=True)
    fresh = get_context("spawn")  # OpenCV's threads do not survive a fork
    with ProcessPoolExecutor(options.workers, fresh, cv2.setNumThreads, (1,)) as pool:
        for kind in footage(options.size, options.seams, options.only or (), options.video):
            kinds[kind.name] = kind.what
            found += rows(kind, pool)
            lines = (line_of(row) for row in found[-len(METHODS) :])
            print(*lines, sep="\n", flush=True, file=sys.stderr if options.json else sys.stdout)
    settings = {"size": options.size, "seams": options.seams, "real_video": options.video.is_file()}
    return {**settings, "goals": GOALS, "footage": kinds, "rows": found}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=458, help="pixels of a picture's longer side")
    parser.add_argument("--seams", type=int, default=2, help="of each kind of footage")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="+", metavar="FOOTAGE")
    parser.add_argument("--video", type=Path, default=REAL_VIDEO, help="of a person who talks, for S0 to S5")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--read", type=Path, metavar="FILE.json", help="show what --json printed earlier")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
