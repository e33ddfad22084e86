"""Two renderings that disagree, for ``bench.seams``: drawn by the draft engine, or made from real footage.

The draft engine renders the same speech with two seeds, so the heads go different ways; a colour drift is
added to the end of the earlier segment.  The real talking-head video is disturbed as docs/seams.md says:

    S0  nothing: both renderings are the same frames
    S1  the head swayed by a smooth random warp: the same speech, another pose
    S2  other colours: gains and a gamma
    S3  S1, other colours and a blur
    S4  the same video 137 frames later: an independent take, the mouth disagrees too
    S5  S4 and other colours

How seams are made and judged is elsewhere.
"""

from __future__ import annotations

import wave
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.colours import small
from pipeline.draft import media
from pipeline.draft.drawing import Puppet, Voice, Window, draw_window, loudness
from pipeline.draft.face import Face, find_face
from pipeline.frames import Frame, read_frames
from pipeline.timeline import FPS, SAMPLES_PER_FRAME

ROOT = Path(__file__).resolve().parent.parent
REAL_VIDEO = ROOT.parent / "shared" / "data" / "infinitetalk" / "single" / "ref_video.mp4"
OVERLAP = 40
TAKE = 137
"""Frames between the two takes of S4 and S5."""
WARM_UP_EASE = 12

Stack: TypeAlias = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Trial:
    """One seam to make: the overlap twice, and a second of either segment's own frames around it."""

    before: Stack
    earlier: Stack
    later: Stack
    after: Stack
    levels: tuple[float, ...] | None = None
    """dBFS of the speech, for each frame of the overlap."""


@dataclass(frozen=True, slots=True)
class Footage:
    """Some seams of one kind, and undisturbed frames that say what natural motion is."""

    name: str
    what: str
    trials: tuple[Trial, ...]
    sources: tuple[Stack, ...]


def footage(size: int, trials: int, only: Collection[str] = (), real: Path = REAL_VIDEO) -> Iterator[Footage]:
    """All kinds, or ``only`` some, one at a time; those made from the ``real`` video where it is."""
    for name, overlap, drift in (
        ("draft", OVERLAP, False),
        ("draft, drift", OVERLAP, True),
        ("draft, 26", 26, True),
    ):
        if not only or name in only:
            yield draft_footage(name, size, trials, overlap, drift=drift)
    if real.is_file():
        video = np.stack([small(frame, size) for frame in read_frames(real)])
        for name, (what, later) in REAL.items():
            if not only or name in only:
                yield Footage(name, f"real video, {what}", cut(video, later(video), trials), (video,))


def draft_footage(name: str, size: int, trials: int, overlap: int, *, drift: bool) -> Footage:
    """Segments of the bundled portrait and speech, each with a seed of its own."""
    portrait = media.fit(media.load_pictures(ROOT / "examples" / "portrait.png"), size, size)[0]
    with wave.open(str(ROOT / "examples" / "speech.wav"), "rb") as file:
        sound = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768
        channels = sound.reshape(-1, file.getnchannels()).T.astype(np.float32)
        samples = media.speech_of(channels, file.getframerate())
    face = find_face(portrait)
    puppet = Puppet(portrait, [face])
    seams, sources = [], []
    for number in range(trials):
        start = 60 + 22 * number
        length = FPS + 1
        first = _drawn(puppet, face, samples, 0, start + overlap, 2 * number)
        second = _drawn(puppet, face, samples, start, overlap + length, 2 * number + 1)
        sources += [first[WARM_UP_EASE:], second[WARM_UP_EASE:]]
        if drift:
            first = drifted(first)
        level = samples[start * SAMPLES_PER_FRAME : (start + overlap) * SAMPLES_PER_FRAME]
        rms = np.sqrt(np.mean(level.reshape(overlap, -1) ** 2, axis=1))
        seams.append(
            Trial(
                first[start - length : start],
                first[start:],
                second[:overlap],
                second[overlap:],
                tuple(20 * np.log10(np.maximum(rms, 1e-5))),
            )
        )
    what = f"draft engine, {size}x{size}, overlap {overlap}" + (", colour drift" if drift else "")
    return Footage(name, what, tuple(seams), tuple(sources))


