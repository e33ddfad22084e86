"""Draws the example portrait, with NumPy, OpenCV and Pillow only: no photograph and no model.

The face is a relief (a sum of bells) lit from the upper left; features, clothes and hair are painted over it.
Nothing here knows about files or speech; nothing in the project imports it but ``make_examples.py``.

Positions are in units of the finished 512 x 512 picture: x to the right, y down, the face's middle line at
x = 256.  All is drawn at three times the size and scaled down at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image

SIZE = 512
SCALE = 3
SIDE = SIZE * SCALE

Points = Sequence[tuple[float, float]]
Colour = tuple[float, float, float]

YY, XX = (np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5) / SCALE
"""Position of each pixel of the large picture, in units."""

FACE: Points = (
    (256, 84), (300, 90), (332, 118), (345, 160), (347, 205), (341, 248), (327, 288), (304, 322),
    (278, 341), (256, 345), (234, 341), (208, 322), (185, 288), (171, 248), (165, 205), (167, 160),
    (180, 118), (212, 90),
)  # fmt: skip


def spline(points: Points, closed: bool = True, steps: int = 24) -> np.ndarray:
    """A smooth curve (Catmull-Rom) through the points, ``[n, 2]`` in units."""
    p = np.asarray(points, np.float32)
    p = np.vstack([p[-1:], p, p[:2]]) if closed else np.vstack([p[:1], p, p[-1:]])
    t = np.linspace(0, 1, steps, endpoint=False, dtype=np.float32)[:, None]
    parts = []
    for a, b, c, d in zip(p, p[1:], p[2:], p[3:], strict=False):
        parts.append(
            0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
        )
    return np.vstack(parts if closed else [*parts, p[-2:-1]])


def soften(mask: np.ndarray, sigma: float) -> np.ndarray:
    """The mask blurred by ``sigma`` units; wide blurs are done small, which nobody sees."""
    if sigma <= 0:
        return mask
    if sigma < 6:
        return cv2.GaussianBlur(mask, (0, 0), sigma * SCALE)
    small = cv2.resize(mask, (SIZE // 2, SIZE // 2), interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small, (0, 0), sigma / 2, borderType=cv2.BORDER_REPLICATE)
    return cv2.resize(small, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)


def fill(points: Points, sigma: float = 0, smooth: bool = True) -> np.ndarray:
    """A mask of 0..1, one inside the closed curve, its edge ``sigma`` units soft."""
    curve = spline(points) if smooth else np.asarray(points, np.float32)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    cv2.fillPoly(mask, [np.round(curve * SCALE * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
    return soften(mask.astype(np.float32) / 255, sigma)


def stroke(points: Points, widths: Sequence[float], sigma: float = 0) -> np.ndarray:
    """A mask of an open curve whose width runs through ``widths`` (units)."""
    curve = spline(points, closed=False)
    width = np.interp(np.linspace(0, 1, len(curve)), np.linspace(0, 1, len(widths)), widths)
    along = np.gradient(curve, axis=0)
    across = np.stack([-along[:, 1], along[:, 0]], 1)
    across /= np.linalg.norm(across, axis=1, keepdims=True) + 1e-6
    side = across * width[:, None] / 2
    return fill(np.vstack([curve + side, (curve - side)[::-1]]), sigma, smooth=False)


def bump(x: float, y: float, sx: float, sy: float) -> np.ndarray:
    """A bell of height 1 at (x, y)."""
    return np.exp(-0.5 * (((XX - x) / sx) ** 2 + ((YY - y) / sy) ** 2))


def paint(picture: np.ndarray, colour: Colour | np.ndarray, mask: np.ndarray) -> None:
    """Lays a colour (0..255) over the picture where the mask is."""
    picture += (np.asarray(colour, np.float32) - picture) * mask[..., None]


def shade(picture: np.ndarray, factor: Colour, mask: np.ndarray) -> None:
    """Darkens (factors below 1) or lightens the picture where the mask is."""
    picture *= 1 + (np.asarray(factor, np.float32) - 1) * mask[..., None]


def mirrored(points: Points) -> list[tuple[float, float]]:
    """The points on the other side of the face's middle line."""
    return [(512 - x, y) for x, y in points]


