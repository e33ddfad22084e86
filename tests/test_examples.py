"""The bundled portrait and speech are there, small, and what the demo needs."""

from __future__ import annotations

from pathlib import Path

import av
import cv2
import numpy as np
from PIL import Image

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_portrait_is_512_square_colour() -> None:
    """The portrait decodes as 512 x 512 colour and takes less than 200 kB."""
    path = EXAMPLES / "portrait.png"
    with Image.open(path) as image:
        image.load()
        assert image.size == (512, 512)
        assert image.mode in ("RGB", "RGBA")
    assert path.stat().st_size < 200_000


def test_portrait_has_one_findable_face() -> None:
    """OpenCV's cascade finds exactly one face, about where a face is assumed when none is found."""
    with Image.open(EXAMPLES / "portrait.png") as image:
        gray = np.asarray(image.convert("L"))
    cascades = Path(cv2.__file__).parent / "data"
    cascade = cv2.CascadeClassifier(str(cascades / "haarcascade_frontalface_default.xml"))
    faces = cascade.detectMultiScale(gray, 1.1, 5)
    assert len(faces) == 1
    x, y, width, height = (int(v) / 512 for v in faces[0])
    assert abs(x + width / 2 - 0.5) < 0.03
    assert abs(y + height / 2 - 0.42) < 0.03
    assert abs(height - 0.45) < 0.04


def test_speech_lasts_at_least_20_seconds() -> None:
    """The speech decodes to 20 to 24 s of sound with pauses in it, and takes less than 1 MB."""
    path = EXAMPLES / "speech.wav"
    with av.open(str(path)) as container:
        rate = container.streams.audio[0].rate
        samples = np.concatenate([f.to_ndarray().reshape(-1) for f in container.decode(audio=0)])
    assert rate is not None
    assert 20 * rate <= len(samples) <= 24 * rate
    tenths = np.abs(samples[: len(samples) // (rate // 10) * (rate // 10)].astype(np.int32))
    loudness = tenths.reshape(-1, rate // 10).mean(axis=1)
    assert (loudness > 1000).mean() > 0.5
    assert (loudness < 50).sum() >= 10
    assert path.stat().st_size < 1_000_000


def test_speech_text_is_beside_it() -> None:
    """The words of the speech and where the media come from can be read beside them."""
    assert len((EXAMPLES / "speech.txt").read_text(encoding="utf-8").split()) > 40
    assert "espeak-ng" in (EXAMPLES / "NOTICE").read_text(encoding="utf-8")