def _drawn(
    puppet: Puppet, face: Face, samples: npt.NDArray[np.float32], start: int, count: int, seed: int
) -> Stack:
    heard = samples[start * SAMPLES_PER_FRAME : (start + count) * SAMPLES_PER_FRAME]
    return np.stack(list(draw_window(Window(puppet, (Voice(face, loudness(heard)),), count, seed))))


def drifted(frames: Stack) -> Stack:
    """Warmer and darker towards the end, as a long chain goes: up to 5 levels."""
    gains = np.linspace([1.0, 1.0, 1.0], [1.03, 0.99, 0.95], len(frames))[:, None, None]
    return np.clip(np.rint(frames * gains), 0, 255).astype(np.uint8)


def cut(earlier: Stack, later: Stack, trials: int) -> tuple[Trial, ...]:
    """Evenly spaced seams from one rendering to another of the same frames."""
    around = FPS + 1
    last = min(len(earlier), len(later)) - OVERLAP - around
    seams = []
    for start in np.linspace(around, last, trials).astype(int):
        stop = start + OVERLAP
        seams.append(
            Trial(
                earlier[start - around : start],
                earlier[start:stop],
                later[start:stop],
                later[stop : stop + around],
            )
        )
    return tuple(seams)


def coloured(frames: Stack) -> Stack:
    """Gains of 1.05, 1.00 and 0.95 and a gamma of 0.95."""
    levels = 255 * (np.arange(256) / 255) ** 0.95
    tables = [np.clip(np.rint(levels * gain), 0, 255).astype(np.uint8) for gain in (1.05, 1.0, 0.95)]
    return np.stack([table[frames[..., channel]] for channel, table in enumerate(tables)], axis=-1)


def sway(frames: Stack, seed: int = 5) -> Stack:
    """The head moved smoothly by up to 7 pixels (of 458), 2 degrees and 2 %; the background stays."""
    height, width = frames.shape[1:3]
    face = find_face(frames[0])
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    distance = np.hypot((columns - face.x) / face.height, (rows - face.y) / (1.25 * face.height))
    mask = np.clip((1.25 - distance) / 0.6, 0, 1)
    mask = (mask * mask * (3 - 2 * mask)).astype(np.float32)
    path = _smooth_noise(len(frames), seed)
    far = 7 * max(height, width) / 458
    moved: list[Frame] = []
    for frame, (right, down, turn, grow) in zip(frames, path, strict=True):
        angle = np.radians(2 * turn)
        x, y = columns - face.x, rows - (face.y + face.height)
        across = columns - mask * (far * right - angle * y + 0.02 * grow * x)
        below = rows - mask * (0.6 * far * down + angle * x + 0.02 * grow * y)
        maps = across.astype(np.float32), below.astype(np.float32)
        moved.append(
            np.asarray(cv2.remap(frame, *maps, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE), np.uint8)
        )
    return np.stack(moved)


def _smooth_noise(count: int, seed: int) -> npt.NDArray[np.float64]:
    """[count, 4], each within -1..1, changing over about two seconds."""
    noise = np.random.default_rng(seed).normal(size=(count + 8 * FPS, 4))
    window = np.hanning(2 * FPS)
    smooth = np.stack([np.convolve(column, window, "same") for column in noise.T], axis=1)[4 * FPS :][:count]
    return np.asarray(smooth / np.abs(smooth).max(0))


def _blurred(frames: Stack) -> Stack:
    return np.stack([np.asarray(cv2.GaussianBlur(frame, (0, 0), 0.8), np.uint8) for frame in frames])


REAL: dict[str, tuple[str, Callable[[Stack], Stack]]] = {
    "S0": ("the same frames", lambda video: video),
    "S1": ("another pose", sway),
    "S2": ("other colours", coloured),
    "S3": ("another pose, other colours, blurred", lambda video: _blurred(coloured(sway(video)))),
    "S4": ("another take", lambda video: video[TAKE:]),
    "S5": ("another take, other colours", lambda video: coloured(video[TAKE:])),
}
"""What is done to the real video to have a later rendering that disagrees."""
