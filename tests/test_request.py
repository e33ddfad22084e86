"""Requests are refused early, with the field's name."""

from pathlib import Path

import pytest

from pipeline.errors import InvalidRequest
from pipeline.request import DEFAULT_PROMPT, RenderRequest


def test_a_minimal_request_has_defaults() -> None:
    """An image and an audio are enough."""
    request = RenderRequest.checked(image=Path("a.png"), audio=Path("b.wav"))
    assert (request.prompt, request.seed, request.use_multi_gpu, request.input_type) == (
        DEFAULT_PROMPT,
        0,
        True,
        "image",
    )


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "image"),
        ({"image": "a.png", "video": "b.mp4"}, "image"),
        ({"image": "a.png", "width": 8}, "width"),
        ({"image": "a.png", "height": 100_000}, "height"),
        ({"image": "a.png", "max_frames": 0}, "max_frames"),
        ({"image": "a.png", "seed": -1}, "seed"),
        ({"image": "a.png", "colour": "red"}, "colour"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, object], field: str) -> None:
    """What can't be used is an InvalidRequest of that field."""
    with pytest.raises(InvalidRequest) as caught:
        RenderRequest.checked(audio="b.wav", **fields)
    assert caught.value.field == field
