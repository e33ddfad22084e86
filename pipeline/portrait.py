"""The portrait: read any usual picture, fit it to a size that the model can render.

Fitting keeps the aspect: the middle is cut out, nothing is stretched.  Videos are ``source_video``'s.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from pipeline.errors import InvalidRequest
from pipeline.frames import Frame

GRID = 16
"""Sizes are multiples of 16: the VAE packs 8 x 8 pixels, the transformer 2 x 2 of those."""

SMALLEST, LARGEST = 64, 2048

DEFAULT_AREA = 832 * 480
"""Pixels of InfiniteTalk's 480p, for which the default size is made."""

MOST_PIXELS = 100_000_000
"""A larger picture is refused before it is decoded."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")

Size = tuple[int, int]
"""Width, height."""


def choose_size(width: int | None, height: int | None, source: Size, area: int = DEFAULT_AREA) -> Size:
    """The video's size: what is given, rounded to the grid; what is not, by the source's aspect.

    Without either, about ``area`` pixels.
    Raises ``InvalidRequest`` for a given size outside 64 to 2048.

    >>> choose_size(None, None, (1920, 1080)), choose_size(500, None, (1000, 500))
    ((848, 480), (496, 256))
    """
    for field, value in (("width", width), ("height", height)):
        if value is not None and not SMALLEST <= value <= LARGEST:
            raise InvalidRequest(field, f"{value} is not between {SMALLEST} and {LARGEST} pixels")
    aspect = source[0] / source[1]
    if width is None and height is None:
        return _on_grid(math.sqrt(area * aspect)), _on_grid(math.sqrt(area / aspect))
    if width is None:
        assert height is not None
        return _on_grid(height * aspect), _on_grid(height)
    return _on_grid(width), _on_grid(width / aspect if height is None else height)


@dataclass(frozen=True, slots=True)
class Portrait:
    """A picture fitted to the video's size."""

    png: bytes
    size: Size
    source: Size
    """Of the picture as given, upright."""


def prepare_portrait(
    source: Path, width: int | None, height: int | None, area: int = DEFAULT_AREA
) -> Portrait:
    """The picture fitted to the video's size (see ``choose_size``).

    Turned as its EXIF says, transparent parts on white, in sRGB with 8 bits.
    Raises ``InvalidRequest`` for ``image``, ``width`` and ``height``.
    """
    picture = read_picture(source)
    size = choose_size(width, height, picture.size, area)
    return Portrait(to_png(fit(np.asarray(picture), size)), size, picture.size)


def fit(picture: Frame, size: Size) -> Frame:
    """The middle of a picture, uint8 [H, W, 3], scaled (Lanczos) to ``size`` without distortion."""
    fitted = ImageOps.fit(Image.fromarray(picture), size, Image.Resampling.LANCZOS)
    return np.asarray(fitted)


def to_png(picture: Frame) -> bytes:
    """A picture as PNG, lightly compressed."""
    target = io.BytesIO()
    Image.fromarray(picture).save(target, "PNG", compress_level=3)
    return target.getvalue()


def _on_grid(pixels: float) -> int:
    limited = min(max(pixels, SMALLEST), LARGEST)
    return round(limited / GRID) * GRID


def read_picture(source: Path, field: str = "image", paper: str = "white") -> Image.Image:
    """A picture upright, in sRGB with 8 bits, on ``paper`` where it is transparent.

    Raises ``InvalidRequest`` for ``field``.
    """
    if not source.is_file():
        raise InvalidRequest(field, f"{source} is no file" if source.exists() else f"{source} does not exist")
    if source.stat().st_size == 0:
        raise InvalidRequest(field, f"{source} is empty")
    try:
        with Image.open(source, formats=FORMATS) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                reason = (
                    f"{source} has {picture.width} x {picture.height} pixels, the limit is {MOST_PIXELS:,}"
                )
                raise InvalidRequest(field, reason)
            return _rgb(ImageOps.exif_transpose(picture), paper)
    except Image.DecompressionBombError as error:
        raise InvalidRequest(field, f"{source} has more than {MOST_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        raise InvalidRequest(field, f"{source} is no {', '.join(FORMATS)} picture") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise InvalidRequest(field, f"{source} can't be read to its end: {error}") from error


def _rgb(picture: Image.Image, paper: str) -> Image.Image:
    """Any mode to 8-bit sRGB."""
    if picture.mode.startswith("I"):  # 16 bits of grey; Pillow's own conversion clips at 255
        levels = np.asarray(picture).astype(np.int64)
        return Image.fromarray((levels.clip(0, 65_535) // 257).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = _in_srgb(picture.convert("RGBA"), "RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, paper), picture).convert("RGB")
    if picture.mode == "P":
        picture = picture.convert("RGB")
    return _in_srgb(picture, "RGB").convert("RGB")


def _in_srgb(picture: Image.Image, mode: str) -> Image.Image:
    """The picture converted by its own colour profile; without one as it is."""
    profile = picture.info.get("icc_profile")
    if profile and picture.mode in ("RGB", "RGBA", "CMYK", "L"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(
                picture, source, ImageCms.createProfile("sRGB"), outputMode=mode
            )
        except (ImageCms.PyCMSError, OSError):
            return picture  # a broken profile: the picture is shown without it
        if converted is not None:
            return converted
    return picture
