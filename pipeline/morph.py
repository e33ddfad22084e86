"""The frames of a seam: each rendering moved along their optical flow to the pose of the moment.

When the pose and the texture change is planned in ``way``; which seams are made so, and what is done where
flow can't be trusted, is ``seam``'s business.
"""

from __future__ import annotations

import cv2
import numpy as np

from pipeline.colours import Pair
from pipeline.frames import Frame
from pipeline.optical_flow import Flow, flow_between, luma, warped
from pipeline.way import Way

TRUST = 0.7
"""Structural similarity of the renderings, once moved onto each other, from which a morph shows one face:
measured 0.90 and more for other poses, mouths and colours of one person, 0.42 and less for other scenes."""


class Morph:
    """Makes the frames of a way, in order."""

    def __init__(self, pair: Pair, way: Way) -> None:
        self._pair, self._way = pair, way
        self._forth: Flow | None = None
        self._back: Flow | None = None

    def frame(self, t: int) -> Frame:
        """Frame ``t`` of the overlap."""
        a, b = self._pair.at(t)
        place, texture = self._way.pose[t], self._way.texture[t]
        if (place, texture) in ((0, 0), (1, 1)):
            return b if texture else a
        # The flow of the frame before is where the search begins: what has no texture does not flicker.
        self._forth = flow_between(luma(a), luma(b), self._forth)
        self._back = flow_between(luma(b), luma(a), self._back)
        # Flow from the picture in between to either side, from the flows between them (Super SloMo, eq. 4).
        to_a = -(1 - place) * place * self._forth + place * place * self._back
        to_b = (1 - place) ** 2 * self._forth - place * (1 - place) * self._back
        if not texture:
            return warped(a, to_a)
        if texture == 1:
            return warped(b, to_b)
        return mixed(warped(a, to_a), warped(b, to_b), texture)


def mixed(a: Frame, b: Frame, share: float) -> Frame:
    """A crossfade's frame: ``share`` of ``b``, the rest of ``a``."""
    return np.asarray(cv2.addWeighted(a, 1 - share, b, share, 0), np.uint8)
