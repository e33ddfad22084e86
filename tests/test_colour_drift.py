"""``pipeline.colour_drift``: a drift is taken out evenly; what does not drift comes out as it went in."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.colour_drift import LIMIT, TOLERANCE, find_drift
from tests.test_seam import clip, texture

COUNT = 72
Stack = npt.NDArray[np.uint8]
RED = np.array([1.0, 0.0, -1.0])


def shown(frames: Stack, references: Stack) -> Stack:
    correction = find_drift(references, lambda t: frames[t])
    return np.stack([correction.corrected(t, frame) for t, frame in enumerate(frames)])


def plus(frames: Stack, levels: npt.ArrayLike) -> Stack:
    """Frames warmer by so many levels, each or all; with noise, so that fractions of a level count."""
    noise = np.random.default_rng(1).random(frames.shape) - 0.5
    shift = np.asarray(levels, float).reshape(-1, 1, 1, 1) * RED
    return np.clip(np.rint(frames + shift + noise * (shift != 0)), 0, 255).astype(np.uint8)


def still(picture: Stack) -> Stack:
    return np.repeat(picture[None], COUNT, axis=0)


def off(frames: Stack, true: Stack) -> npt.NDArray[np.float64]:
    """How much warmer each frame is than it should be."""
    return np.asarray((frames.astype(float) - true).mean((1, 2)) @ RED / 2)


FRAMES = clip(2, COUNT)
PICTURE = still(clip(0, 1)[0])


def test_what_does_not_drift_is_not_touched() -> None:
    """Another pose, half a level of another tone, a hand before the picture: the very same frames."""
    hand = FRAMES.copy()
    hand[20:, 70:, :40] = (200, 120, 90)
    for frames in (FRAMES, plus(FRAMES, 0.5), hand):
        correction = find_drift(PICTURE, frames.__getitem__)
        assert all(correction.corrected(t, frame) is frame for t, frame in enumerate(frames))


def test_a_drift_is_taken_out_evenly() -> None:
    """Six levels over a window become the tolerated one, at no frame faster than a third of a level."""
    drifting = plus(FRAMES, np.linspace(0, 6, COUNT))
    left = off(shown(drifting, PICTURE), FRAMES)
    assert left[0] < 0.3
    assert abs(left[-1] - TOLERANCE) < 0.3
    assert left.max() < TOLERANCE + 0.5
    assert np.abs(np.diff(left)).max() < 0.34


def test_a_chain_does_not_pump() -> None:
    """A model that gives all that it makes a tone of 4 levels, soon after the frames it continues.

    Each window continues the frames as they are shown; over five windows the tone stays where it was.
    """
    left: list[float] = []
    start = 0.0
    for _ in range(5):
        tone = 4 + (start - 4) * np.exp(-np.arange(1, COUNT + 1) / 6)
        frames = shown(plus(FRAMES, tone), PICTURE)
        left += list(off(frames, FRAMES))
        start = left[-1]
    assert max(left[COUNT:]) < TOLERANCE + 1.5  # half a second passes until the tone is seen
    settled = np.array(left).reshape(5, COUNT)[1:, 36:]
    assert np.ptp(settled) < 0.6
    assert np.abs(np.diff(left)).max() < 0.6


def test_light_that_belongs_to_the_scene_stays() -> None:
    """Where the picture that conditions a window is darker, its frames may be."""
    dark = np.linspace(1, 0.6, COUNT).reshape(-1, 1, 1, 1)
    frames, pictures = ((stack * dark).astype(np.uint8) for stack in (FRAMES, PICTURE))
    assert np.array_equal(shown(frames, pictures), frames)
    assert not np.array_equal(shown(frames, PICTURE), frames)


def test_another_scene_and_another_light_are_no_drift() -> None:
    """What can't be aligned says nothing; a correction has its limit."""
    elsewhere = still(np.asarray(texture(9, 4.0), np.uint8))
    assert np.array_equal(shown(elsewhere, PICTURE), elsewhere)
    bright = plus(FRAMES, 30)
    assert abs(off(bright, FRAMES)[-1] - off(shown(bright, PICTURE), FRAMES)[-1] - LIMIT) < 0.5


def test_windows_of_one_frame() -> None:
    """The shortest there is."""
    assert shown(plus(FRAMES[:1], 5), PICTURE[:1]).shape == FRAMES[:1].shape
