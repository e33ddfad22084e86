"""Masks of two speakers: halves, boxes and pictures, through the same crop as the portrait."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import InvalidRequest
from pipeline.masks import speaker_masks
from pipeline.portrait import fit
from pipeline.request import RenderRequest

SOURCE, SIZE = (1000, 500), (128, 128)
"""A wide picture of which the middle 500 columns are kept."""


def masks_of(**fields: object) -> list[np.ndarray]:
    """Both masks as booleans."""
    request = RenderRequest.checked(image="a.png", audio="b.wav", audio_2="c.wav", **fields)
    pictures = []
    for content in speaker_masks(request, SOURCE, SIZE):
        with Image.open(io.BytesIO(content)) as picture:
            assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", SIZE)
            levels = np.asarray(picture)[..., 0]
        assert set(np.unique(levels)) <= {0, 255}
        pictures.append(levels > 0)
    return pictures


def save(path: Path, mask: np.ndarray, mode: str = "L") -> Path:
    Image.fromarray(mask.astype(np.uint8) * 255).convert(mode).save(path)
    return path


def test_halves_are_the_default() -> None:
    """Speaker 1 is on the left, speaker 2 on the right; together they are everything."""
    left, right = masks_of()
    assert left[:, :64].all()
    assert not left[:, 64:].any()
    assert np.array_equal(right, ~left)


def test_boxes_and_pictures_go_through_the_portraits_crop(tmp_path: Path) -> None:
    """A box and a painted mask of one place are the same mask, and lie where the portrait's pixels lie."""
    box_1, box_2 = (300, 100, 450, 400), (550, 0, 900, 250)
    painted = []
    for number, (x0, y0, x1, y1) in enumerate((box_1, box_2), start=1):
        mask = np.zeros((SOURCE[1], SOURCE[0]), bool)
        mask[y0:y1, x0:x1] = True
        painted.append(save(tmp_path / f"{number}.png", mask))
        picture = fit(np.repeat(mask[..., None] * np.uint8(255), 3, axis=2), SIZE)[..., 0] > 127
        of_box = masks_of(box_1=box_1, box_2=box_2)[number - 1]
        wrong = picture != of_box
        assert wrong.mean() < 0.1  # the rim, in cells of 16 pixels
    of_boxes = masks_of(box_1=box_1, box_2=box_2)
    of_pictures = masks_of(mask_1=painted[0], mask_2=painted[1])
    for one, other in zip(of_boxes, of_pictures, strict=True):
        assert np.array_equal(one, other)


def test_a_small_box_is_at_least_one_cell() -> None:
    """The model sees cells of 16 pixels; a box between their middles still marks the one it lies in."""
    first, _ = masks_of(box_1=(500, 250, 503, 252), box_2=(0, 0, 1000, 500))
    assert first.sum() == 16 * 16
    assert first[64:80, 64:80].all()


def test_transparent_parts_of_a_mask_are_nobody(tmp_path: Path) -> None:
    """White strokes on a transparent layer, as painting programs save them, are the mask."""
    layer = np.zeros((500, 1000, 4), np.uint8)
    layer[:, 300:500] = 255
    Image.fromarray(layer).save(tmp_path / "m.png")
    first, second = masks_of(mask_1=tmp_path / "m.png", mask_2=tmp_path / "m.png")
    assert 0 < first.mean() < 0.6
    assert np.array_equal(first, second)


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"box_1": (0, 0, 1001, 10), "box_2": (0, 0, 9, 9)}, "box_1", "beyond the picture of 1000x500"),
        ({"box_1": (300, 0, 400, 10), "box_2": (0, 0, 200, 500)}, "box_2", "outside of the 128x128"),
        ({"mask_1": "black.png", "mask_2": "black.png"}, "mask_1", "no white part"),
        ({"mask_1": "white.png", "mask_2": "square.png"}, "mask_2", "not the same shape"),
        ({"mask_1": "white.png", "mask_2": "none.png"}, "mask_2", "does not exist"),
    ],
)
def test_unusable_masks_are_refused(
    tmp_path: Path, fields: dict[str, object], field: str, words: str
) -> None:
    """Each with the field's name."""
    save(tmp_path / "black.png", np.zeros((50, 100), bool))
    save(tmp_path / "white.png", np.ones((50, 100), bool), "RGB")
    save(tmp_path / "square.png", np.ones((50, 50), bool))
    there = {k: tmp_path / v if isinstance(v, str) else v for k, v in fields.items()}
    with pytest.raises(InvalidRequest) as caught:
        masks_of(**there)
    assert caught.value.field == field
    assert words in caught.value.reason
