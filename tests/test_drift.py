"""A drift of colours, modelled in the draft engine: it grows along a chain; segments begin without any."""

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
