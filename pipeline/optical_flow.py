"""Where each pixel of one picture is in another, and pictures moved there; OpenCV's DIS flow.

Pictures in, flows and pictures out; what is done with them is ``morph``'s and ``seam_metrics``' business.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.frames import Frame

Flow: TypeAlias = npt.NDArray[np.floating[Any]]
"""[height, width, 2]: right and down in pixels, from each pixel of the first picture to the second."""
Luma: TypeAlias = npt.NDArray[np.uint8]
"""[height, width]."""


def luma(frame: Frame) -> Luma:
    """Rec. 601 luma, which is what cv2 gives."""
    return np.asarray(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), np.uint8)


def flow_between(a: Luma, b: Luma, start: Flow | None = None) -> Flow:
    """DIS optical flow (Kroeger et al. 2016) from ``a`` to ``b``; ``start``: an estimate to begin with."""
    engine: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    if min(a.shape) < 16:  # DIS has no pyramid for less
        return np.zeros((*a.shape, 2), np.float32)
    flow: Flow = engine.calc(a, b, None if start is None else start.astype(np.float32))
    return flow


def warped(frame: Frame, flow: Flow) -> Frame:
    """``frame`` sampled at each pixel's place plus ``flow``.

    Lanczos: a bilinear warp loses as much detail as a crossfade.
    """
    height, width = frame.shape[:2]
    across = (flow[..., 0] + np.arange(width, dtype=np.float32)).astype(np.float32)
    down = (flow[..., 1] + np.arange(height, dtype=np.float32)[:, None]).astype(np.float32)
    moved = cv2.remap(frame, across, down, cv2.INTER_LANCZOS4, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(moved, np.uint8)


def reach(flow: Flow, percentile: float = 97) -> float:
    """How far the fastest pixels but 3 % go, in pixels."""
    return float(np.percentile(np.hypot(flow[..., 0], flow[..., 1]), percentile))