def relief() -> np.ndarray:
    """Height of the face over the picture's plane, in units, from which its light and shadow come."""
    x, y = (XX - 256) / 104, (YY - 214) / 150
    height = 92 * np.sqrt(np.clip(1 - np.abs(x) ** 2.3 - np.abs(y) ** 2.5, 0.002, None))
    down = np.clip((YY - 180) / 62, 0, 1)
    bridge = np.exp(-0.5 * ((XX - 256) / (7.5 + 5.5 * down)) ** 2)
    ends = np.clip((252 - YY) / 9, 0, 1) ** 0.8 * np.clip((YY - 160) / 24, 0, 1)
    height += bridge * (4 + 13 * down**1.3) * ends + 7 * bump(256, 240, 10, 8)
    for s in (-1, 1):
        height += 6.5 * bump(256 + s * 15.5, 246, 6, 6)
        height -= 9 * bump(256 + s * 38, 188, 22, 12)
        height += 7 * bump(256 + s * 44, 191, 17, 9)
        height += 2.5 * bump(256 + s * 44, 165, 28, 9)
        height += 6 * bump(256 + s * 54, 232, 24, 20)
        height -= 2.4 * bump(256 + s * 36, 266, 6, 14)
        height -= 1.2 * bump(256 + s * 41, 280, 6, 8)
    height += 3.0 * bump(256, 277, 20, 5) + 4.2 * bump(256, 294, 17, 5)
    height -= 1.8 * bump(256, 285, 26, 2.2) + 4.5 * bump(256, 306, 18, 6) + 0.9 * bump(256, 264, 3.5, 8)
    return height + 7 * bump(256, 326, 20, 12)


