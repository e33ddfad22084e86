"""What comes in as a colour comes out as that colour: patches through everything but the engine.

A source is read as the pipeline does, encoded as the result is, and decoded by ffmpeg to RGB as a player
would.  At most 3 of 255 levels are lost: up to 2 to the 8 bits of a YUV source, 1 or 2 to the result's own.
"""

from __future__ import annotations

import io
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from pipeline import ffmpeg
from pipeline.frame_writer import FrameWriter
from pipeline.portrait import prepare_portrait
from pipeline.source_video import SourceVideo

PATCHES = ((128, 128, 128), (224, 172, 140), (200, 40, 40), (40, 170, 60), (40, 60, 200), (16, 16, 20))
"""Grey, skin, red, green, blue, nearly black."""
SIDE = 64

Pixels = np.ndarray[Any, Any]


def patches(width: int = SIDE * len(PATCHES), height: int = SIDE) -> Pixels:
    columns = np.arange(width) * len(PATCHES) // width
    return np.ascontiguousarray(
        np.broadcast_to(np.array(PATCHES, np.uint8)[columns][None], (height, width, 3))
    )


def centres(frame: Pixels) -> Pixels:
    """The colour in the middle of each patch."""
    height, width = frame.shape[:2]
    places = [(2 * i + 1) * width // (2 * len(PATCHES)) for i in range(len(PATCHES))]
    return frame[height // 2, places].astype(int)


def run(*arguments: object, stdin: bytes = b"") -> bytes:
    command = [ffmpeg.binary(), "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, check=True).stdout


def out_of_the_pipeline(png: bytes, tmp_path: Path) -> Pixels:
    """A conditioning picture, encoded as a result and decoded as a player does."""
    with Image.open(io.BytesIO(png)) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    height, width = pixels.shape[:2]
    with FrameWriter(tmp_path / "out.mp4", width, height, ffmpeg.FINAL) as writer:
        writer.write(pixels)
    shown = ["-vf", "scale=flags=accurate_rnd+full_chroma_int", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = run("-i", tmp_path / "out.mp4", *shown)
    return np.frombuffer(raw, np.uint8).reshape(height, width, 3)


def source(
    path: Path, pixel_format: str, matrix: str | None, spread: str, *more: str, high: int = SIDE
) -> Path:
    """A lossless video of the patches in a pixel format, matrix and range; without a matrix it names none."""
    pixels = patches(height=high)
    size = f"{pixels.shape[1]}x{pixels.shape[0]}"
    used = matrix or ("bt709" if high >= 720 else "smpte170m")
    named = f",setparams=colorspace={matrix or 'unknown'}:range={spread}"
    to_yuv = f"scale=out_color_matrix={used}:out_range={spread}:flags=accurate_rnd+full_chroma_int"
    filters = f"{to_yuv},format={pixel_format}{named}"
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", "25", "-i", "-"]
    codec = ["-c:v", "libx264", "-qp", "0"] if pixel_format != "gbrp" else ["-c:v", "libx264rgb", "-qp", "0"]
    run(*raw, "-vf", filters, *codec, *more, path, stdin=pixels.tobytes() * 3)
    return path


@pytest.mark.parametrize(
    ("pixel_format", "matrix", "spread", "high"),
    [
        ("yuv420p", "bt709", "tv", 64),
        ("yuv420p", "smpte170m", "tv", 64),
        ("yuv420p", "bt470bg", "tv", 64),
        ("yuv420p", "bt709", "pc", 64),
        ("yuv420p", "smpte170m", "pc", 64),
        ("yuv420p", None, "tv", 64),  # no name: BT.601 for small pictures
        ("yuv420p", None, "tv", 720),  # and BT.709 for large ones
        ("yuv444p", "bt709", "tv", 64),
        ("yuv420p10le", "bt709", "tv", 64),
        ("yuv422p10le", "bt709", "pc", 64),
        ("yuv420p10le", "bt2020nc", "tv", 64),
    ],
)
def test_videos(tmp_path: Path, pixel_format: str, matrix: str | None, spread: str, high: int) -> None:
    """8 and 10 bits, BT.601, BT.709 and BT.2020's matrix, limited and full range, with tags and without."""
    path = source(tmp_path / "v.mp4", pixel_format, matrix, spread, high=high)
    video = SourceVideo.opened(path)
    png = video.png_at(1, *video.size)
    assert np.abs(centres(out_of_the_pipeline(png, tmp_path)) - PATCHES).max() <= 3


@pytest.mark.parametrize("aspect", ["2/1", "1/2", "64/45"])
@pytest.mark.parametrize("name", ["v.mp4", "v.mkv"])
def test_pixels_that_are_not_square(tmp_path: Path, name: str, aspect: str) -> None:
    """An anamorphic source has the shape that players show; a circle is a circle."""
    wide, high = (int(part) for part in aspect.split("/"))
    disc = f"geq=lum='255*lt(hypot((X-60)*{wide}/{high},Y-60),25)':cb=128:cr=128"
    picture = ["-f", "lavfi", "-i", f"color=s=120x120:d=0.2:r=25,{disc},setsar={aspect}"]
    run(*picture, "-c:v", "libx264", "-pix_fmt", "yuv420p", tmp_path / name)
    video = SourceVideo.opened(tmp_path / name)
    assert video.size[0] / video.size[1] == pytest.approx(wide / high, rel=0.01)
    bright = video.frame_at(0)[..., 0] > 128
    assert np.ptp(np.flatnonzero(bright.any(0))) == pytest.approx(
        np.ptp(np.flatnonzero(bright.any(1))), abs=3
    )


def test_turned_and_not_square(tmp_path: Path) -> None:
    """Pixels are made square before the picture is turned."""
    picture = ["-f", "lavfi", "-i", "color=s=120x60:d=0.2:r=25,setsar=2/1"]
    run(*picture, "-c:v", "libx264", "-pix_fmt", "yuv420p", tmp_path / "plain.mp4")
    run("-display_rotation", 90, "-i", tmp_path / "plain.mp4", "-c", "copy", tmp_path / "turned.mp4")
    assert SourceVideo.opened(tmp_path / "turned.mp4").size == (60, 240)


@pytest.mark.parametrize(("width", "height"), [(385, 65), (97, 63), (61, 201)])
def test_odd_sizes(tmp_path: Path, width: int, height: int) -> None:
    """Sources of odd width and height come whole, into a size that the model takes."""
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", "25", "-i", "-"]
    lossless = ["-c:v", "libx264rgb", "-qp", "0", "-pix_fmt", "rgb24"]
    run(*raw, *lossless, tmp_path / "v.mkv", stdin=patches(width, height).tobytes() * 2)
    video = SourceVideo.opened(tmp_path / "v.mkv")
    assert video.size == (width, height)
    assert np.abs(centres(video.frame_at(1)) - PATCHES).max() <= 1
    size = video.fitted_size(None, None)
    assert (size[0] % 16, size[1] % 16) == (0, 0)
    with Image.open(io.BytesIO(video.png_at(0, *size))) as png:
        assert png.size == size


def swapped_profile() -> bytes:
    """sRGB with the names of red and blue exchanged: pictures with it show red as blue."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name in (b"XYZ", b"TRC"):
        profile = profile.replace(b"r" + name, b"?" + name).replace(b"b" + name, b"r" + name)
        profile = profile.replace(b"?" + name, b"b" + name)
    return profile


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colour_profiles_of_pictures(tmp_path: Path, mode: str) -> None:
    """The colours are those that the profile means, with alpha and palettes too."""
    picture = Image.fromarray(patches()[..., ::-1].copy())
    if mode == "RGBA":
        picture.putalpha(255)
        picture.putpixel((0, 0), (0, 0, 0, 0))
    else:
        picture = picture.convert(mode, palette=Image.Palette.ADAPTIVE) if mode == "P" else picture
    picture.save(tmp_path / "p.png", icc_profile=swapped_profile())
    portrait = prepare_portrait(tmp_path / "p.png", SIDE * len(PATCHES), SIDE)
    assert np.abs(centres(out_of_the_pipeline(portrait.png, tmp_path)) - PATCHES).max() <= 3


@pytest.mark.parametrize("pixel_format", ["rgb48be", "rgba64be", "gray16be", "rgb24"])
def test_16_bits_a_channel(tmp_path: Path, pixel_format: str) -> None:
    """PNGs of 16 bits keep their colours; greys too."""
    pixels = patches()
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{SIDE * len(PATCHES)}x{SIDE}", "-i", "-"]
    run(*raw, "-frames:v", 1, "-pix_fmt", pixel_format, tmp_path / "p.png", stdin=pixels.tobytes())
    portrait = prepare_portrait(tmp_path / "p.png", SIDE * len(PATCHES), SIDE)
    found = centres(out_of_the_pipeline(portrait.png, tmp_path))
    if pixel_format.startswith("gray"):
        wanted = np.array(PATCHES) @ [0.299, 0.587, 0.114]
        assert np.abs(found - wanted[:, None]).max() <= 4
    else:
        assert np.abs(found - PATCHES).max() <= 2
