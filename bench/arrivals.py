"""``python -m bench.arrivals [--json] [--plot FILE] [--trace FILE]``: latency or throughput, by the load.

The pool's rule (``scheduling.gpus_for``: over how many GPUs a job is cut) against *always split* over all
GPUs and *never split*, on traces of arrivals, in simulation: the real planner and scheduler, no real time.
Times are for windows of 12 s on every GPU; another GPU stretches all of them alike.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from bench import traces
from bench.simulation import RULES, Arrival, Outcome, simulate
from pipeline.figure import GRID, INK, Box, Colour, Figure, Line, Words
from pipeline.timeline import FPS

LOADS = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.2)
SHORT_FRAMES = 30 * FPS
"""Jobs up to so long are short ones."""
COLOURS: dict[str, Colour] = {
    "by load": (50, 110, 180),
    "always split": (214, 98, 52),
    "never split": (90, 160, 90),
}
COLUMNS = ("mean", "p50", "p95", "first_short", "makespan", "busy", "twice")


def main() -> None:
    """Simulate and print."""
    options = _options()
    rows = [row for gpus in options.gpus for row in _rows(gpus, options)]
    if options.plot is not None:
        draw([row for row in rows if row["gpus"] == options.gpus[0]], options.gpus[0]).image().save(
            options.plot
        )
    print(json.dumps(rows) if options.json else _table(rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 2, 64], help="the first is drawn")
    parser.add_argument("--jobs", type=int, default=400, help="of each trace but the batch")
    parser.add_argument(
        "--trace", type=Path, action="append", default=[], help="a recorded one (bench.traces)"
    )
    parser.add_argument("--plot", type=Path, help="the curves as a PNG")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _rows(gpus: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    count = options.jobs
    made: list[tuple[str, float | None, list[Arrival]]] = [
        ("poisson", load, traces.poisson(gpus, load, count)) for load in LOADS
    ]
    made += [("bursts of 20", load, traces.bursts(gpus, load, count)) for load in (0.4, 0.8)]
    made += [("day", load, traces.day(gpus, load, count)) for load in (0.5, 0.8)]
    made += [
        (f"recorded {path.stem}", load, traces.recorded(path, gpus, load))
        for path in options.trace
        for load in (0.5, 0.8)
    ]
    made += [("batch of 100", None, traces.batch()), ("batch of 40", None, traces.batch(40, seed=5))]
    return [
        {"trace": name, "load": load, "gpus": gpus, "rule": rule, **measures(simulate(jobs, gpus, choose))}
        for name, load, jobs in made
        for rule, choose in RULES.items()
    ]


def measures(outcome: Outcome) -> dict[str, float]:
    """Seconds but for the last two, which are shares: ``busy`` of the GPUs' time, ``twice`` of the frames."""
    times = sorted(job.turnaround for job in outcome.jobs)
    first = [job.first - job.arrival.seconds for job in outcome.jobs if job.arrival.frames <= SHORT_FRAMES]
    found = {
        "mean": mean(times),
        "p50": times[len(times) // 2],
        "p95": times[int(0.95 * len(times))],
        "first_short": mean(first),
        "makespan": outcome.makespan,
    }
    shares = {"busy": round(outcome.busy, 3), "twice": round(outcome.twice, 3)}
    return {name: round(seconds, 1) for name, seconds in found.items()} | shares


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'GPUs':>4}  {'trace':<24} {'load':>4}  {'rule':<13}" + "".join(f"{c:>12}" for c in COLUMNS)]
    for row in rows:
        load = "" if row["load"] is None else f"{row['load']:.1f}"
        cells = "".join(f"{row[column]:>12}" for column in COLUMNS)
        lines.append(f"{row['gpus']:>4}  {row['trace']:<24} {load:>4}  {row['rule']:<13}{cells}")
    return "\n".join(lines)


# --- the figure --------------------------------------------------------------------------------------

WIDTH, PANEL, TOP, LEFT, MARGIN = 1400, 300, 64, 70, 44


