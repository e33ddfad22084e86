"""``pipeline.seam_metrics``: moved is no ghost, mixed is; what is usual is told from what is a jump."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.seam_metrics import (
    ClipMoves,
    colour_step,
    detail,
    fidelity,
    moves,
    relative,
    similarity,
    verdict,
)
from tests.test_seam import clip


def test_a_moved_picture_is_no_ghost_and_a_double_one_is() -> None:
    """Fidelity aligns before it compares."""
    near, between, far = clip(0, 1)[0], clip(2, 1)[0], clip(6, 1)[0]
    double = ((near.astype(int) + far) // 2).astype(np.uint8)
    assert fidelity(near, (near, far)) == (pytest.approx(1, abs=1e-3), pytest.approx(1))
    assert fidelity(between, (near, far))[0] > 0.97
    similar, sharp = fidelity(double, (near, far))
    assert similar < 0.93
    assert sharp < 0.9


def test_detail_falls_with_blur() -> None:
    """A mean of neighbours has less detail than either."""
    frame = clip(0, 1)[0]
    soft = ((frame[:, 1:].astype(int) + frame[:, :-1]) // 2).astype(np.uint8)
    assert detail(soft) < 0.9 * detail(frame)
    assert similarity(frame[..., 0], frame[..., 0]) == pytest.approx(1)


def test_a_value_is_set_beside_its_neighbours() -> None:
    """Each over the median around it, itself left out; a still clip is not divided by nothing."""
    assert relative([2, 2, 6, 2, 2]) == [1, 1, 3, 1, 1]
    assert relative([0.0, 0.0, 0.0]) == [0, 0, 0]


def test_colour_steps_are_of_the_worst_channel() -> None:
    """Three levels of blue from one frame to the next are three levels."""
    frames = np.full((3, 8, 8, 3), 100, np.uint8)
    frames[2, ..., 2] = 103
    assert colour_step(frames) == pytest.approx(3)


def test_a_whole_clips_moves_are_those_of_its_frames() -> None:
    """Decoded luma in limited range gives the moves of RGB frames; seams are left out of what is usual."""
    frames = clip(0, 20)
    seen = ClipMoves()
    for frame in frames:
        luma = frame @ np.array([0.299, 0.587, 0.114])
        seen.add(np.rint(16 + luma * 219 / 255).astype(np.uint8))
    assert seen.moves == pytest.approx(moves(frames), abs=0.2)
    assert seen.jump(5, 8) == max(seen.moves[4:8])
    assert seen.away_from([(5, 8)]) == [*seen.moves[:4], *seen.moves[8:]]


def test_verdicts() -> None:
    """Good is within the goals, bad beyond what a careful viewer may find; the worst measure decides."""
    assert verdict(1.0, 1.0, 0.99, 0.95, 0.1) == "good"
    assert verdict(1.5, 1.0, 0.99, 0.95, 0.1) == "visible"
    assert verdict(1.0, 1.2, 0.99, 0.95, 0.1) == "visible"
    assert verdict(1.0, 1.0, 0.95, 0.95, 0.1) == "visible"
    assert verdict(1.0, 1.0, 0.99, 0.4, 0.1) == "bad"
    assert verdict(2.5, 1.0, 0.99, 0.95, 0.1) == "bad"
    assert verdict(1.0, 1.7, 0.99, 0.95, 0.1) == "bad"
    assert verdict(1.0, 1.0, 0.99, 0.95, 3.0) == "bad"
