"""Pictures, sound and video of the draft engine: files to arrays and back.  Knows no nodes."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

from pipeline.timeline import SPEECH_RATE

Frames = NDArray[np.uint8]
Samples = NDArray[np.float32]

AUDIO_BLOCK = 1024


def load_pictures(path: Path) -> Frames:
    """All pages of a picture, or all frames of a video: uint8 [N, H, W, 3] RGB.

    Pages of another size than the first are left out, as in ComfyUI.

    Raises:
        ValueError: the file holds neither.
    """
    try:
        with Image.open(path) as image:
            pages = [
                np.asarray(ImageOps.exif_transpose(page).convert("RGB"))
                for page in ImageSequence.Iterator(image)
            ]
    except UnidentifiedImageError:
        pages = _video_frames(path)
    return np.stack([page for page in pages if page.shape == pages[0].shape])


def load_mask(path: Path, channel: str) -> Samples:
    """One channel (alpha, red, green, blue) of a picture: float [N, H, W]; alpha is 1 where transparent."""
    if channel != "alpha":
        frames = load_pictures(path)
        return frames[..., ("red", "green", "blue").index(channel)].astype(np.float32) / np.float32(255)
    with Image.open(path) as image:
        if "A" not in image.getbands():
            return np.zeros((1, 64, 64), np.float32)
        return np.float32(1) - np.asarray(image.getchannel("A"), dtype=np.float32)[None] / np.float32(255)


def load_audio(path: Path) -> tuple[Samples, int]:
    """The first audio stream of a file: float [channels, samples] in -1..1, and its rate.

    Raises:
        ValueError: there is no sound in it.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise ValueError("No audio stream found in the file.")
            stream = container.streams.audio[0]
            rate = stream.codec_context.sample_rate
            resampler = av.AudioResampler(format="fltp", layout=stream.codec_context.layout, rate=rate)
            blocks = [
                block.to_ndarray()
                for frame in container.decode(stream)
                for block in resampler.resample(frame)
            ]
    except av.FFmpegError as exc:
        raise ValueError(str(exc)) from exc
    if not blocks:
        raise ValueError("No audio frames decoded.")
    return np.concatenate(blocks, axis=1).astype(np.float32), rate


def speech_of(waveform: Samples, rate: int) -> Samples:
    """Mono at 16 kHz, as the speech encoder hears it."""
    mono = np.ascontiguousarray(waveform.mean(axis=0, dtype=np.float32))
    if rate == SPEECH_RATE:
        return mono
    resampler = av.AudioResampler(format="flt", layout="mono", rate=SPEECH_RATE)
    frame = av.AudioFrame.from_ndarray(mono[None], format="flt", layout="mono")
    frame.sample_rate = rate
    blocks = [block.to_ndarray()[0] for part in (frame, None) for block in resampler.resample(part)]
    samples = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    return samples[: round(len(mono) * SPEECH_RATE / rate)]


def fit(frames: Frames, width: int, height: int) -> Frames:
    """Scale to cover width x height and cut the overhang evenly from both sides, as ComfyUI's nodes do.

    Shrinking averages (ComfyUI's bilinear filter does not), or fine patterns would flicker in a drawing.
    """
    old_height, old_width = frames.shape[1:3]
    if (old_width, old_height) == (width, height):
        return frames
    left = top = 0
    if old_width * height > width * old_height:
        left = round((old_width - old_height * width / height) / 2)
    else:
        top = round((old_height - old_width * height / width) / 2)
    kept = frames[:, top : old_height - top, left : old_width - left]
    way = cv2.INTER_AREA if kept.shape[2] > width else cv2.INTER_LINEAR
    return np.stack([cv2.resize(frame, (width, height), interpolation=way) for frame in kept]).astype(
        np.uint8
    )


def save_png(frame: Frames, path: Path) -> None:
    """Write one picture, hardly compressed: it is read once."""
    done, data = cv2.imencode(
        ".png", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 1]
    )
    if not done:
        raise OSError(f"can't encode {path.name}")
    path.write_bytes(data.tobytes())


def save_video(frames: Frames, fps: float, audio: tuple[Samples, int] | None, path: Path) -> None:
    """Write an mp4 (h264, yuv420p) with the sound cut to the frames, if there is any."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=Fraction(round(fps * 1000), 1000))
        video.height, video.width = (side - side % 2 for side in frames.shape[1:3])
        video.pix_fmt = "yuv420p"
        video.codec_context.thread_count = 1
        sound = None
        if audio is not None:
            sound = container.add_stream(
                "aac", rate=audio[1], layout="stereo" if len(audio[0]) > 1 else "mono"
            )
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(frame[: video.height, : video.width]), "rgb24"
            )
            container.mux(video.encode(picture))
        container.mux(video.encode())
        if audio is not None and sound is not None:
            waveform, rate = audio
            waveform = np.ascontiguousarray(waveform[:2, : round(len(frames) / fps * rate)])
            layout = "stereo" if len(waveform) > 1 else "mono"
            for start in range(0, waveform.shape[1], AUDIO_BLOCK):
                part = np.ascontiguousarray(waveform[:, start : start + AUDIO_BLOCK])
                block = av.AudioFrame.from_ndarray(part, format="fltp", layout=layout)
                block.sample_rate, block.pts = rate, start
                container.mux(sound.encode(block))
            container.mux(sound.encode())


def _video_frames(path: Path) -> list[Frames]:
    try:
        with av.open(str(path)) as container:
            frames = [
                frame.to_ndarray(format="rgb24").astype(np.uint8) for frame in container.decode(video=0)
            ]
    except (av.FFmpegError, IndexError) as exc:
        raise ValueError(f"{path.name} is neither a picture nor a video") from exc
    if not frames:
        raise ValueError(f"{path.name} holds no pictures")
    return frames
