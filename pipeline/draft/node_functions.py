"""What each node of the draft engine does.  The protocol around it is elsewhere, the drawing in ``drawing``.

Loaders hand on names; encoders hand on what the drawing needs.  Where ComfyUI's node fails at run time, for
inputs that its validation lets pass, these fail in the same words.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.draft import media
from pipeline.draft.drawing import Puppet, Voice, Window, draw_window, loudness
from pipeline.draft.execution import Context, Inputs, NodeError, Result
from pipeline.draft.face import Face, find_face
from pipeline.draft.folders import Folders, OutsideFolder

Frames = NDArray[np.uint8]
Handler = Callable[[Inputs, Context], Result]

LATENTS_OF_WINDOW = 21
"""Latent frames of a window of 81 frames, the unit of ``window_seconds``."""
PUPPETS_KEPT = 4


@dataclass(frozen=True, slots=True)
class Model:
    """A "model": the names it was made of, and the window to draw once WanInfiniteTalkToVideo has set one."""

    names: tuple[str, ...]
    window: Window | None = None
    audio_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Audio:
    """Sound: float [channels, samples] in -1..1."""

    waveform: NDArray[np.float32]
    rate: int


@dataclass(frozen=True, slots=True)
class Latent:
    """A "latent": only the size of what shall be drawn, and after the sampler the drawn frames."""

    width: int
    height: int
    length: int
    frames: Frames | None = None


@dataclass(frozen=True, slots=True)
class Video:
    """Frames with their rate and sound."""

    frames: Frames
    fps: float
    audio: Audio | None


@dataclass(slots=True)
class NodeFunctions:
    """The functions of all nodes, by class name in ``table``."""

    folders: Folders
    window_seconds: float = 0.0
    drift: float = 0.0
    table: dict[str, Handler] = field(init=False)
    _puppets: dict[bytes, tuple[Puppet, tuple[Face, ...]]] = field(default_factory=dict)
    _preview_tag: str = field(default_factory=lambda: secrets.token_hex(3))

    def __post_init__(self) -> None:
        self.table = {
            "UNETLoader": lambda inputs, _: Result((Model((inputs["unet_name"],)),)),
            "LoraLoaderModelOnly": lambda inputs, _: Result((_named(inputs["model"], inputs["lora_name"]),)),
            "ModelSamplingSD3": lambda inputs, _: Result((inputs["model"],)),
            "CLIPLoader": _name_of("clip_name"),
            "VAELoader": _name_of("vae_name"),
            "ModelPatchLoader": _name_of("name"),
            "AudioEncoderLoader": _name_of("audio_encoder_name"),
            "CLIPVisionLoader": _name_of("clip_name"),
            "CLIPTextEncode": _name_of("text"),
            "CLIPVisionEncode": _name_of("crop"),
            "ConditioningZeroOut": lambda _inputs, _: Result(("",)),
            "AudioEncoderEncode": lambda inputs, _: Result((_heard(inputs["audio"]),)),
            "LoadImage": self._load_image,
            "LoadImageMask": lambda inputs, _: Result(
                (media.load_mask(self.folders.find(inputs["image"]), inputs["channel"]),)
            ),
            "LoadAudio": lambda inputs, _: Result(
                (Audio(*media.load_audio(self.folders.find(inputs["audio"]))),)
            ),
            "TrimAudioDuration": lambda inputs, _: Result((_trimmed(**inputs),)),
            "WanInfiniteTalkToVideo": self._infinite_talk,
            "InfiniteTalkSpeech": _other_speech,
            "KSampler": self._sample,
            "VAEDecode": lambda inputs, _: Result((_decoded(inputs["samples"]),)),
            "VAEDecodeTiled": lambda inputs, _: Result((_decoded(inputs["samples"]),)),
            "ImageFromBatch": lambda inputs, _: Result((_part(**inputs),)),
            "ImageBatch": lambda inputs, _: Result((_joined(inputs["image1"], inputs["image2"]),)),
            "SaveImage": lambda inputs, context: self._save(
                inputs["images"], inputs["filename_prefix"], "output", context
            ),
            "PreviewImage": lambda inputs, context: self._save(
                inputs["images"], f"ComfyUI_temp_{self._preview_tag}", "temp", context
            ),
            "CreateVideo": lambda inputs, _: Result(
                (Video(inputs["images"], inputs["fps"], inputs.get("audio")),)
            ),
            "SaveVideo": self._save_video,
        }

    def _load_image(self, inputs: Inputs, _context: Context) -> Result:
        frames = media.load_pictures(self.folders.find(inputs["image"]))
        return Result((frames, np.zeros((len(frames), 64, 64), np.float32)))

    def _infinite_talk(self, inputs: Inputs, _context: Context) -> Result:
        mode = inputs.get("mode")
        if mode not in ("single_speaker", "two_speakers"):
            raise NodeError(
                "TypeError", "WanInfiniteTalkToVideo.execute() missing 1 required positional argument: 'mode'"
            )
        width, height, length = inputs["width"] // 8 * 8, inputs["height"] // 8 * 8, inputs["length"]
        count: int = inputs["motion_frame_count"]
        previous: Any = inputs.get("previous_frames")
        start: Any = inputs.get("start_image")
        if previous is not None and len(previous) < count:
            raise NodeError("ValueError", "Not enough previous frames provided.")
        speech, masks = _speakers(mode, inputs)
        if start is None and previous is None:
            missing = (
                "cannot access local variable 'concat_latent_image' where it is not associated with a value"
            )
            raise NodeError("UnboundLocalError", missing)
        if (length - 1) % 4:
            raise NodeError("einops.EinopsError", _einops_message(length))
        motion = None if previous is None else media.fit(previous[-count:], width, height)
        audio_start = 0 if previous is None else len(previous) - count
        picture = media.fit((previous if start is None else start[:1])[-1:], width, height)[0]
        puppet, faces = self.puppet(picture, masks)
        scale = abs(inputs["audio_scale"])
        voices = voices_of(faces, speech, audio_start, length, scale)
        window = Window(puppet, voices, length, 0, motion, self.drift)
        model = replace(inputs["model"], window=window, audio_scale=scale)
        latent = Latent(width, height, length)
        return Result(
            (model, inputs["positive"], inputs["negative"], latent, count if motion is not None else 0)
        )

    def puppet(self, picture: Frames, masks: list[NDArray[np.float32]]) -> tuple[Puppet, tuple[Face, ...]]:
        """The puppet of a start image; kept, because a chain's windows share it."""
        digest = hashlib.sha256(str(picture.shape).encode() + picture.tobytes())
        for mask in masks:
            digest.update(mask.tobytes())
        key = digest.digest()
        if key not in self._puppets:
            faces = tuple(_face_in(picture, mask) for mask in masks) or (find_face(picture),)
            while len(self._puppets) >= PUPPETS_KEPT:
                self._puppets.pop(next(iter(self._puppets)))
            self._puppets[key] = Puppet(picture, faces), faces
        return self._puppets[key]

    def _sample(self, inputs: Inputs, context: Context) -> Result:
        model, latent, steps = inputs["model"], inputs["latent_image"], inputs["steps"]
        if model.window is None:
            raise NodeError(
                "NotImplementedError", "the draft engine only draws windows of WanInfiniteTalkToVideo"
            )
        if inputs["cfg"] != 1.0:
            shape = f"[10, {latent.width * latent.height // 512}, 2, 40, 2]"
            raise NodeError(
                "RuntimeError", f"shape '{shape}' is invalid for the audio attention: cfg must be 1"
            )
        window = replace(model.window, seed=inputs["seed"])
        pace = Pace(self.window_seconds * (((window.length - 1) // 4) + 1) / LATENTS_OF_WINDOW, steps)
        frames = np.empty((window.length, latent.height, latent.width, 3), np.uint8)
        drawing, done = draw_window(window), 0
        for step in range(steps):
            if step == steps // 2:
                misbehave(context)
            until = window.length * (step + 1) // steps
            for frame in itertools.islice(drawing, until - done):
                frames[done] = frame
                done += 1
                context.check()
            pace.wait(step + 1, context)
            context.progress(step + 1, steps)
        return Result((replace(latent, frames=frames),))

    def _next_names(self, prefix: str, kind: str, width: int, height: int) -> tuple[Path, str, int, str]:
        try:
            return self.folders.next_names(prefix, self.folders.base / kind, width, height)
        except OutsideFolder as exc:
            reason = "**** ERROR: Saving image outside the output folder is not allowed."
            raise NodeError("Exception", f"{reason}\n {exc}") from exc

    def _save(self, images: Frames, prefix: str, kind: str, context: Context) -> Result:
        height, width = images.shape[1:3]
        folder, stem, counter, subfolder = self._next_names(prefix, kind, width, height)
        saved = []
        for number, image in enumerate(images):
            context.check()
            name = f"{stem.replace('%batch_num%', str(number))}_{counter + number:05}_.png"
            media.save_png(image, folder / name)
            saved.append({"filename": name, "subfolder": subfolder, "type": kind})
        return Result((images,), {"images": saved})

    def _save_video(self, inputs: Inputs, _context: Context) -> Result:
        video = inputs["video"]
        if inputs.get("format", "auto") not in ("auto", "mp4"):
            raise NodeError("ValueError", "the draft engine writes mp4 only")
        height, width = video.frames.shape[1:3]
        prefix = inputs["filename_prefix"]
        folder, stem, counter, subfolder = self._next_names(prefix, "output", width, height)
        name = f"{stem}_{counter:05}_.mp4"
        sound = None if video.audio is None else (video.audio.waveform, video.audio.rate)
        media.save_video(video.frames, video.fps, sound, folder / name)
        saved = {"filename": name, "subfolder": subfolder, "type": "output"}
        return Result((video,), {"images": [saved], "animated": [True]})


@dataclass(slots=True)
class Pace:
    """Spreads a given time evenly over the sampler's steps; the time spent drawing counts."""

    seconds: float
    steps: int
    _start: float = field(default_factory=time.monotonic)

    def wait(self, step: int, context: Context) -> None:
        """Wait until ``step`` steps may be over, or somebody interrupts."""
        context.wait(self._start + self.seconds * step / self.steps - time.monotonic())


def misbehave(context: Context) -> None:
    """Do what ``--draft-fault`` asked of this prompt."""
    if "crash" in context.faults:
        os.kill(os.getpid(), signal.SIGKILL)
    if "silent" in context.faults:
        context.mute()
    if "oom" in context.faults:
        raise NodeError(
            "torch.OutOfMemoryError",
            "Allocation on device 0 would exceed allowed memory. (out of memory)",
            "This error means you ran out of memory on your GPU.\n\n"
            "TIPS: If the workflow worked before you might have accidentally set the batch_size to a large "
            "number.",
        )
    if "leak" in context.faults:
        raise NodeError("RuntimeError", "the draft engine leaks memory, as --draft-fault leak told it to")
    if "broken" in context.faults:
        raise NodeError("torch.AcceleratorError", "CUDA error: an illegal memory access was encountered")
    while "hang" in context.faults:
        threading.Event().wait()


def _name_of(key: str) -> Handler:
    return lambda inputs, _context: Result((inputs[key],))


def _named(model: Model, name: str) -> Model:
    return replace(model, names=(*model.names, name))


def _heard(audio: Audio) -> NDArray[np.float32]:
    return loudness(media.speech_of(audio.waveform, audio.rate))


def _trimmed(audio: Audio, start_index: float, duration: float) -> Audio:
    total = audio.waveform.shape[1]
    first = round(start_index * audio.rate) + (total if start_index < 0 else 0)
    first = min(max(first, 0), total)
    last = min(max(first + round(duration * audio.rate), 0), total)
    if total and first >= last:
        raise NodeError(
            "ValueError", "AudioTrim: Start time must be less than end time and be within the audio length."
        )
    return replace(audio, waveform=audio.waveform[:, first:last])


def _decoded(latent: Latent) -> Frames:
    if latent.frames is None:
        return np.full((latent.length, latent.height, latent.width, 3), 127, np.uint8)
    return latent.frames


def _part(image: Frames, batch_index: int, length: int) -> Frames:
    first = batch_index + (len(image) if batch_index < 0 else 0)
    first = max(0, min(len(image) - 1, first))
    return image[first : first + length]


def _joined(image1: Frames, image2: Frames) -> Frames:
    return np.concatenate([image1, media.fit(image2, image1.shape[2], image1.shape[1])])


def _speakers(mode: str, inputs: Inputs) -> tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]]:
    """Openings of each speaker's mouth, and the masks of two, who speak one after the other in ComfyUI."""
    first = inputs["audio_encoder_output_1"]
    if mode == "single_speaker":
        return [first], []
    second = inputs.get("mode.audio_encoder_output_2")
    masks = [mask for key in ("mask_1", "mask_2") if (mask := inputs.get(f"mode.{key}")) is not None]
    if second is not None and len(masks) < 2:
        raise NodeError("ValueError", "Masks must be provided if two audio encoder outputs are used.")
    if second is None and len(masks) == 2:
        raise NodeError("ValueError", "Second audio encoder output must be provided if two masks are used.")
    if second is None:
        return [first], []  # ComfyUI takes it for one speaker, without a word
    return [first, np.concatenate([np.zeros(len(first), np.float32), second])], masks


def voices_of(
    faces: Sequence[Face], speech: Sequence[NDArray[np.float32]], first: int, length: int, scale: float
) -> tuple[Voice, ...]:
    """Each face with its openings in the frames [first, first + length)."""
    heard = [np.clip(track[first : first + length] * scale, 0, 1) for track in speech]
    return tuple(Voice(face, part) for face, part in zip(faces, heard, strict=True))


def _other_speech(inputs: Inputs, _context: Context) -> Result:
    """Our own node: tracks side by side, beginning ``context`` frames before the window."""
    model, length, context = inputs["model"], inputs["latent"].length, inputs["context"]
    given = [inputs["audio_encoder_output_1"], inputs.get("audio_encoder_output_2")]
    speech = [track for track in given if track is not None]
    for number, track in enumerate(speech, start=1):
        if len(track) < context + length:
            raise NodeError(
                "ValueError", f"Speech {number} has {len(track)} frames, {context + length} are needed."
            )
    faces = [voice.face for voice in model.window.voices]
    voices = voices_of(faces, speech, context, length, model.audio_scale)
    return Result((replace(model, window=replace(model.window, voices=voices)),))


def _face_in(picture: Frames, mask: NDArray[np.float32]) -> Face:
    """The face in the masked part of a picture."""
    height, width = picture.shape[:2]
    ys, xs = np.nonzero(mask[0] > 0)
    if not len(xs):
        return find_face(picture)
    scale_x, scale_y = width / mask.shape[2], height / mask.shape[1]
    left, right = int(xs.min() * scale_x), max(int((xs.max() + 1) * scale_x), 1)
    top, bottom = int(ys.min() * scale_y), max(int((ys.max() + 1) * scale_y), 1)
    face = find_face(np.ascontiguousarray(picture[top:bottom, left:right]))
    return replace(
        face, x=face.x + left, y=face.y + top, mouth_x=face.mouth_x + left, mouth_y=face.mouth_y + top
    )


def _einops_message(length: int) -> str:
    return (
        'Error while processing rearrange-reduction pattern "b (n_t n) w s c -> b n_t n w s c".\n'
        f" Input tensor shape: torch.Size([1, {length - 1}, 5, 12, 768]). Additional info: {{'n': 4}}.\n"
        f" Shape mismatch, can't divide axis of length {length - 1} in chunks of 4"
    )
