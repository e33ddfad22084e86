"""Boxes, lines and words: one drawing, as a PNG and as an SVG.

What is drawn, and where, is its callers' business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal
from xml.sax.saxutils import escape

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Anchor = Literal["start", "middle", "end"]
PAPER: Colour = (255, 255, 255)
INK: Colour = (30, 30, 30)
FAINT: Colour = (150, 150, 150)
GRID: Colour = (228, 228, 228)
PNG_ANCHORS: dict[Anchor, str] = {"start": "la", "middle": "ma", "end": "ra"}
ASCENT = 0.93
"""Of a font's size, from the top of a line of words to the line they stand on."""


@dataclass(frozen=True, slots=True)
class Box:
    """A filled rectangle; ``title`` is shown by browsers that show an SVG."""

    left: float
    top: float
    right: float
    bottom: float
    fill: Colour
    outline: Colour | None = None
    title: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """Through all of the points."""

    points: Sequence[tuple[float, float]]
    colour: Colour
    width: int = 1


@dataclass(frozen=True, slots=True)
class Words:
    """A line of words; ``left`` is where they start, their middle or their end."""

    left: float
    top: float
    text: str
    size: int = 12
    colour: Colour = INK
    anchor: Anchor = "start"


@dataclass(slots=True)
class Figure:
    """A drawing of so many pixels; what was added last is on top."""

    width: int
    height: int
    shapes: list[Box | Line | Words] = field(default_factory=list)

    def add(self, *shapes: Box | Line | Words) -> None:
        """Draw on it."""
        self.shapes += shapes

    def image(self) -> Image.Image:
        """As pixels."""
        picture = Image.new("RGB", (self.width, self.height), PAPER)
        drawing = ImageDraw.Draw(picture)
        fonts = {
            shape.size: ImageFont.load_default(shape.size)
            for shape in self.shapes
            if isinstance(shape, Words)
        }
        for shape in self.shapes:
            if isinstance(shape, Box):
                box = (shape.left, shape.top, max(shape.right, shape.left), max(shape.bottom, shape.top))
                drawing.rectangle(box, shape.fill, shape.outline)
            elif isinstance(shape, Line):
                drawing.line([*shape.points], shape.colour, shape.width)
            else:
                place, anchor = (shape.left, shape.top), PNG_ANCHORS[shape.anchor]
                drawing.text(place, shape.text, shape.colour, fonts[shape.size], anchor)
        return picture

    def svg(self) -> str:
        """As an SVG document."""
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" '
            f'viewBox="0 0 {self.width} {self.height}" font-family="sans-serif">',
            f'<rect width="100%" height="100%" fill="{_hex(PAPER)}"/>',
            *(_svg(shape) for shape in self.shapes),
            "</svg>",
        ]
        return "\n".join(lines) + "\n"


def _svg(shape: Box | Line | Words) -> str:
    if isinstance(shape, Box):
        stroke = f' stroke="{_hex(shape.outline)}"' if shape.outline else ""
        title = f"<title>{escape(shape.title)}</title>" if shape.title else ""
        width, height = max(shape.right - shape.left, 0.5), max(shape.bottom - shape.top, 0.5)
        return (
            f'<rect x="{shape.left:.1f}" y="{shape.top:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'fill="{_hex(shape.fill)}"{stroke}>'
            f"{title}</rect>"
        )
    if isinstance(shape, Line):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in shape.points)
        return (
            f'<polyline points="{points}" fill="none" stroke="{_hex(shape.colour)}" '
            f'stroke-width="{shape.width}"/>'
        )
    return (
        f'<text x="{shape.left:.1f}" y="{shape.top + ASCENT * shape.size:.1f}" font-size="{shape.size}" '
        f'fill="{_hex(shape.colour)}" text-anchor="{shape.anchor}">{escape(shape.text)}</text>'
    )


def _hex(colour: Colour) -> str:
    return f"#{colour[0]:02x}{colour[1]:02x}{colour[2]:02x}"


def round_step(extent: float, most: int) -> float:
    """A step of 1, 2 or 5 times a power of ten that gives at most so many ticks.

    >>> round_step(97, 10), round_step(3.2, 8)
    (10.0, 0.5)
    """
    step = 10.0**-3
    while True:
        for factor in (1, 2, 5):
            if extent / (factor * step) <= most:
                return round(factor * step, 6)
        step *= 10
