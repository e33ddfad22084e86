"""Where each of two speakers is: masks for the model, made from pictures, boxes, or nothing.

The model sees a mask in cells of 16 x 16 pixels, so a mask is made of such cells here already.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from pipeline.errors import InvalidRequest
from pipeline.portrait import GRID, Size, read_picture, to_png
from pipeline.request import Box, RenderRequest

SAME_SHAPE = 0.02
"""A mask's aspect may differ from the picture's by this share."""

Cells = npt.NDArray[np.bool_]
"""[rows, columns]: whether a cell belongs to the speaker."""


def speaker_masks(request: RenderRequest, source: Size, size: Size) -> tuple[bytes, bytes]:
    """The masks of both speakers as PNG of the video's ``size``, white where the speaker is.

    ``source`` is the size of the picture as given; masks and boxes go through the same crop as it does.
    Raises ``InvalidRequest`` for ``mask_1``, ``mask_2``, ``box_1``, ``box_2``.
    """
    if request.mask_1 is not None and request.mask_2 is not None:
        first = _of_picture("mask_1", request.mask_1, source, size)
        second = _of_picture("mask_2", request.mask_2, source, size)
    elif request.box_1 is not None and request.box_2 is not None:
        first = _of_box("box_1", request.box_1, source, size)
        second = _of_box("box_2", request.box_2, source, size)
    else:
        columns = np.arange(size[0] // GRID) < size[0] // GRID / 2
        first = np.tile(columns, (size[1] // GRID, 1))
        second = ~first
    return _to_png(first), _to_png(second)


def _of_picture(field: str, path: Path, source: Size, size: Size) -> Cells:
    mask = read_picture(path, field, paper="black").convert("L")
    if abs(mask.width * source[1] / (mask.height * source[0]) - 1) > SAME_SHAPE:
        raise InvalidRequest(
            field,
            f"{path} is {mask.width}x{mask.height}, the picture {source[0]}x{source[1]}: not the same shape",
        )
    fitted = np.asarray(ImageOps.fit(mask, size, Image.Resampling.BOX), dtype=np.float32)
    rows, columns = size[1] // GRID, size[0] // GRID
    cells: Cells = fitted.reshape(rows, GRID, columns, GRID).mean(axis=(1, 3)) >= 127.5
    if not cells.any():
        raise InvalidRequest(field, f"{path} has no white part as large as {GRID}x{GRID} pixels of the video")
    return cells


def _of_box(field: str, box: Box, source: Size, size: Size) -> Cells:
    if box[2] > source[0] or box[3] > source[1]:
        raise InvalidRequest(field, f"{list(box)} goes beyond the picture of {source[0]}x{source[1]} pixels")
    scale = max(size[0] / source[0], size[1] / source[1])
    spans = []
    for axis in (0, 1):
        cut = (source[axis] * scale - size[axis]) / 2
        low, high = box[axis] * scale - cut, box[axis + 2] * scale - cut
        # A cell belongs to the box if its middle does; the smallest box has the cell that it lies in.
        first = max(0, math.ceil(low / GRID - 0.5))
        after = min(size[axis] // GRID, math.ceil(high / GRID - 0.5))
        if high <= 0 or low >= size[axis]:
            raise InvalidRequest(
                field, f"{list(box)} lies outside of the {size[0]}x{size[1]} that are rendered"
            )
        if first >= after:
            first = min(max(0, math.floor((low + high) / 2 / GRID)), size[axis] // GRID - 1)
            after = first + 1
        spans.append(slice(first, after))
    cells: Cells = np.zeros((size[1] // GRID, size[0] // GRID), np.bool_)
    cells[spans[1], spans[0]] = True
    return cells


def _to_png(cells: Cells) -> bytes:
    pixels = cells.repeat(GRID, axis=0).repeat(GRID, axis=1)
    return to_png(np.stack([np.where(pixels, 255, 0).astype(np.uint8)] * 3, axis=-1))
