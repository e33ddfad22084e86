"""``bench.real_poses``: where heads are is read from pictures, and what that says of a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.real_poses import STRIDE, Take, follow, heads
from pipeline.draft import media
from pipeline.draft.face import find_face

ROOT = Path(__file__).resolve().parent.parent


def test_a_moved_head_is_found_where_it_is() -> None:
    """In face heights from the first picture, right and down."""
    picture = media.fit(media.load_pictures(ROOT / "examples" / "portrait.png"), 256, 256)[0]
    moved = np.stack([picture, np.roll(picture, (3, 6), (0, 1)), np.roll(picture, (0, -8), (0, 1))])
    expected = np.array([(0, 0), (6, 3), (-8, 0)]) / find_face(picture).height
    assert heads(picture, moved) == pytest.approx(expected, abs=0.01)


def test_a_model_that_goes_half_the_way_is_told_from_one_that_copies() -> None:
    """Windows that go ``share`` of the way to their pictures."""
    for share in (0.0, 0.5, 1.0):
        source = np.random.default_rng(2).normal(size=(5 * STRIDE, 2))
        rendered = [source[0]]
        for frame in range(1, 5 * STRIDE):
            window = (frame - 9) // STRIDE if frame >= 81 else 0
            start = rendered[max(72 * window + 8, 0)] if window else source[0]
            rendered.append(start + share * (source[STRIDE * window] - start))
        take = Take("x", np.array(rendered), source)
        assert follow(take.steps()) == pytest.approx((share,) * 3, abs=1e-6)
        assert take.strays()[:81].max() == 0
