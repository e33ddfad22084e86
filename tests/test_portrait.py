"""``pipeline.portrait``: any usual picture, upright, undistorted, in the model's grid."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from pipeline.errors import InvalidRequest
from pipeline.portrait import choose_size, prepare_portrait

RED, BLUE = (220, 30, 40), (20, 40, 200)


def halves(width: int = 160, height: int = 96) -> Image.Image:
    """Left half red, right half blue."""
    picture = Image.new("RGB", (width, height), RED)
    picture.paste(BLUE, (width // 2, 0, width, height))
    return picture


def prepared(source: Path, width: int | None = None, height: int | None = None) -> np.ndarray[Any, Any]:
    prepared = prepare_portrait(source, width, height)
    content, size = prepared.png, prepared.size
    with Image.open(io.BytesIO(content)) as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", size)
        return np.asarray(picture).astype(int)


def close(pixel: np.ndarray[Any, Any], colour: tuple[int, int, int], slack: int = 6) -> bool:
    return bool(np.abs(pixel - colour).max() <= slack)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("p.png", {}),
        ("p.jpg", {"quality": 95, "subsampling": 0}),
        ("p.webp", {"lossless": True}),
        ("p.bmp", {}),
        ("p.tiff", {"compression": "tiff_lzw"}),
    ],
)
def test_usual_formats(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    """PNG, JPEG, WebP, BMP and TIFF, whatever the name ends with."""
    halves().save(tmp_path / name, **options)
    (tmp_path / name).rename(tmp_path / "picture")
    out = prepared(tmp_path / "picture", 160, 96)
    assert close(out[48, 20], RED)
    assert close(out[48, 140], BLUE)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "PA", "RGBA", "1", "CMYK", "YCbCr", "I;16", "I"])
def test_every_mode(tmp_path: Path, mode: str) -> None:
    """Grey, palette, alpha, print colours and 16 bits become 8-bit RGB of the same brightness."""
    grey = Image.new("L", (64, 64), 128 if mode != "1" else 255)
    if mode in ("I;16", "I"):
        picture = Image.fromarray(np.full((64, 64), 128 * 257, np.uint16)).convert(mode)
    else:
        picture = grey.convert("RGB" if mode in ("CMYK", "YCbCr") else "L").convert(mode)
    picture.save(tmp_path / "p.tiff" if mode in ("CMYK", "YCbCr", "PA", "I") else tmp_path / "p.png")
    source = next(tmp_path.iterdir())
    expected = 255 if mode == "1" else 128
    assert close(prepared(source, 64, 64)[32, 32], (expected, expected, expected), 3)


def test_transparency_is_white_paper(tmp_path: Path) -> None:
    """What can be seen through is white; palettes can be transparent too."""
    picture = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    picture.paste((*BLUE, 255), (0, 0, 32, 64))
    picture.save(tmp_path / "p.png")
    picture.quantize(8).save(tmp_path / "q.png")
    for name in ("p.png", "q.png"):
        out = prepared(tmp_path / name, 64, 64)
        assert close(out[32, 10], BLUE)
        assert close(out[32, 60], (255, 255, 255))


@pytest.mark.parametrize(("orientation", "place"), [(3, (48, 10)), (6, (10, 48)), (8, (150, 48))])
def test_phones_are_turned(tmp_path: Path, orientation: int, place: tuple[int, int]) -> None:
    """EXIF says how the phone was held; red and blue are where the photographer saw them."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    halves().save(tmp_path / "p.jpg", exif=exif, quality=95)
    out = prepared(tmp_path / "p.jpg", *((160, 96) if orientation == 3 else (96, 160)))
    assert close(out[place], BLUE if orientation == 3 else RED, 12)


def test_profiles_are_honoured(tmp_path: Path) -> None:
    """A picture in another colour space is converted; a broken profile is not fatal."""
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    halves().save(tmp_path / "s.png", icc_profile=lab.tobytes())
    halves().save(tmp_path / "b.png", icc_profile=b"no profile at all" * 20)
    for name in ("s.png", "b.png"):
        assert close(prepared(tmp_path / name, 160, 96)[48, 20], RED, 2)


def test_fitting_cuts_the_middle_and_never_stretches(tmp_path: Path) -> None:
    """A circle stays a circle, at the middle."""
    y, x = np.mgrid[:200, :400]
    disc = (np.hypot(x - 200, y - 100) < 60)[..., None] * np.array([255, 255, 255])
    Image.fromarray(disc.astype(np.uint8)).save(tmp_path / "p.png")
    out = prepared(tmp_path / "p.png", 96, 96)[..., 0] > 128
    rows, columns = np.flatnonzero(out.any(1)), np.flatnonzero(out.any(0))
    assert abs(len(rows) - len(columns)) <= 1
    assert rows.mean() == pytest.approx(47.5, abs=1) == columns.mean()


@given(st.integers(64, 2048), st.integers(64, 2048), st.integers(1, 6000), st.integers(1, 6000))
def test_sizes_are_in_the_grid(width: int, height: int, wide: int, high: int) -> None:
    """Multiples of 16 from 64 to 2048, next to what was asked for."""
    for asked in ((width, height), (width, None), (None, height), (None, None)):
        size = choose_size(*asked, (wide, high))
        assert all(side % 16 == 0 and 64 <= side <= 2048 for side in size)
        assert all(want is None or abs(side - want) <= 8 for side, want in zip(size, asked, strict=True))


@given(st.floats(0.4, 2.5))
def test_the_default_keeps_the_aspect(aspect: float) -> None:
    """About 832 x 480 pixels in the portrait's own shape."""
    width, height = choose_size(None, None, (round(3000 * aspect), 3000))
    assert width / height == pytest.approx(aspect, rel=0.05)
    assert width * height == pytest.approx(832 * 480, rel=0.05)


@pytest.mark.parametrize(
    ("width", "height", "field"),
    [(63, None, "width"), (512, 2049, "height"), (0, 0, "width"), (-16, 64, "width")],
)
def test_sizes_that_no_model_renders_are_refused(width: int, height: int | None, field: str) -> None:
    """The error names the field and the limits."""
    with pytest.raises(InvalidRequest, match="between 64 and 2048") as caught:
        choose_size(width, height, (100, 100))
    assert caught.value.field == field


def truncated(path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:5_000])


def cut_jpeg(path: Path) -> None:
    halves(640, 480).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:2_000])


def bomb(path: Path, side: int) -> None:
    Image.new("1", (side, side)).save(path, "PNG")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is no file"),
        (lambda path: path.touch(), "is empty"),
        (lambda path: path.write_text("A text that is called a picture."), "is no PNG, JPEG"),
        (lambda path: halves().save(path, "GIF"), "is no PNG, JPEG"),
        (truncated, "can't be read to its end"),
        (cut_jpeg, "can't be read to its end"),
        (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"), "p.png"),
        (lambda path: bomb(path, 10_100), "limit is 100,000,000"),
        (lambda path: bomb(path, 14_000), "more than 100,000,000"),
    ],
)
def test_what_is_no_picture_is_refused(tmp_path: Path, make: Callable[[Path], None], words: str) -> None:
    """Early, naming the field and the file."""
    make(source := tmp_path / "p.png")
    with pytest.raises(InvalidRequest, match=words) as caught:
        prepare_portrait(source, None, None)
    assert caught.value.field == "image"
    assert "p.png" in str(caught.value)