def draw(rows: Sequence[dict[str, Any]], gpus: int) -> Figure:
    """Curves over the load on Poisson arrivals, and bars for the other traces."""
    figure = Figure(WIDTH, TOP + 2 * PANEL)
    figure.add(Words(LEFT, 10, f"Over how many of {gpus} GPUs a job is cut: three rules", 16))
    for number, (rule, colour) in enumerate(COLOURS.items()):
        left = LEFT + 150 * number
        figure.add(Box(left, 38, left + 12, 50, colour), Words(left + 18, 37, rule))
    poisson = [row for row in rows if row["trace"] == "poisson"]
    width = WIDTH // 3
    _curves(figure, 0, width, poisson, "mean", "Poisson: mean turnaround, s", (10, 30, 100, 300, 1000, 3000))
    _curves(figure, width, width, poisson, "p95", "Poisson: p95 of it, s", (10, 30, 100, 300, 1000, 3000))
    shares = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
    _curves(figure, 2 * width, width, poisson, "twice", "Poisson: share of frames rendered twice", shares)
    _bars(figure, TOP + PANEL, [row for row in rows if row["trace"] != "poisson"], len(COLOURS))
    return figure


def _frame(
    figure: Figure, left: float, top: float, width: float, ticks: Sequence[float], name: str
) -> Callable[[float], float]:
    """A panel with its title and scale; from values to heights.  Where no tick is 0, it is logarithmic."""
    base, height = top + PANEL - MARGIN, PANEL - MARGIN - 40
    scale = (lambda value: value) if not ticks[0] else math.log

    def level(value: float) -> float:
        return base - height * (scale(value) - scale(ticks[0])) / (scale(ticks[-1]) - scale(ticks[0]))

    figure.add(Words(left + LEFT, top + 8, name, 13))
    for tick in ticks:
        figure.add(Line(((left + LEFT, level(tick)), (left + width - 16, level(tick))), GRID))
        figure.add(Words(left + LEFT - 6, level(tick) - 7, f"{tick:g}", 11, INK, "end"))
    return level


def _curves(
    figure: Figure,
    left: float,
    width: float,
    rows: Sequence[dict[str, Any]],
    key: str,
    name: str,
    ticks: Sequence[float],
) -> None:
    values = [row[key] for row in rows]
    below = [tick for tick in ticks if tick <= min(values)][-1:]
    above = [tick for tick in ticks if tick >= max(values)][:1]
    between = [tick for tick in ticks if min(values) < tick < max(values)]
    level = _frame(figure, left, TOP, width, [*below, *between, *above], name)

    def at(load: float) -> float:
        return left + LEFT + (width - LEFT - 30) * (load - LOADS[0]) / (LOADS[-1] - LOADS[0])

    for load in LOADS:
        figure.add(Words(at(load), TOP + PANEL - MARGIN + 5, f"{load:g}", 11, INK, "middle"))
    figure.add(Words(left + width - 16, TOP + PANEL - 22, "load", 11, INK, "end"))
    for rule, colour in COLOURS.items():
        points = [(at(row["load"]), level(row[key])) for row in rows if row["rule"] == rule]
        figure.add(Line(points, colour, 2))
        figure.add(*(Box(x - 3, y - 3, x + 3, y + 3, colour) for x, y in points))


def _bars(figure: Figure, top: float, rows: Sequence[dict[str, Any]], rules: int) -> None:
    """Mean turnarounds over the shortest of the trace; what it is in seconds stands on the bar."""
    groups = [rows[number : number + rules] for number in range(0, len(rows), rules)]
    best = [min(row["mean"] for row in group) for group in groups]
    most = max(row["mean"] / least for group, least in zip(groups, best, strict=True) for row in group)
    ticks = [0.5 * number for number in range(math.ceil(2 * most) + 1)]
    name = "Other traces: mean turnaround over that of the best rule; on the bars in seconds"
    level = _frame(figure, 0, top, WIDTH, ticks, name)
    each = (WIDTH - LEFT - 16) / len(groups)
    for number, (group, least) in enumerate(zip(groups, best, strict=True)):
        for place, row in enumerate(group):
            left = LEFT + each * (number + 0.12 + 0.25 * place)
            high = level(row["mean"] / least)
            figure.add(Box(left, high, left + 0.23 * each, level(0), COLOURS[row["rule"]]))
            words = f"{row['mean']:.0f}"
            figure.add(Words(left + 0.115 * each, high - 14, words, 11, INK, "middle"))
        load = group[0]["load"]
        words = group[0]["trace"] if load is None else f"{group[0]['trace']}, load {load:g}"
        figure.add(Words(LEFT + each * (number + 0.5), level(0) + 5, words, 11, INK, "middle"))


if __name__ == "__main__":
    main()
