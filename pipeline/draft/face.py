"""Where the face and its mouth are in a picture: found with OpenCV's cascades, else assumed.

Nothing is drawn here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

Frame = NDArray[np.uint8]

SEARCH_SIDE = 512
"""Faces are searched in a copy that is at most this wide and high (pixels)."""
SMALLEST = 0.12
"""A face smaller than this share of the picture's shorter side is taken for a mistake."""
MOUTH_BELOW = 0.79
"""The mouth's height in the cascade's box, as a share from its top."""
LIPS = {"frontalface_alt2": 0.165, "profileface": 0.12}
"""Half the mouth's width as a share of the box, by cascade: a turned head shows less of it."""
OPEN_LIPS = 0.65
"""An open mouth is narrower than closed lips."""
DARK = 0.5
"""Between the lips, darker than this share of the skin's lightness: an open mouth."""


@dataclass(frozen=True, slots=True)
class Face:
    """A face in pixels of the picture: centre, height from brow to chin, where and how wide it opens.

    ``lips`` is half the width of the mouth.  ``speaking``: it is open in the picture already; ``mouth_y`` is
    then the edge of the lower lip, and there is no need of drawing teeth.
    """

    x: float
    y: float
    height: float
    mouth_x: float
    mouth_y: float
    lips: float
    speaking: bool = False


def default_face(width: int, height: int) -> Face:
    """The face of a picture in which none is found: a portrait with the head in the upper middle.

    Centre (0.5, 0.42), mouth (0.5, 0.56), face height 0.45, as shares of the picture; in a wide picture the
    centre stays in the middle and the height counts.
    """
    size = height * 0.45
    return Face(width * 0.5, height * 0.42, size, width * 0.5, height * 0.56, LIPS["frontalface_alt2"] * size)


def find_face(image: Frame) -> Face:
    """The largest face of an RGB picture, or ``default_face``."""
    height, width = image.shape[:2]
    scale = min(1.0, SEARCH_SIDE / max(width, height))
    small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else image
    gray = cv2.equalizeHist(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY))
    least = max(20, round(min(gray.shape) * SMALLEST))
    for name, mirrored in (("frontalface_alt2", False), ("profileface", False), ("profileface", True)):
        view = cv2.flip(gray, 1) if mirrored else gray
        found = _cascade(name).detectMultiScale(view, scaleFactor=1.1, minNeighbors=4, minSize=(least, least))
        if len(found):
            x, y, side, _ = (float(value) for value in max(found, key=lambda box: int(box[2])))
            if mirrored:
                x = gray.shape[1] - x - side
            return _face_of(image, x / scale, y / scale, side / scale, LIPS[name])
    return default_face(width, height)


def _face_of(image: Frame, x: float, y: float, side: float, lips: float) -> Face:
    mouth_x, mouth_y = _find_mouth(image, x, y, side)
    edge = _lower_lip(image, mouth_x, mouth_y, side)
    if edge is None:
        return Face(x + side / 2, y + side / 2, side, mouth_x, mouth_y, lips * side)
    return Face(x + side / 2, y + side / 2, side, mouth_x, edge, OPEN_LIPS * lips * side, speaking=True)


def _lower_lip(image: Frame, x: float, y: float, side: float) -> float | None:
    """Upper edge of the lower lip of an open mouth; None if there is no dark gap between the lips."""
    top, left = round(y - 0.10 * side), round(x - 0.03 * side)
    band = image[max(top, 0) : round(y + 0.07 * side), max(left, 0) : round(x + 0.03 * side) + 1]
    if min(band.shape[:2]) < 2:
        return None
    light = band.astype(np.float32).mean(axis=(1, 2))
    dark = np.flatnonzero(light < DARK * np.percentile(light, 85))
    if len(dark) < max(2, 0.025 * side):
        return None
    return float(max(top, 0) + dark[-1] + 1)


def _find_mouth(image: Frame, x: float, y: float, side: float) -> tuple[float, float]:
    """Centre of the reddest spot near where the mouth should be: right also where the head is turned."""
    left, top = max(0, round(x + 0.12 * side)), max(0, round(y + 0.62 * side))
    patch = image[top : round(y + 0.98 * side), left : round(x + 0.88 * side)]
    guess = (x + side / 2, y + MOUTH_BELOW * side)
    if min(patch.shape[:2]) < 8:
        return guess
    lab = cv2.cvtColor(patch, cv2.COLOR_RGB2LAB).astype(np.float32)
    red = cv2.GaussianBlur(lab[..., 1] - 0.15 * lab[..., 0], (0, 0), max(0.5, side * 0.03))
    rows, columns = np.mgrid[0 : patch.shape[0], 0 : patch.shape[1]].astype(np.float32)
    near = np.exp(
        -(((columns + left - guess[0]) / (0.22 * side)) ** 2) - ((rows + top - guess[1]) / (0.10 * side)) ** 2
    )
    weight = (red - red.min()) * near
    weight = np.where(weight > 0.8 * weight.max(), weight, 0)
    if not weight.sum():
        return guess
    return (
        float((columns * weight).sum() / weight.sum()) + left,
        float((rows * weight).sum() / weight.sum()) + top,
    )


@cache
def _cascade(name: str) -> cv2.CascadeClassifier:
    return cv2.CascadeClassifier(str(Path(cv2.__file__).parent / "data" / f"haarcascade_{name}.xml"))
