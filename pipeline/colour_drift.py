"""Rendered frames in the colours of their reference picture: a chain's drift, taken out before it is encoded.

Each window is conditioned by a picture and continues the frames of the window before, so what its colours are
off is handed on and adds up.  At some frames of a window (knots) its colours are set beside its picture; what
is corrected is interpolated between them, from nothing at the frames that it continues.  Neither a step nor
pumping: errors below ``TOLERANCE`` are left alone, and of larger ones all but ``TOLERANCE`` is taken out.

Frames in, frames out.  Where frames come from, and that the next window continues the corrected ones, is
``segment``'s business; how colours are compared is in ``colours``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.colours import Colours, Floats, mapped
from pipeline.frames import Frame
from pipeline.morph import TRUST

SPACING = 18
"""Frames between knots: a tone that the model gives to all its frames is there within half a second, and has
to be followed; nothing is sampled faster than every fourth frame."""
APART = 5
"""Each knot looks at two frames so far apart: their mouths differ."""
TOLERANCE = 1.0
"""Levels of 255 that are left: the real talking-head video strays so far from its own first frame, by light
and by error (0.1 to 0.8 measured), and must come out as it is."""
LIMIT = 12.0
"""Levels that are corrected at most: more is another light, not drift."""


@dataclass(frozen=True, slots=True)
class DriftCorrection:
    """What is done to the colours of some frames in a row."""

    places: tuple[int, ...] = ()
    """Frames where the correction is known; before the first and behind the last it stays."""
    gains: tuple[Floats, ...] = ()
    offsets: tuple[Floats, ...] = ()
    """Per channel, one for each place."""

    def corrected(self, t: int, frame: Frame) -> Frame:
        """Frame ``t`` in the reference's colours; the same object where there is nothing to do."""
        if not self.places:
            return frame
        gain, offset = (
            np.array(
                [np.interp(t, self.places, [value[channel] for value in values]) for channel in range(3)]
            )
            for values in (self.gains, self.offsets)
        )
        if (gain == 1).all() and (offset == 0).all():
            return frame
        return mapped(frame, gain, offset)


NOTHING = DriftCorrection()


def find_drift(references: Sequence[Frame], frame_at: Callable[[int], Frame]) -> DriftCorrection:
    """The correction of frames that follow frames in the right colours.

    ``references``: for each frame the picture that conditions it; ``frame_at(t)``: frame ``t`` as it was
    rendered; uint8 [H, W, 3] RGB.  Depends on these alone, so a chain that is continued elsewhere comes out
    the same.  Where a frame can't be aligned with its picture nothing is known, and the neighbours count.
    """
    count = len(references)
    knots = max(round(count / SPACING), 1)
    places: list[int] = [-1]
    gains: list[Floats] = [np.ones(3)]
    offsets: list[Floats] = [np.zeros(3)]
    for knot in range(1, knots + 1):
        place = round(knot * count / knots) - 1
        pair = sorted({max(place - APART, 0), place})
        frames, pictures = np.stack([frame_at(t) for t in pair]), np.stack([references[t] for t in pair])
        colours = Colours.between(frames, pictures)
        if colours.agreement < TRUST:
            continue
        share = min(max(colours.gap - TOLERANCE, 0.0), LIMIT) / max(colours.gap, TOLERANCE)
        places.append(place)
        gains.append(1 + share * (colours.gain - 1))
        offsets.append(share * colours.offset)
    if all((gain == 1).all() and (offset == 0).all() for gain, offset in zip(gains, offsets, strict=True)):
        return NOTHING
    return DriftCorrection(tuple(places), tuple(gains), tuple(offsets))
