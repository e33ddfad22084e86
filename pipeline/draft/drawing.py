"""The draft engine's "model": a portrait whose head sways a little and whose mouth follows the audio.

Pure: pictures and loudness in, pictures out; the same input gives the same pixels.  It is a drawing that is
easy to check, not a likeness of the real model: the pose of every frame can be read back (``read_stamp``),
the mouth is a function of the frame's own audio alone, and a chain that is handed on wrongly jumps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.draft.face import Face
from pipeline.draft.stamp import LEVELS, Stamp, read_stamp, write_stamp
from pipeline.optical_flow import Flow, flow_between, luma, reach, warped
from pipeline.timeline import SAMPLES_PER_FRAME

__all__ = ["Puppet", "Stamp", "Voice", "Window", "draw_window", "loudness", "read_stamp"]

Frame = NDArray[np.uint8]
Floats = NDArray[np.float32]

SWAY = (0.045, 0.028, 2.8)
"""How far the head goes at most: right and down as shares of the face's height, and degrees."""
STIFFNESS = 0.15
"""Of the spring that pulls the head to its next resting place, per frame; critically damped."""
REST_FRAMES = 22
"""Every so many frames the head chooses another resting place."""
EASE_FRAMES = 8
"""A chain's mouth is closed at its first frame and free after this many."""
BLEND_FRAMES = 12
"""Over so many frames what the motion frames show turns into a changed start image."""
STILL = 0.5
"""Pixels that the pictures are apart at most if nothing has to move for that."""
FULL_RMS = 0.2
"""Speech this loud (of full scale) opens the mouth wholly."""
SILENCE_RMS = 0.002
JAW = 0.15
"""Height of the wholly open mouth, as a share of the face's height."""
INSIDE, TONGUE, TEETH = (38, 14, 16), (112, 48, 48), (214, 204, 192)

cv2.setNumThreads(1)  # several engines share a machine


