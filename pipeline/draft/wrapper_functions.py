"""What the wrapper family's nodes do in the draft engine: all windows of a segment in one sampler.

Frames and samples are counted with the arithmetic of ComfyUI-WanVideoWrapper's nodes (docs/workflows.md,
"Frames and samples"), read in its source; the pictures are ``drawing``'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.draft import media
from pipeline.draft.drawing import Window, draw_window, loudness
from pipeline.draft.execution import Context, Inputs, NodeError, Result
from pipeline.draft.node_functions import Audio, Frames, Handler, NodeFunctions, Pace, misbehave, voices_of
from pipeline.timeline import SPEECH_RATE

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Speeches:
    """What MultiTalkWav2VecEmbeds gives: openings of each mouth per frame, and where the speakers are."""

    openings: list[Floats]
    masks: list[Floats]
    frames: int


@dataclass(frozen=True, slots=True)
class Loop:
    """What WanVideoImageToVideoMultiTalk collects: a fitted picture for each window, and window lengths."""

    pictures: Frames
    window: int
    motion: int


def wrapper_table(functions: NodeFunctions) -> dict[str, Handler]:
    """The functions of the wrapper's nodes, and of the core nodes that only its graphs use."""
    names = {
        "WanVideoBlockSwap": 1,
        "WanVideoLoraSelect": 1,
        "WanVideoModelLoader": 1,
        "WanVideoVAELoader": 1,
        "WanVideoTextEncodeCached": 3,
        "WanVideoClipVisionEncode": 1,
        "Wav2VecModelLoader": 1,
        "MultiTalkModelLoader": 1,
    }
    return {
        **{name: _nothing(outputs) for name, outputs in names.items()},
        "MultiTalkWav2VecEmbeds": _embeds,
        "WanVideoImageToVideoMultiTalk": _collect,
        "WanVideoSampler": lambda inputs, context: _sample(functions, inputs, context),
        "WanVideoPassImagesFromSamples": lambda inputs, _: Result((inputs["samples"], "")),
        "ImageScale": _scale,
        "ImageToMask": _mask,
    }


def _nothing(outputs: int) -> Handler:
    return lambda _inputs, _context: Result(("",) * outputs)


def _embeds(inputs: Inputs, _context: Context) -> Result:
    """The node's own count of frames, in floats, by the first speaker's track."""
    tracks: list[Audio] = [inputs[key] for key in ("audio_1", "audio_2") if key in inputs]
    first = media.speech_of(tracks[0].waveform[:1], tracks[0].rate)
    samples = min(len(first), int(inputs["num_frames"] / 25.0 * SPEECH_RATE))
    frames = int(samples / SPEECH_RATE * 25.0)
    openings = [
        loudness(media.speech_of(track.waveform[:1], track.rate))[:frames] * inputs["audio_scale"]
        for track in tracks
    ]
    masks: Floats | None = inputs.get("ref_target_masks")
    if len(tracks) > 1 and masks is None:
        raise NodeError("AttributeError", "x_ref_attn_map is None: two speakers need ref_target_masks")
    people = [] if masks is None else [masks[place : place + 1] for place in range(len(tracks))]
    return Result((Speeches(openings, people, frames), tracks[0], frames))


def _collect(inputs: Inputs, _context: Context) -> Result:
    pictures = media.fit(inputs["start_image"], inputs["width"], inputs["height"])
    return Result((Loop(pictures, inputs["frame_window_size"], inputs["motion_frame"]), ""))


def _sample(functions: NodeFunctions, inputs: Inputs, context: Context) -> Result:
    """Window after window until the speech is covered; each later one continues the one before."""
    loop: Loop = inputs["image_embeds"]
    speech: Speeches = inputs["multitalk_embeds"]
    steps: int = inputs["steps"]
    stride = loop.window - loop.motion
    windows = 1 + max(0, -(-(speech.frames - loop.window) // stride))
    # The node's own estimate, one window too many as soon as there are two.
    estimate = steps * (1 if speech.frames <= loop.window else speech.frames // stride + 1)
    pace = Pace(functions.window_seconds * windows, steps * windows)
    made: list[Frames] = []
    for number in range(windows):
        picture = loop.pictures[min(number, len(loop.pictures) - 1)]
        puppet, faces = functions.puppet(picture, speech.masks)
        voices = voices_of(faces, speech.openings, number * stride, loop.window, 1.0)
        motion = made[-1][-loop.motion :] if made else None
        window = Window(puppet, voices, loop.window, inputs["seed"], motion, functions.drift)
        drawn = np.stack(list(_watched(window, context)))
        made.append(drawn if motion is None else drawn[loop.motion :])
        for step in range(number * steps, (number + 1) * steps):
            if step == steps * windows // 2:
                misbehave(context)
            pace.wait(step + 1, context)
            context.progress(step + 1, estimate)
    frames = np.concatenate(made)
    return Result((frames, frames))


def _watched(window: Window, context: Context) -> Iterator[Frames]:
    for frame in draw_window(window):
        context.check()
        yield frame


def _scale(inputs: Inputs, _context: Context) -> Result:
    """To exactly that size; the draft engine has no other ``crop``."""
    size = inputs["width"], inputs["height"]
    return Result(
        (np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in inputs["image"]]),)
    )


def _mask(inputs: Inputs, _context: Context) -> Result:
    channel = ("red", "green", "blue").index(inputs["channel"])
    return Result((inputs["image"][..., channel].astype(np.float32) / np.float32(255),))
