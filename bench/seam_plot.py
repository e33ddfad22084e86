"""The figure of ``bench.seams``: one panel for each measure, a bar for each method, the goals as lines."""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageDraw, ImageFont

PANELS = (
    ("jump", "J_full: largest move / natural p99 (lower is better)", 4.0),
    ("speed", "J_flow: largest speed / natural p99 (lower is better)", 3.0),
    ("ghosting", "aligned SSIM: 1 is no ghost (higher is better)", 1.0),
    ("sharpness", "sharpness: detail / that of the renderings (higher is better)", 1.2),
    ("colour_step", "colour step: levels of 255 from frame to frame (lower is better)", 4.0),
)
"""Measure, title, and where its axis ends; longer bars are cut off and say their value."""
LOWEST = {"ghosting": 0.85}
"""Where an axis does not begin at 0."""
COLOURS = ((160, 70, 60), (214, 150, 90), (120, 120, 130), (165, 180, 200), (50, 110, 180), (90, 160, 90))
WIDTH, PANEL, TOP, LEFT, MARGIN = 1400, 210, 60, 60, 34
INK, GRID, GOAL = (30, 30, 30), (225, 225, 225), (30, 140, 60)


def draw(rows: list[dict[str, Any]], goals: dict[str, float]) -> Image.Image:
    """The worst seam of each row."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    picture = Image.new("RGB", (WIDTH, TOP + len(PANELS) * PANEL), (255, 255, 255))
    drawing, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    drawing.text((LEFT, 10), "Worst seam of each kind of footage; green: the goal", INK, font)
    for number, method in enumerate(methods):
        left = LEFT + 150 * number
        drawing.rectangle((left, 36, left + 12, 48), fill=COLOURS[number])
        drawing.text((left + 18, 33), method, INK, font)
    for number, (key, title, most) in enumerate(PANELS):
        _panel(drawing, TOP + number * PANEL, rows, methods, key, title, most, goals[key])
    return picture


def _panel(
    drawing: ImageDraw.ImageDraw,
    top: int,
    rows: list[dict[str, Any]],
    methods: list[str],
    key: str,
    title: str,
    most: float,
    goal: float,
) -> None:
    font, tiny = ImageFont.load_default(12), ImageFont.load_default(9)
    base, height, least = top + PANEL - MARGIN, PANEL - 2 * MARGIN, LOWEST.get(key, 0.0)

    def level(value: float) -> float:
        return base - height * (min(max(value, least), most) - least) / (most - least)

    drawing.text((LEFT, top + 8), title, INK, font)
    for tick in (least, (least + most) / 2, most):
        drawing.line((LEFT, level(tick), WIDTH - 20, level(tick)), fill=GRID)
        drawing.text((12, level(tick) - 7), f"{tick:.2f}", INK, font)
    kinds = list(dict.fromkeys(row["footage"] for row in rows))
    group = (WIDTH - LEFT - 20) / len(kinds)
    bar = group / (len(methods) + 1.5)
    for row in rows:
        place = kinds.index(row["footage"]), methods.index(row["method"])
        left = LEFT + place[0] * group + (place[1] + 0.5) * bar
        value = row["worst"][key]
        drawing.rectangle((left, level(value), left + bar - 2, base), fill=COLOURS[place[1]])
        drawing.text((left, level(value) - 11), f"{value:.3f}" if least else f"{value:.2f}", INK, tiny)
    for number, kind in enumerate(kinds):
        drawing.text((LEFT + number * group + 0.5 * bar, base + 4), kind, INK, font)
    drawing.line((LEFT, level(goal), WIDTH - 20, level(goal)), fill=GOAL, width=2)
