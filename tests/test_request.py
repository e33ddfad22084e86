"""Requests are refused early, with the field's name."""

from pathlib import Path

import pytest

from pipeline.errors import InvalidRequest
from pipeline.request import AREAS, DEFAULT_PROMPT, SHAPES, RenderRequest


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
        ({"image": "a.png", "fps": 5}, "fps"),
        ({"image": "a.png", "fps": 29.97}, "fps"),
        ({"image": "a.png", "audio_start": -1}, "audio_start"),
        ({"image": "a.png", "audio_end": float("inf")}, "audio_end"),
        ({"image": "a.png", "audio_start": 3, "audio_end": 3}, "audio_end"),
        ({"image": "a.png", "audio_2": "c.wav", "audio_start": 1}, "audio_start"),
        ({"image": "a.png", "colour": "red"}, "colour"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, object], field: str) -> None:
    """What can't be used is an InvalidRequest of that field."""
    with pytest.raises(InvalidRequest) as caught:
        RenderRequest.checked(audio="b.wav", **fields)
    assert caught.value.field == field


TWO = {"image": "a.png", "audio_2": "c.wav"}


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"image": "a.png", "audio_order": "in_turns"}, "audio_order", "audio_2"),
        ({"image": "a.png", "mask_1": "m.png", "mask_2": "n.png"}, "mask_1", "audio_2"),
        ({"image": "a.png", "box_2": (0, 0, 9, 9)}, "box_2", "audio_2"),
        ({**TWO, "mask_2": "n.png"}, "mask_1", "one for each speaker"),
        ({**TWO, "box_1": (0, 0, 9, 9)}, "box_2", "one for each speaker"),
        (
            {**TWO, "mask_1": "m", "mask_2": "n", "box_1": (0, 0, 9, 9), "box_2": (0, 0, 9, 9)},
            "mask_1",
            "not both",
        ),
        ({**TWO, "box_1": (9, 0, 9, 9), "box_2": (0, 0, 9, 9)}, "box_1", "no box"),
        ({**TWO, "box_1": (0, 0, 9, 9), "box_2": (-1, 0, 9, 9)}, "box_2", "no box"),
        ({**TWO, "audio_order": "never"}, "audio_order", "together"),
        ({"image": "a.png", "size": "480p", "width": 640}, "size", "width"),
        ({"image": "a.png", "aspect": "1:1", "height": 640}, "aspect", "height"),
        (
            {"image": "a.png", "max_chain_seconds": 60},
            "max_chain_seconds",
            "only together with continuity exact",
        ),
        ({"image": "a.png", "continuity": "exact", "max_chain_seconds": 3}, "max_chain_seconds", "3.24"),
        ({"image": "a.png", "cfg": 5.0}, "cfg", ""),
        ({"image": "a.png", "preset": "best"}, "preset", "quality"),
    ],
)
def test_what_does_not_fit_together_is_refused(fields: dict[str, object], field: str, words: str) -> None:
    """Combinations are checked with the request, before a file is opened or an engine started."""
    with pytest.raises(InvalidRequest) as caught:
        RenderRequest.checked(audio="b.wav", **fields)
    assert caught.value.field == field
    assert words in caught.value.reason


def test_chains_are_bounded_in_whole_frames() -> None:
    """3.24 s are a window of 81 frames, whatever the binary fraction says."""
    base = {"image": "a.png", "audio": "b.wav", "continuity": "exact"}
    bounds = [RenderRequest.checked(**base, max_chain_seconds=s).max_chain_frames for s in (3.24, 8.12, 60)]
    assert bounds == [81, 203, 1500]
    assert RenderRequest.checked(**base).max_chain_frames is None


def test_sizes_and_presets() -> None:
    """Usual sizes lie on the model's grid; steps win over the preset."""
    base = {"image": "a.png", "audio": "b.wav"}
    for size, shapes in SHAPES.items():
        for aspect, (width, height) in shapes.items():
            request = RenderRequest.checked(**base, size=size, aspect=aspect)
            assert request.wanted_size == (width, height)
            assert width % 16 == height % 16 == 0
            assert abs(width * height / AREAS[size] - 1) < 0.05
    assert RenderRequest.checked(**base, aspect="9:16").wanted_size == (480, 832)
    assert RenderRequest.checked(**base, size="720p").wanted_size == (None, None)
    assert [RenderRequest.checked(**base, preset=p).sampler_steps for p in ("fast", "quality")] == [None, 8]
    assert RenderRequest.checked(**base, preset="quality", steps=3).sampler_steps == 3


def test_an_exact_chain_needs_the_native_family() -> None:
    """The wrapper's node continues no chain: refused before any GPU starts."""
    with pytest.raises(InvalidRequest, match=r"^continuity: exact needs the native family"):
        RenderRequest.checked(image="a.png", audio="a.wav", continuity="exact", workflow_family="wrapper")