def light_of(height: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Soft daylight from the upper left on a relief: brightness and gloss, 0..1 each."""
    dy, dx = np.gradient(cv2.GaussianBlur(height, (0, 0), 1.2 * SCALE), 1 / SCALE)
    normal = np.stack([-dx, -dy, np.ones_like(dx) * 1.15], -1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    sun = np.array([-0.42, -0.46, 0.78], np.float32)
    sky = np.array([0.55, -0.25, 0.8], np.float32)
    sun, sky = sun / np.linalg.norm(sun), sky / np.linalg.norm(sky)
    bright = 0.8 * np.clip((normal @ sun + 0.28) / 1.28, 0, 1) + 0.2 * np.clip(normal @ sky, 0, 1)
    half = (sun + np.array([0, 0, 1])) / np.linalg.norm(sun + np.array([0, 0, 1]))
    return bright.astype(np.float32), np.clip(normal @ half, 0, 1).astype(np.float32) ** 26


def skin(bright: np.ndarray) -> np.ndarray:
    """Colours of skin under the given brightness: red travels furthest in it, so shadows are warm."""
    stops = [0.0, 0.3, 0.55, 0.78, 1.0]
    ramps = ([92, 150, 206, 236, 252], [50, 92, 150, 188, 219], [42, 72, 122, 161, 196])
    blurs = (2.6, 1.2, 0.6)
    return np.stack(
        [np.interp(soften(bright, b), stops, r) for b, r in zip(blurs, ramps, strict=True)], -1
    ).astype(np.float32)


def background() -> np.ndarray:
    """An evening room out of focus."""
    picture = np.empty((SIDE, SIDE, 3), np.float32)
    glow = np.exp(-(((XX - 120) / 330) ** 2 + ((YY - 120) / 330) ** 2))
    for channel, (far, near) in enumerate(((58, 196), (78, 190), (92, 172))):
        picture[..., channel] = far + (near - far) * glow
    rng = np.random.default_rng(7)
    for _ in range(16):
        x, y, r = rng.uniform(0, 512), rng.uniform(0, 380), rng.uniform(14, 40)
        disc = np.clip((r - np.hypot(XX - x, YY - y)) / 2.5, 0, 1)
        tint = ((255, 214, 150), (255, 236, 205), (190, 225, 220))[rng.integers(3)]
        paint(picture, tint, soften(disc, 1.5) * rng.uniform(0.06, 0.17))
    return picture


def hair(
    layer: np.ndarray, inner: Points, outer: Points, count: int, seed: int, dim: float, cover: np.ndarray
) -> None:
    """Draws ``count`` strands between two guiding curves (units) into the 8-bit layer."""
    rng = np.random.default_rng(seed)
    a, b = spline(inner, closed=False, steps=14), spline(outer, closed=False, steps=14)
    along = np.linspace(0, 1, len(a), dtype=np.float32)
    for t in rng.permutation(np.linspace(0, 1, count)):
        lock = np.sin(t * 31 + seed) * 0.5 + np.sin(t * 83 + 1.7 * seed) * 0.5
        wave = np.sin(along * 7.5 + t * 5 + seed) * along**1.5 * (2.5 + 2 * lock)
        curve = a + (b - a) * (t + rng.normal(0, 0.006) + rng.normal(0, 0.03) * along[:, None] ** 3)
        curve = curve + np.stack([wave + rng.normal(0, 0.5), 0.4 * wave], 1)
        shine = 0.62 * np.exp(-(((along - 0.24 - 0.03 * lock) / 0.07) ** 2))
        shine += 0.26 * np.exp(-(((along - 0.66 - 0.05 * lock) / 0.09) ** 2))
        body = 0.62 + 0.16 * lock + rng.normal(0, 0.07) - 0.18 * abs(2 * t - 1) ** 3
        tone = dim * (body + shine)
        pixels = np.round(curve * SCALE * 16).astype(np.int32)
        for i in range(int(len(a) * (0.99 - 0.025 * abs(lock) - abs(rng.normal(0, 0.012)))) - 1):
            colour = np.clip(np.array([122, 74, 46]) * tone[i] + np.array([14, 10, 9]), 0, 255)
            cv2.line(layer, pixels[i], pixels[i + 1], colour.tolist(), 4, cv2.LINE_AA, 4)
            cv2.line(cover, pixels[i], pixels[i + 1], 255, 4, cv2.LINE_AA, 4)


def eye(picture: np.ndarray, x: float, outward: int) -> None:
    """An open eye with its middle at (x, 191), the outer corner towards ``outward`` (-1 left, 1 right)."""

    def at(*points: tuple[float, float]) -> list[tuple[float, float]]:
        return [(x + outward * dx * 1.16, 191 + dy * 1.18) for dx, dy in points]

    upper = at((-22, 4.5), (-15, -3.5), (-4, -9.2), (7, -9.4), (17, -4.5), (23.5, 1.5))
    lower = at((23.5, 1.5), (16, 6.5), (5, 9.3), (-7, 8.6), (-16, 6), (-22, 4.5))
    shade(
        picture,
        (0.74, 0.60, 0.56),
        fill(at((-25, 4), (-12, -15), (8, -18), (27, -9), (30, 3), (0, 8)), 5) * 0.62,
    )
    shade(picture, (0.80, 0.66, 0.64), stroke(at((-20, 9), (-4, 15.5), (14, 13)), (1, 5, 1), 2.5) * 0.5)
    ball = fill(np.vstack([spline(upper, False), spline(lower, False)]), 0.35, smooth=False)
    paint(picture, (226, 218, 211), ball)
    shade(picture, (0.72, 0.66, 0.66), ball * np.clip((np.abs(XX - x) - 11) / 16, 0, 1))
    shade(picture, (0.90, 0.62, 0.58), ball * bump(x - outward * 24, 195, 3, 3))
    cx, cy, radius = x + outward * 0.5, 190.4, 12.2
    distance = np.hypot(XX - cx, YY - cy)
    angle = np.arctan2(YY - cy, XX - cx)
    fibres = 0.5 + 0.5 * np.sin(angle * 23 + np.sin(angle * 7) * 2) * np.sin(angle * 11 + 1)
    iris = ball * np.clip((radius - distance) / 0.7 + 0.5, 0, 1)
    tint = (
        np.array([72, 104, 92])
        + np.array([64, 56, 22])
        * (fibres * np.clip(distance / radius, 0, 1) + 0.9 * bump(cx + 1, cy + 5, 6, 4))[..., None]
    )
    paint(picture, tint.astype(np.float32), iris)
    shade(picture, (0.25, 0.27, 0.28), iris * np.clip((distance - 9.0) / 3.6, 0, 1))
    paint(picture, (16, 14, 15), ball * np.clip((5.4 - distance) / 0.9 + 0.5, 0, 1))
    shade(picture, (0.50, 0.46, 0.46), ball * soften(1 - ball, 2.4) * np.clip((194 - YY) / 6, 0, 1) * 1.6)
    paint(picture, (255, 252, 246), ball * np.clip((2.3 - np.hypot(XX - cx + 3.6, YY - cy + 4)) / 0.8, 0, 1))
    paint(picture, (235, 242, 250), ball * 0.55 * bump(cx + 4, cy + 4.5, 1.7, 1.5))
    paint(picture, (214, 158, 140), stroke(lower, (0.4, 1.6, 1.8, 1.2), 0.5) * 0.7)
    shade(picture, (0.62, 0.48, 0.45), stroke(lower, (1, 0.8, 0.8), 0.5) * 0.45)
    lid = at((-20, -3.5), (-13, -9.5), (-3, -14.3), (9, -14.6), (19, -10), (26, -3))
    shade(picture, (0.55, 0.40, 0.36), stroke(lid, (0.4, 1.6, 1.8, 0.6), 0.6) * 0.8)
    paint(picture, (38, 24, 20), stroke(upper, (0.8, 2.2, 3.0, 3.4, 3.2, 1.2), 0.3) * 0.92)
    curve = spline(upper, False)
    for k, t in enumerate(np.linspace(0.18, 1, 30)):
        foot = curve[int(t * (len(curve) - 1))]
        reach = (2.5 + 4.5 * t) * (0.85 + 0.15 * np.sin(k * 2.1))
        lean = outward * (-0.35 + 1.35 * t)
        tip = foot + np.array([lean * reach, -reach * (1.05 - 0.45 * t)])
        bend = (foot + tip) / 2 + np.array([lean * 0.9, 0.9])
        paint(
            picture,
            (34, 22, 19),
            stroke([tuple(foot), tuple(bend), tuple(tip)], (1.1, 0.8, 0.2), 0.15) * 0.85,
        )


def brow(picture: np.ndarray, x: float, outward: int) -> None:
    """An eyebrow over the eye at x: a soft shape, then its hairs."""

    def at(*points: tuple[float, float]) -> list[tuple[float, float]]:
        return [(x + outward * dx, y) for dx, y in points]

    spine = at((-25, 163.5), (-12, 159.5), (4, 156.5), (18, 157.5), (35, 168))
    paint(picture, (82, 52, 36), stroke(spine, (4.5, 7, 6.5, 4.5, 1), 1.4) * 0.6)
    curve, rng = spline(spine, False), np.random.default_rng(3)
    for t in np.linspace(0, 0.97, 60):
        half = np.interp(t, (0, 0.2, 0.6, 1), (1.6, 2.6, 2.2, 0.5))
        foot = curve[int(t * (len(curve) - 1))] + np.array([0, rng.uniform(-0.5, 1) * half])
        turn = -0.95 + 1.35 * t + rng.normal(0, 0.1)
        tip = foot + rng.uniform(4, 7) * np.array([outward * np.cos(turn), np.sin(turn) * 0.8])
        paint(picture, (58, 35, 25), stroke([tuple(foot), tuple(tip)], (0.9, 0.3), 0.25) * 0.45)


def mouth(picture: np.ndarray) -> None:
    """Closed lips at y = 286, at the edge of a smile."""
    seam = [(218, 280.5), (232, 285.4), (247, 287), (256, 288), (265, 287), (280, 285.4), (294, 280.5)]
    top = [(294, 280.5), (278, 277.2), (264, 274.0), (256, 275.8), (248, 274.0), (234, 277.2), (218, 280.5)]
    bottom = [(294, 280.5), (282, 290.5), (269, 297.2), (256, 299), (243, 297.2), (230, 290.5), (218, 280.5)]
    shade(picture, (0.72, 0.56, 0.54), fill([(236, 303), (256, 301), (276, 303), (256, 309)], 2.5) * 0.45)
    upper = fill(np.vstack([spline(seam, False), spline(top, False)]), 0.6, smooth=False)
    lower = fill(np.vstack([spline(seam, False), spline(bottom, False)]), 0.6, smooth=False)
    shade(picture, (0.82, 0.55, 0.56), upper)
    shade(picture, (0.90, 0.65, 0.66), lower)
    shade(picture, (1.16, 1.22, 1.22), lower * (bump(250, 292.5, 11, 2.4) + 0.3 * bump(268, 292, 6, 2)))
    shade(picture, (1.08, 1.1, 1.1), upper * bump(247, 277.5, 7, 2))
    shade(picture, (0.62, 0.45, 0.45), stroke(seam, (1, 4, 4.5, 4, 1), 1.2) * 0.55)
    paint(picture, (84, 30, 30), stroke(seam, (0.7, 1.3, 1.7, 2.0, 1.7, 1.3, 0.7), 0.35) * 0.9)
    for x in (216.5, 295.5):
        shade(picture, (0.62, 0.46, 0.44), bump(x, 279.8, 3, 2.6) * 0.6)


def nose(picture: np.ndarray) -> None:
    """What the relief does not give: nostrils, their wings, the shadow under the tip."""
    shade(
        picture,
        (0.76, 0.58, 0.54),
        fill([(238, 252), (256, 255), (276, 252), (266, 259), (246, 259)], 2.6) * 0.55,
    )
    for s in (-1, 1):
        hole = [(256 + s * 5.5, 252), (256 + s * 9, 249), (256 + s * 13.5, 250.6), (256 + s * 10, 253.4)]
        shade(picture, (0.36, 0.22, 0.20), fill(hole, 0.8) * 0.85)
        wing = [(256 + s * 18, 238), (256 + s * 21.8, 245), (256 + s * 18.5, 252)]
        shade(picture, (0.68, 0.50, 0.46), stroke(wing, (0.5, 2.4, 1), 1.1) * 0.6)
    paint(picture, (255, 238, 224), bump(252, 238.5, 4.2, 3.4) * 0.42)
    paint(picture, (255, 236, 222), bump(252.5, 210, 2.6, 16) * 0.22)


def body(picture: np.ndarray) -> np.ndarray:
    """Neck, shoulders and a pullover; returns where they are."""
    neck = fill([(212, 300), (212, 350), (204, 392), (170, 420), (256, 470), (342, 420), (308, 392),
                 (300, 350), (300, 300)], 0.5)  # fmt: skip
    around = np.clip(1 - np.abs(XX - 250) / 62, 0, 1) ** 0.6
    bright = 0.30 + 0.48 * around - 0.16 * np.clip((XX - 250) / 60, 0, 1)
    bright = bright + 0.07 * bump(226, 410, 16, 10) + 0.07 * bump(286, 410, 16, 10)
    paint(picture, skin(bright.astype(np.float32)), neck)
    cast = fill([(196, 300), (204, 345), (232, 366), (262, 374), (292, 366), (312, 340), (316, 300)], 7)
    shade(picture, (0.58, 0.42, 0.37), cast * neck)
    for s, weight in ((-1, 0.3), (1, 0.5)):
        sinew = [(256 + s * 40, 360), (256 + s * 26, 395), (256 + s * 9, 420)]
        shade(picture, (0.72, 0.56, 0.52), stroke(sinew, (3, 6, 3), 3) * weight)
    wool = fill([(4, 530), (30, 476), (80, 440), (146, 414), (186, 396), (206, 412), (256, 428), (306, 412),
                 (326, 396), (366, 414), (432, 440), (482, 476), (508, 530)], 0.5)  # fmt: skip
    lit = 0.92 - 0.38 * np.clip((XX - 170) / 300, 0, 1) - 0.26 * np.clip((YY - 420) / 110, 0, 1)
    lit = lit - 0.32 * bump(256, 500, 60, 60) * 0.4 + 0.12 * bump(120, 440, 60, 26)
    ribs = 1 + 0.035 * np.sin(XX * 1.3 + 2 * np.sin(YY / 40)) * np.sin(YY * 1.5)
    paint(picture, np.array([46, 118, 122], np.float32) * (1.15 * lit * ribs)[..., None], wool)
    collar = stroke([(184, 396), (206, 414), (256, 432), (306, 414), (328, 396)], (10, 12, 13, 12, 10), 0.5)
    weave = 1 + 0.07 * np.sin(np.arctan2(YY - 300, XX - 256) * 230)
    paint(picture, np.array([54, 132, 135], np.float32) * (1.12 * lit * weave)[..., None], collar)
    edge = stroke([(186, 403), (206, 421), (256, 439), (306, 421), (326, 403)], (2, 3, 3, 3, 2), 1.6)
    shade(picture, (0.5, 0.55, 0.56), edge * 0.7)
    rim = stroke([(188, 391), (208, 408), (256, 425), (304, 408), (324, 391)], (2, 4, 4, 4, 2), 2)
    shade(picture, (0.6, 0.48, 0.45), rim * neck * (1 - collar) * 0.7)
    return np.maximum(neck, wool)


def draw_portrait() -> Image.Image:
    """The whole picture, 512 x 512 RGB."""
    picture = background()
    back = fill([(262, 44), (330, 62), (372, 130), (384, 230), (398, 330), (392, 404), (330, 420), (256, 380),
                 (182, 420), (120, 404), (114, 330), (128, 230), (140, 130), (182, 62)], 0.8)  # fmt: skip
    paint(picture, (40, 24, 17), back)
    figure = body(picture)
    face = fill(FACE, 0.6)
    bright, gloss = light_of(relief())
    flesh = skin(bright)
    for x, weight in ((200, 0.20), (312, 0.16)):
        shade(flesh, (1.0, 0.72, 0.72), bump(x, 240, 24, 18) * weight * 2)
    shade(flesh, (1.0, 0.80, 0.80), bump(256, 243, 15, 10) * 0.35)
    flesh += gloss[..., None] * np.array([26, 26, 24], np.float32)
    paint(picture, flesh, face)
    for x, outward in ((212, -1), (300, 1)):
        eye(picture, x, outward)
        brow(picture, x, outward)
    nose(picture)
    mouth(picture)
    layer = np.zeros((SIDE, SIDE, 3), np.uint8)
    left_in = [(276, 88), (238, 98), (196, 138), (170, 200), (164, 262), (158, 330), (184, 392)]
    left_out = [(268, 33), (204, 44), (149, 94), (124, 190), (112, 280), (98, 350), (128, 428)]
    right_in = [(276, 88), (302, 98), (332, 136), (346, 200), (350, 262), (356, 330), (330, 392)]
    right_out = [(268, 33), (324, 46), (370, 94), (390, 190), (402, 280), (416, 350), (386, 428)]
    cover = np.zeros((SIDE, SIDE), np.uint8)
    for inner, outer, seed, dim in ((left_in, left_out, 1, 1.0), (right_in, right_out, 2, 0.86)):
        hair(layer, inner, outer, 1500, seed, dim, cover)
    mask = cover.astype(np.float32) / 255
    shadow = np.roll(soften(mask, 4), (3 * SCALE, 5 * SCALE), (0, 1))
    shade(picture, (0.62, 0.46, 0.42), np.clip(shadow, 0, 1) * np.maximum(figure, face) * 0.75)
    paint(picture, layer.astype(np.float32), mask)
    done = np.clip(picture, 0, 255).astype(np.uint8)
    return Image.fromarray(cv2.resize(done, (SIZE, SIZE), interpolation=cv2.INTER_AREA))
