"""The seams of a finished video as one picture: the frames around each, and how much each frame moves.

What is drawn comes from the video itself and from the report in the job's result; nothing is judged here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.frames import Frame, read_part
from pipeline.seam import SeamReport
from pipeline.seam_metrics import moves
from pipeline.timeline import FPS

TILES, TILE_HEIGHT = 9, 132
"""Frames shown of each seam, and their height in pixels."""
CURVE_HEIGHT, TEXT_HEIGHT, MARGIN = 96, 22, 10
PAPER, INK, FAINT = (255, 255, 255), (30, 30, 30), (150, 150, 150)
BAR, INSIDE, USUAL, NATURAL = (120, 140, 165), (214, 98, 52), (60, 130, 70), (150, 60, 130)


def draw_seams(video: Path, seams: Sequence[SeamReport], fps: int = FPS) -> Image.Image:
    """One row for each seam.  Raises ``MediaError``."""
    rows = [_row(video, seam, number, fps) for number, seam in enumerate(seams)]
    width = max(row.width for row in rows)
    picture = Image.new("RGB", (width, sum(row.height for row in rows)), PAPER)
    top = 0
    for row in rows:
        picture.paste(row, (0, top))
        top += row.height
    return picture


def _row(video: Path, seam: SeamReport, number: int, fps: int) -> Image.Image:
    first, stop = (round(frame * fps / FPS) for frame in (seam.frame, seam.frame + seam.frames))
    begin = max(first - fps, 0)
    frames = list(read_part(video, begin, stop + fps, fps))
    # From just before the transition to just after it.
    shown = np.linspace(max(first - 2, begin), min(stop + 1, begin + len(frames) - 1), TILES).round()
    tiles = [_tile(frames[int(t) - begin], int(t), inside=first <= t < stop) for t in shown]
    width = sum(tile.width for tile in tiles) + (TILES + 1) * MARGIN
    row = Image.new("RGB", (width, TEXT_HEIGHT + TILE_HEIGHT + CURVE_HEIGHT + 4 * MARGIN), PAPER)
    drawing, font = ImageDraw.Draw(row), ImageFont.load_default(13)
    drawing.text((MARGIN, MARGIN), _caption(seam, number), INK, font)
    left = MARGIN
    for tile in tiles:
        row.paste(tile, (left, TEXT_HEIGHT + MARGIN))
        left += tile.width + MARGIN
    curve = _curve(moves(frames), seam, (first - begin, stop - begin), width - 2 * MARGIN)
    row.paste(curve, (MARGIN, TEXT_HEIGHT + TILE_HEIGHT + 2 * MARGIN))
    return row


def _caption(seam: SeamReport, number: int) -> str:
    sound = "" if seam.audio_db is None else f"   speech {seam.audio_db:.0f} dBFS"
    return (
        f"seam {number}: {seam.verdict}   {seam.method} of {seam.frames} frames at {seam.frame}"
        f" ({seam.frame / FPS:.2f} s)   jump {seam.jump:.2f} medians, natural p99 {seam.natural:.2f}"
        f"   speed {seam.speed:.2f}   aligned SSIM {seam.ghosting:.3f}   sharpness {seam.sharpness:.2f}"
        f"   colour step {seam.colour_step:.2f} (gap {seam.colour_gap:.2f}){sound}"
    )


def _tile(frame: Frame, number: int, *, inside: bool) -> Image.Image:
    """A small frame with its number, framed where it belongs to the transition."""
    width = round(TILE_HEIGHT * frame.shape[1] / frame.shape[0])
    tile = Image.fromarray(frame).resize((width, TILE_HEIGHT), Image.Resampling.LANCZOS)
    drawing = ImageDraw.Draw(tile)
    if inside:
        drawing.rectangle((0, 0, width - 1, TILE_HEIGHT - 1), outline=INSIDE, width=2)
    drawing.rectangle((2, 2, 40, 15), fill=PAPER)
    drawing.text((4, 2), str(number), INK, ImageFont.load_default(11))
    return tile


def _curve(values: Sequence[float], seam: SeamReport, span: tuple[int, int], width: int) -> Image.Image:
    """A bar for each move, those of the transition in another colour, and the clip's p50 and p99."""
    picture = Image.new("RGB", (width, CURVE_HEIGHT), PAPER)
    drawing, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    p50, p99 = seam.median, seam.natural * max(seam.median, 0.1)
    most = max(*values, p99, 0.1) * 1.1
    each = width / max(len(values), 1)

    def height(value: float) -> float:
        return CURVE_HEIGHT - 1 - value / most * (CURVE_HEIGHT - 1)

    for i, value in enumerate(values):
        touched = span[0] - 1 <= i < max(span[1], span[0])
        box = (i * each + 1, height(value), max((i + 1) * each - 1, i * each + 1), CURVE_HEIGHT - 1)
        drawing.rectangle(box, fill=INSIDE if touched else BAR)
    for value, name, colour in ((p50, "p50", USUAL), (p99, "p99", NATURAL)):
        drawing.line((0, height(value), width, height(value)), fill=colour)
        drawing.text((width - 30, height(value) - 13), name, colour, font)
    drawing.line((0, CURVE_HEIGHT - 1, width, CURVE_HEIGHT - 1), fill=FAINT)
    return picture
