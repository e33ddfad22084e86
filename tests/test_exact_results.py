"""The command line with a part of the sound, another rate and known colours: nothing is off by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
from PIL import Image

from pipeline.frames import check_video
from pipeline.sound import measure
from tests.render_command import Command

SIZE = 96
CORNERS = {(0, 0): (200, 40, 40), (0, 1): (40, 170, 60), (1, 0): (40, 60, 200), (1, 1): (224, 172, 140)}


def portrait(path: Path) -> Path:
    """A face of a sort, and a colour in each corner."""
    pixels = np.full((SIZE, SIZE, 3), 128, np.uint8)
    for (row, column), colour in CORNERS.items():
        pixels[row * 72 : row * 72 + 24, column * 72 : column * 72 + 24] = colour
    y, x = np.mgrid[:SIZE, :SIZE]
    pixels[np.hypot((x - 48) / 18, (y - 46) / 24) < 1] = (224, 172, 140)
    Image.fromarray(pixels).save(path)
    return path


def test_a_part_at_another_rate_in_its_own_colours(tmp_path: Path, speech_of: Callable[[int], Path]) -> None:
    """2.51 s of a speech at 30 fps: 75 frames by decoding, sound of 2.51 s to the sample.

    In the corners of every frame the portrait's colours.
    """
    output = tmp_path / "talk.mp4"
    arguments = ["--image", portrait(tmp_path / "p.png"), "--audio", speech_of(150), "-o", output]
    part = ["--audio-start", 1.2, "--audio-end", 3.71, "--fps", 30]
    command = Command(tmp_path, [*arguments, *part, "--width", SIZE, "--height", SIZE, "--json", "--gpus", 1])
    assert command.finish() == 0, command.log
    check_video(output, 75, 30)
    assert {key: command.result[key] for key in ("frames", "fps", "duration")} == {
        "frames": 75,
        "fps": 30,
        "duration": 2.5,
    }
    sound = measure(output)
    assert (sound.rate, sound.samples) == (48_000, round(2.51 * 48_000))
    with av.open(str(output)) as container:
        for frame in container.decode(video=0):
            pixels = frame.to_ndarray(format="rgb24").astype(int)
            for (row, column), colour in CORNERS.items():
                corner = pixels[row * 84 : row * 84 + 10, column * 84 : column * 84 + 10].mean(axis=(0, 1))
                assert np.abs(corner - colour).max() <= 4