def loudness(samples: Floats) -> Floats:
    """Opening of the mouth, 0..1, for each frame of a 16 kHz mono track (-1..1).

    From the RMS of exactly the frame's 640 samples, compressed by the power 0.7; silence is 0.  A last,
    shorter frame is filled up with silence.
    """
    frames = -(-len(samples) // SAMPLES_PER_FRAME)
    padded = np.zeros(frames * SAMPLES_PER_FRAME, dtype=np.float32)
    padded[: len(samples)] = samples
    rms = np.sqrt(np.mean(padded.reshape(frames, SAMPLES_PER_FRAME) ** 2, axis=1))
    level = np.clip((rms - SILENCE_RMS) / (FULL_RMS - SILENCE_RMS), 0.0, 1.0) ** 0.7
    return np.asarray(level, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Voice:
    """Who speaks and how loud: ``openings`` per frame of the window (0..1), silence beyond their end."""

    face: Face
    openings: Floats


class Puppet:
    """A portrait that can be posed; prepares the maps once, then draws a frame in a few milliseconds."""

    def __init__(self, portrait: Frame, faces: Sequence[Face]) -> None:
        self._portrait = np.ascontiguousarray(portrait)
        self._mouths = [_Mouth(self._portrait, face) for face in faces]
        self.reach = faces[0].height
        """Face height in pixels, the measure of the sway."""
        height, width = portrait.shape[:2]
        rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
        mask, turn_x, turn_y = (np.zeros((height, width), np.float32) for _ in range(3))
        for face in faces:
            distance = np.hypot(
                (columns - face.x) / (0.7 * face.height),
                (rows - face.y + 0.08 * face.height) / (0.9 * face.height),
            )
            part = _smooth((1.5 - distance) / 0.75)
            mask = np.maximum(mask, part)
            turn_x += part * (face.y + 0.7 * face.height - rows)  # pivot: the neck
            turn_y += part * (columns - face.x)
        filled_rows, filled_columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = np.s_[filled_rows[0] : filled_rows[-1] + 1, filled_columns[0] : filled_columns[-1] + 1]
        self._box = box
        self._columns, self._rows = columns[box].copy(), rows[box].copy()
        self._mask, self._turn_x, self._turn_y = mask[box].copy(), turn_x[box].copy(), turn_y[box].copy()

    def draw(self, pose: Stamp, openings: Sequence[float]) -> Frame:
        """The portrait with the head in a pose and one mouth per face opened; without a stamp."""
        face = self._portrait.copy()
        for mouth, opening in zip(self._mouths, openings, strict=True):
            mouth.open(face, round(opening * LEVELS))
        if not (pose.dx or pose.dy or pose.angle):
            return face
        angle = np.float32(math.radians(pose.angle))
        map_x = self._columns - np.float32(pose.dx) * self._mask - angle * self._turn_x
        map_y = self._rows - np.float32(pose.dy) * self._mask - angle * self._turn_y
        frame = face.copy()
        frame[self._box] = cv2.remap(face, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        return frame


class _Mouth:
    """One mouth of the portrait: its patch at every degree of opening, made when first needed."""

    def __init__(self, portrait: Frame, face: Face) -> None:
        self._face = face
        size = face.height
        height, width = portrait.shape[:2]
        left, right = (int(np.clip(round(face.mouth_x + side * 0.45 * size), 0, width)) for side in (-1, 1))
        top = int(np.clip(round(face.mouth_y - 0.12 * size), 0, height))
        bottom = int(np.clip(round(face.mouth_y + 0.55 * size), 0, height))
        self._box = np.s_[top:bottom, left:right]
        self._patch = portrait[self._box].copy()
        rows, columns = np.mgrid[top:bottom, left:right].astype(np.float32)
        self._x, self._y = (columns - face.mouth_x) / size, (rows - face.mouth_y) / size
        self._light = float(np.clip(self._patch.mean() / 130, 0.4, 1.0)) if self._patch.size else 1.0
        self._drawn: dict[int, Frame] = {}

    def open(self, frame: Frame, level: int) -> None:
        """Draw the mouth into a picture in the reference pose; level 0 leaves it as it is."""
        if level and self._patch.size:
            if level not in self._drawn:
                self._drawn[level] = self._draw(level / LEVELS)
            frame[self._box] = self._drawn[level]

    def _draw(self, opening: float) -> Frame:
        x, y = self._x, self._y  # in face heights from the closed lips
        lips = self._face.lips / self._face.height * (0.75 + 0.25 * opening)
        drop, lift = 0.85 * JAW * opening, 0.15 * JAW * opening
        lens = np.clip(1 - (x / lips) ** 2, 0, 1)
        # The jaw takes the chin with it: wider below than at the lips, gone below the chin.
        below = np.clip(y / 0.3, 0, 1)
        wide = np.clip(1 - (x / (lips + 0.24 * below)) ** 2, 0, 1) * _smooth((0.55 - y) / 0.3)
        lower = drop * lens
        pulled = np.where(y > lower, drop * wide, 0) - np.where(
            y < 0, lift * lens * np.clip(1 + y / 0.1, 0, 1), 0
        )
        size = np.float32(self._face.height)
        rows, columns = np.mgrid[0 : y.shape[0], 0 : y.shape[1]].astype(np.float32)
        moved = cv2.remap(
            self._patch,
            columns,
            (rows - pulled * size).astype(np.float32),
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        ).astype(np.float32)
        upper = -lift * lens
        inside = np.clip(np.minimum(y - upper, lower - y) * size + 0.5, 0, 1) * (lens > 0)
        depth = np.clip((y - upper) / np.maximum(lower - upper, 1e-4), 0, 1)[..., None]
        colour = np.array(INSIDE, np.float32) + _smooth((depth - 0.62) / 0.4) * (
            np.array(TONGUE, np.float32) - INSIDE
        )
        if not self._face.speaking:
            width = _smooth((0.8 - np.abs(x) / lips) / 0.25)[..., None]
            teeth = _smooth((0.32 - depth) / 0.14) * width * min(1.0, 2.5 * opening) * 0.85
            colour = colour + teeth * (np.array(TEETH, np.float32) - colour)
        colour = colour * self._light
        mixed = moved + inside[..., None] * (colour - moved)
        return np.asarray(np.clip(mixed + 0.5, 0, 255), dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class Window:
    """What one run of the "model" shall draw: ``length`` frames.

    ``motion`` are the last frames of the window before (uint8 [M, H, W, 3]), or None at the start of a chain.
    """

    puppet: Puppet
    voices: tuple[Voice, ...]
    length: int
    seed: int
    motion: NDArray[np.uint8] | None = None
    drift: float = 0.0
    """How much warmer the frames get one by one, in levels of 255, starting from the colours of ``motion``:
    what a window is off is handed on by its frames, as with the real model."""


def draw_window(window: Window) -> Iterator[Frame]:
    """Draw a window's frames in order, each stamped.

    The first frame of a chain is the portrait itself.  After motion frames, these come first, bit for bit,
    and the head goes on from the pose and speed stamped into the last one; without a readable stamp it
    falls back to the reference pose.

    Where the picture is another one than theirs, as with a source video, the head moves to its place: a
    window of the real model continues its motion frames too (docs/seams.md), it doesn't show two faces.
    """
    index, state, leftover, warmth = 0, Stamp(), None, 0.0
    if window.motion is not None:
        for frame in window.motion[: window.length]:
            yield frame.copy()
            index += 1
        state, leftover, warmth = _taken_over(window, window.motion[-1], index)
    for position in range(index, window.length):
        if position or window.motion is not None:
            state = _next_state(state, window.seed, window.puppet.reach)
        openings = _openings(window, position, state.frame)
        state = replace(state, opening=max(openings)).rounded()
        frame = window.puppet.draw(state, openings)
        if window.drift:
            frame = _warmer(frame, warmth + window.drift * (position - max(index - 1, 0)), state.frame)
        share = 1 - (position - index + 1) / BLEND_FRAMES
        if leftover is not None and share > 0:
            frame = leftover.added(frame, _ease(share))
        write_stamp(frame, state)
        yield frame


@dataclass(frozen=True, slots=True)
class _Leftover:
    """How a frame differs from what would be drawn of it now."""

    flow: Flow | None
    """From it to what would be drawn, where they are apart."""
    rest: Floats
    """What is left of the difference then, in levels."""

    @classmethod
    def of(cls, frame: Frame, again: Frame, warmth: Floats) -> _Leftover:
        """``warmth``: a difference of the channels that is no part of it."""
        flow = flow_between(luma(frame), luma(again))
        if reach(flow) <= STILL:
            return cls(None, frame.astype(np.float32) - again - warmth)
        return cls(flow, frame.astype(np.float32) - warped(again, flow) - warmth)

    def added(self, frame: Frame, share: float) -> Frame:
        """``share`` of it."""
        if self.flow is not None:
            frame = warped(frame, self.flow * np.float32(share))
        return np.asarray(np.clip(frame + np.rint(self.rest * share), 0, 255), np.uint8)


def _taken_over(window: Window, last: Frame, index: int) -> tuple[Stamp, _Leftover | None, float]:
    """State of the last motion frame, how that frame differs from what would be drawn of it now, and how
    much warmer it is."""
    stamp = read_stamp(last)
    if stamp is None:
        return Stamp(frame=max(index - 1, 0)), None, 0.0
    again = window.puppet.draw(stamp, _openings(window, index - 1, stamp.frame, stamp.opening))
    write_stamp(again, stamp)
    off = last.astype(np.float32) - again
    noise, warmth = 1, 0.0
    if window.drift:
        red, _, blue = off.mean(axis=(0, 1))
        noise, warmth = 3, float(red - blue) / 2
    shift = np.array([warmth, 0, -warmth], np.float32)
    if np.abs(off - shift).max() <= noise:
        return stamp, None, warmth
    return stamp, _Leftover.of(last, again, shift), warmth


def _warmer(frame: Frame, levels: float, seed: int) -> Frame:
    """More red and less blue: a stand-in for the colours of a long chain, which shift after a minute.

    With a noise of half a level, so that the mean says fractions of a level too.
    """
    noise = np.random.default_rng(seed).random((*frame.shape[:2], 1), np.float32) - np.float32(0.5)
    shift = np.array([levels, 0, -levels], np.float32)
    warm = np.rint(frame + shift + noise * (shift != 0))
    return np.asarray(np.clip(warm, 0, 255), np.uint8)


def _openings(window: Window, position: int, frame: int, known: float | None = None) -> list[float]:
    """Opening of each mouth in a frame of the window; ``known`` replaces that of the loudest."""
    eased = _ease(min(1.0, frame / EASE_FRAMES))
    openings = [
        eased * float(voice.openings[position]) if position < len(voice.openings) else 0.0
        for voice in window.voices
    ]
    if known is not None:
        openings[openings.index(max(openings))] = known
    return openings


def _next_state(state: Stamp, seed: int, reach: float) -> Stamp:
    """One frame further: a critically damped spring pulls the head to the resting place of the moment."""
    rest = np.random.default_rng([seed, (state.frame + 1) // REST_FRAMES]).uniform(-1, 1, 3)
    values = (state.dx, state.dy, state.angle)
    speeds = (state.vx, state.vy, state.spin)
    goals = (rest[0] * SWAY[0] * reach, rest[1] * SWAY[1] * reach, rest[2] * SWAY[2])
    new_speeds = [
        speed + STIFFNESS**2 * (float(goal) - value) - 2 * STIFFNESS * speed
        for value, speed, goal in zip(values, speeds, goals, strict=True)
    ]
    dx, dy, angle = (value + speed for value, speed in zip(values, new_speeds, strict=True))
    return Stamp(state.frame + 1, dx, dy, angle, *new_speeds)


def _ease(share: float) -> float:
    return share * share * (3 - 2 * share)


def _smooth(values: Floats) -> Floats:
    clipped = np.clip(values, 0, 1)
    return np.asarray(clipped * clipped * (3 - 2 * clipped), dtype=np.float32)
