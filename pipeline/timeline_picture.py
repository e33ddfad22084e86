"""Timelines as a picture: a row for each GPU with its windows, and above them what each job did besides.

What is drawn is ``job_timeline``'s; how it becomes pixels or SVG is ``figure``'s.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.figure import FAINT, GRID, INK, PAPER, Box, Colour, Figure, Line, Words, round_step
from pipeline.job_timeline import ON_GPU, JobTimeline, Span, numbers, rows, title, union, with_nodes

WIDTH, LEFT, RIGHT, TOP = 1400, 150, 24, 70
GPU_ROW, LEAST_ROW, JOB_ROW, SEAM_ROW, AXIS = 26, 3, 16, 7, 40
MOST_HEIGHT = 1600
"""Of all GPU rows together; with very many GPUs they become thinner."""
MOST_JOB_ROWS = 12
"""With more jobs than that only GPUs are drawn."""
SMALL, NORMAL = 10, 12
IDLE: Colour = (246, 246, 246)
LOST: Colour = (100, 30, 30)
REST: Colour = (214, 214, 214)
STAGES: dict[str, Colour] = {
    "queued": (235, 225, 200),
    "preparing": (150, 175, 205),
    "starting": (185, 165, 205),
    "waiting": (240, 200, 120),
    "joining": (140, 190, 150),
}
SEAM: Colour = (60, 130, 70)
GAP_SECONDS, GAP_SHARE = 20.0, 0.2
"""A time in which nothing at all happened is cut out where it is longer than both: seconds, and share of the
time in which something did."""
GAP_WIDTH = 26


def draw_timeline(jobs: Sequence[JobTimeline]) -> Figure:
    """One picture of one job or of many that shared GPUs, coloured by segment or by job.

    Raises ``ValueError`` for timelines without spans.
    """
    jobs = with_nodes([job for job in jobs if job.spans])
    spans = [span for job in jobs for span in job.spans]
    axis = _Axis.of(spans)
    places = sorted({span.place for span in spans if span.place is not None})
    row = max(LEAST_ROW, min(GPU_ROW, MOST_HEIGHT // max(1, len(places))))
    with_steps = jobs if len(jobs) <= MOST_JOB_ROWS else []
    tracks = [rows([span for span in job.spans if span.kind == "seam"]) for job in with_steps]
    steps = [JOB_ROW + SEAM_ROW * len(seams) + 6 for seams in tracks]
    height = TOP + sum(steps) + len(places) * row + AXIS
    figure = Figure(WIDTH, height)
    _head(figure, jobs, len(places))
    _grid(figure, axis, height - AXIS)
    top = float(TOP)
    for job, seams, tall in zip(with_steps, tracks, steps, strict=True):
        _steps(figure, axis, job, seams, top)
        top += tall
    colours = _by_segment(jobs[0]) if len(jobs) == 1 else _by_job(jobs)
    for place in places:
        _gpu(figure, axis, jobs, place, top, row, colours)
        top += row
    return figure


@dataclass(frozen=True, slots=True)
class _Axis:
    """From seconds to pixels: times in which something happened, with small gaps between them."""

    parts: tuple[tuple[float, float], ...]
    scale: float
    """Pixels a second."""

    @classmethod
    def of(cls, spans: Sequence[Span]) -> _Axis:
        busy = union([(span.begin, span.end) for span in spans])
        if not busy:
            raise ValueError("there is nothing to draw")
        whole = sum(end - begin for begin, end in busy)
        parts = [busy[0]]
        for begin, end in busy[1:]:
            if begin - parts[-1][1] > max(GAP_SECONDS, GAP_SHARE * whole):
                parts.append((begin, end))
            else:
                parts[-1] = (parts[-1][0], end)
        room = WIDTH - LEFT - RIGHT - GAP_WIDTH * (len(parts) - 1)
        return cls(tuple(parts), room / max(sum(end - begin for begin, end in parts), 1e-3))

    def at(self, when: float) -> float:
        left = float(LEFT)
        for begin, end in self.parts:
            if when <= end or (begin, end) == self.parts[-1]:
                return left + self.scale * (min(max(when, begin), end) - begin)
            left += self.scale * (end - begin) + GAP_WIDTH
        return left


def _head(figure: Figure, jobs: Sequence[JobTimeline], gpus: int) -> None:
    found = numbers(jobs)
    name = f"job {jobs[0].job}" if len(jobs) == 1 else f"{len(jobs)} jobs"
    words = (
        f"{name}   {gpus} GPUs, {found['gpu_busy_share']:.1%} busy"
        f" in {found['render_seconds']:.1f} s of rendering"
        f"   waiting {found['waiting_seconds']:.1f} s   joining {found['joining_seconds']:.1f} s"
        f"   lost {found['lost_gpu_seconds']:.1f} GPU seconds"
    )
    figure.add(Words(LEFT, 10, words, 14))
    left = float(LEFT)
    legend = [(kind, STAGES[kind]) for kind in STAGES if found[f"{kind}_seconds"]]
    legend += [("seam", SEAM)] if any(s.kind == "seam" for job in jobs for s in job.spans) else []
    legend += [("GPU: storing, transport", REST), ("lost or cancelled", LOST), ("idle", IDLE)]
    for label, colour in legend:
        figure.add(Box(left, 38, left + 12, 50, colour, FAINT), Words(left + 18, 37, label, NORMAL))
        left += 36 + 7 * len(label)
    what = "segments" if len(jobs) == 1 else "jobs"
    figure.add(Words(left, 37, f"other colours: windows, by {what}", NORMAL))


def _grid(figure: Figure, axis: _Axis, bottom: float) -> None:
    """Seconds since the first moment; times of day where something was cut out."""
    origin = axis.parts[0][0]
    whole = sum(end - begin for begin, end in axis.parts)
    step = round_step(whole, 16)
    for number, (begin, end) in enumerate(axis.parts):
        tick = -(-(begin - origin) // step) * step
        while origin + tick <= end:
            at = axis.at(origin + tick)
            figure.add(Line(((at, TOP - 4), (at, bottom)), GRID))
            figure.add(Words(at, bottom + 4, f"{tick:g}", NORMAL, INK, "middle"))
            tick += step
        if number:
            before = axis.parts[number - 1][1]
            middle = axis.at(begin) - GAP_WIDTH / 2
            figure.add(Words(middle, TOP - 16, f"{begin - before:.0f} s", SMALL, FAINT, "middle"))
            figure.add(Line(((middle, TOP - 4), (middle, bottom)), FAINT))
    figure.add(Words(WIDTH - RIGHT, bottom + 20, "seconds", NORMAL, INK, "end"))


def _steps(figure: Figure, axis: _Axis, job: JobTimeline, seams: list[list[Span]], top: float) -> None:
    figure.add(Words(LEFT - 8, top + 1, job.job[:20], NORMAL, INK, "end"))
    for span in job.spans:
        if span.kind in STAGES:
            left, right = axis.at(span.begin), axis.at(span.end)
            figure.add(Box(left, top, right, top + JOB_ROW - 2, STAGES[span.kind], None, _told(job, span)))
            _label(figure, left, right, top, JOB_ROW - 2, span.kind)
    for number, track in enumerate(seams):
        level = top + JOB_ROW + number * SEAM_ROW
        for span in track:
            box = (axis.at(span.begin), level, axis.at(span.end), level + SEAM_ROW - 2)
            figure.add(Box(*box, SEAM, PAPER, _told(job, span)))


def _gpu(
    figure: Figure,
    axis: _Axis,
    jobs: Sequence[JobTimeline],
    place: tuple[str, int],
    top: float,
    row: int,
    colours: Callable[[JobTimeline, Span], Colour],
) -> None:
    bottom = top + row - (2 if row > 8 else 0)
    if row >= NORMAL:
        node = f"{place[0][:12]} " if place[0] else ""
        figure.add(Words(LEFT - 8, top + (row - NORMAL) / 2 - 2, f"{node}GPU {place[1]}", NORMAL, INK, "end"))
    for begin, end in axis.parts:
        figure.add(Box(axis.at(begin), top, axis.at(end), bottom, IDLE))
    here = [(job, span) for job in jobs for span in job.spans if span.place == place and span.kind in ON_GPU]
    for job, span in sorted(here, key=lambda pair: pair[1].kind):  # windows upon segments
        left, right = axis.at(span.begin), axis.at(span.end)
        if span.kind == "segment":
            fill = REST if span.outcome in ("done", "open") else LOST
            figure.add(Box(left, top, right, bottom, fill, None, _told(job, span)))
        else:
            outline = PAPER if right - left > 4 and row > 8 else None
            figure.add(Box(left, top, right, bottom, colours(job, span), outline, _told(job, span)))
    for job, span in here:
        if span.kind == "segment" and row >= NORMAL + 4:
            words = str(span.segment) if len(jobs) == 1 else job.job
            _label(figure, axis.at(span.begin), axis.at(span.end), top, row - 2, words)


def _label(figure: Figure, left: float, right: float, top: float, height: float, words: str) -> None:
    """In the middle of a box, where there is room."""
    if right - left > 6.5 * len(words) + 4:
        figure.add(Words((left + right) / 2, top + (height - NORMAL) / 2 - 1, words, NORMAL, INK, "middle"))


def _told(job: JobTimeline, span: Span) -> str:
    return f"{job.job}: {title(span)}, {span.seconds:.2f} s from {span.begin - job.began:.2f} s"


def _by_segment(job: JobTimeline) -> Callable[[JobTimeline, Span], Colour]:
    return lambda _, span: _colour(span.segment or 0, span.number or 0)


def _by_job(jobs: Sequence[JobTimeline]) -> Callable[[JobTimeline, Span], Colour]:
    place = {id(job): number for number, job in enumerate(jobs)}
    return lambda job, span: _colour(place[id(job)], span.number or 0)


def _colour(number: int, shade: int) -> Colour:
    """Hues of neighbouring numbers are far apart (the golden angle); windows take turns in lightness."""
    red, green, blue = colorsys.hls_to_rgb((0.58 + 0.381966 * number) % 1.0, 0.66 + 0.07 * (shade % 2), 0.62)
    return round(255 * red), round(255 * green), round(255 * blue)
