"""Motion frames keep their number and their pixels in both readers that engines use."""

import io

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from pipeline.motion_frames import pack


def nine() -> NDArray[np.uint8]:
    """Nine noisy frames, odd size, frames 2 to 4 equal."""
    frames = np.random.default_rng(0).integers(0, 256, (9, 30, 52, 3), dtype=np.uint8)
    frames[3] = frames[4] = frames[2]
    return frames


def test_libav_reads_every_frame_exactly() -> None:
    """ComfyUI 0.33 opens images with libav: nine frames, rgb24, bit by bit, equal neighbours included."""
    frames = nine()
    with av.open(io.BytesIO(pack(list(frames))), mode="r") as file:
        read = list(file.decode(video=0))
    assert {frame.format.name for frame in read} == {"rgb24"}
    assert np.array_equal(np.stack([frame.to_ndarray(format="rgb24") for frame in read]), frames)


def test_pillow_reads_every_frame_exactly() -> None:
    """ComfyUI 0.11 and the draft engine open images with Pillow: the same nine frames."""
    frames = nine()
    image = Image.open(io.BytesIO(pack(list(frames))))
    read = [np.asarray(page.convert("RGB")) for page in ImageSequence.Iterator(image)]
    assert np.array_equal(np.stack(read), frames)


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [np.zeros((8, 8, 3), np.float32)],
        [np.zeros((8, 8), np.uint8)],
        [np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)],
    ],
)
def test_other_arrays_are_refused(frames: list[NDArray[np.uint8]]) -> None:
    """No frame, another type, another shape: ValueError instead of a file that reads wrongly."""
    with pytest.raises(ValueError, match="motion frame"):
        pack(frames)
