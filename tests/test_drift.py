"""A drift of colours, modelled in the draft engine: it grows along a chain, unless windows are matched."""

from __future__ import annotations

import numpy as np

from bench.drift import chain, colours, joined
from pipeline.plan import calculate_segments


def test_segments_drift_less_than_a_chain_and_leave_no_step() -> None:
    """600 frames at 0.05 levels a frame: a chain ends 30 levels off, four segments less than 10."""
    plan = calculate_segments(600, 4)
    one = colours(chain((81,) * 9, 1, 0.05))[:600]
    parts = colours(joined(plan.segments, 0.05))
    assert len(one) == len(parts) == 600
    assert np.abs(one[-1]).min() > 25  # it accumulates over the windows of a chain
    assert np.abs(parts).max() < 10
    for segment in plan.segments[1:]:
        around = parts[segment.start - 1 : segment.start + 80]
        assert np.abs(np.diff(around, axis=0)).max() < 1.1  # the chain's own rounding makes steps of 1


def test_matched_windows_leave_neither_a_drift_nor_a_turn() -> None:
    """The same drift: a level or so is left, and nothing turns back at a seam.  Without drift, no change."""
    plan = calculate_segments(600, 4)
    parts = colours(joined(plan.segments, 0.05, match=True))
    assert np.abs(parts).max() < 1.6
    assert np.abs(np.diff(parts, axis=0)).max() < 0.6
    assert np.abs(parts[50:] - parts[:-50]).max() < 1.4
    one = chain((81,) * 3, 1, 0.0), chain((81,) * 3, 1, 0.0, match=True)
    assert all(np.array_equal(a, b) for a, b in zip(*one, strict=True))
