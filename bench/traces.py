"""Arrivals of jobs: generators with seeds, and files that somebody recorded.

A job's length is drawn from a mix: mostly clips of half a minute, some talks of minutes (log-normal, 2 s to
10 min).  Nobody recorded such a mix; it is an assumption.  *Load* is the work that comes in a second,
unsplit, over what the GPUs can do in one.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Sequence
from datetime import datetime
from itertools import accumulate
from pathlib import Path

from bench.simulation import Arrival, cost, plan_for
from pipeline.timeline import FPS

MEDIAN_SECONDS, SPREAD = 30.0, 1.0
SHORTEST, LONGEST = 2.0, 600.0
DAY = 24 * 3600.0


def lengths(count: int, dice: random.Random) -> list[int]:
    """Frames of so many videos."""
    seconds = (MEDIAN_SECONDS * math.exp(dice.gauss(0, SPREAD)) for _ in range(count))
    return [round(FPS * min(max(length, SHORTEST), LONGEST)) for length in seconds]


def work(frames: Sequence[int]) -> float:
    """GPU seconds of videos that are not split."""
    return sum(cost(segment.windows) for length in frames for segment in plan_for(length, 1).segments)


def poisson(gpus: int, load: float, count: int = 400, seed: int = 1) -> list[Arrival]:
    """Jobs that come independently of each other."""
    dice = random.Random(seed)
    frames = lengths(count, dice)
    mean = work(frames) / count / (gpus * load)
    times = accumulate(dice.expovariate(1 / mean) for _ in range(count))
    return [Arrival(when, length) for when, length in zip(times, frames, strict=True)]


def bursts(gpus: int, load: float, count: int = 400, seed: int = 2, size: int = 20) -> list[Arrival]:
    """Twenty jobs within a moment, then nothing for long."""
    dice = random.Random(seed)
    frames = lengths(count, dice)
    apart = work(frames) / count * size / (gpus * load)
    return [Arrival(number // size * apart + dice.random(), length) for number, length in enumerate(frames)]


def batch(count: int = 100, seed: int = 3) -> list[Arrival]:
    """All at once."""
    return [Arrival(0.0, length) for length in lengths(count, random.Random(seed))]


def day(gpus: int, load: float, count: int = 600, seed: int = 4) -> list[Arrival]:
    """A day of which the nights are quiet: the rate is a sine, from a tenth of its mean to nearly twice it.

    The day is as long as its jobs make it at this load.
    """
    dice = random.Random(seed)
    frames = lengths(count, dice)
    whole = work(frames) / (gpus * load)
    times: list[float] = []
    while len(times) < count:  # thinning
        when = dice.random()
        if dice.random() * 1.9 < 1 - 0.9 * math.cos(2 * math.pi * when):
            times.append(when * whole)
    return [Arrival(when, length) for when, length in zip(sorted(times), frames, strict=True)]


def recorded(path: Path, gpus: int, load: float, count: int = 1000) -> list[Arrival]:
    """The first jobs of a CSV file: a time (``seconds`` or ``TIMESTAMP``) and a size in its last column.

    The times are stretched, and the sizes scaled to a median of half a minute, so that they make this load.
    """
    with path.open(newline="") as file:
        rows = [row for row, _ in zip(csv.reader(file), range(count + 1), strict=False)][1:]
    sizes = [float(row[-1]) for row in rows]
    median = sorted(sizes)[len(sizes) // 2]
    seconds = [MEDIAN_SECONDS * size / median for size in sizes]
    frames = [round(FPS * min(max(length, SHORTEST), LONGEST)) for length in seconds]
    times = [_time(row[0]) for row in rows]
    scale = work(frames) / (gpus * load) / (times[-1] - times[0])
    return [Arrival((when - times[0]) * scale, length) for when, length in zip(times, frames, strict=True)]


def _time(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        whole, _, fraction = text.partition(".")
        return datetime.fromisoformat(whole).timestamp() + float(f"0.{fraction or 0}")
