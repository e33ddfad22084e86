"""A look at a stranger's file in a process of its own, with limits on time and memory.

Decoders are large and old; what breaks or bloats one here takes nothing else along.  Which files are taken
at all (formats, streams) is decided by the modules that read them later; here only whether it is safe to.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import av
from PIL import Image

from pipeline.errors import InvalidRequest
from pipeline.ffmpeg import INPUT_FORMATS
from pipeline.portrait import FORMATS

PICTURES = ("image", "mask_1", "mask_2")
VIDEOS = ("video",)


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """What a client's file may be."""

    max_pixels: int
    """Of a picture, or of one frame."""
    max_seconds: float
    """Of a recording."""
    check_seconds: float = 60.0
    """How long the look may take."""
    check_bytes: int = 2 << 30
    """Address space of the process that looks; the decoders' libraries alone take half a gigabyte."""


def check_media(field: str, path: Path, limits: MediaLimits) -> None:
    """Raises ``InvalidRequest`` naming ``field`` for a file that can't be read safely, or is too large."""
    command = [sys.executable, "-m", "pipeline.media_check", field, str(path), json.dumps(asdict(limits))]
    try:
        done = subprocess.run(
            command,
            cwd=Path(__file__).resolve().parent.parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=limits.check_seconds,
            env={"PATH": ""},
        )
    except subprocess.TimeoutExpired:
        raise InvalidRequest(field, f"it could not be read within {limits.check_seconds:g} s") from None
    answer = done.stdout.decode(errors="replace").strip()
    if done.returncode == 1 and answer:
        raise InvalidRequest(field, answer)
    if done.returncode:
        raise InvalidRequest(
            field, f"reading it needs more memory or time than it may (exit {done.returncode})"
        )


def look(field: str, path: Path, limits: MediaLimits) -> None:
    """Open the file as its field asks.  Raises ``ValueError`` with a reason for people."""
    if field in PICTURES:
        _picture(path, limits)
    else:
        _recording(path, limits, video=field in VIDEOS)


def _picture(path: Path, limits: MediaLimits) -> None:
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    Image.MAX_IMAGE_PIXELS = limits.max_pixels
    try:
        with Image.open(path, formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > limits.max_pixels:
                raise ValueError(
                    f"{width}x{height} pixels are more than the {limits.max_pixels} that are taken"
                )
            picture.load()
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ValueError(f"it has more than the {limits.max_pixels} pixels that are taken") from None
    except (OSError, SyntaxError) as error:
        raise ValueError(f"no picture that can be read: {error}") from None


def _recording(path: Path, limits: MediaLimits, *, video: bool) -> None:
    options = {"protocol_whitelist": "file", "format_whitelist": INPUT_FORMATS}
    try:
        with av.open(str(path.resolve()), options=options) as container:
            stream = next((s for s in container.streams if s.type == ("video" if video else "audio")), None)
            if stream is None:
                raise ValueError(f"there is no {'picture' if video else 'sound'} in it")
            if isinstance(stream, av.VideoStream) and stream.width * stream.height > limits.max_pixels:
                raise ValueError(f"its frames of {stream.width}x{stream.height} are larger than is taken")
            # Headers lie about durations: packets are counted, without decoding them.
            last = 0.0
            for packet in container.demux(stream):
                if packet.pts is not None and packet.time_base is not None:
                    last = max(last, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if last - float((stream.start_time or 0) * (stream.time_base or 0)) > limits.max_seconds:
                    raise ValueError(f"longer than the {limits.max_seconds:g} s that are taken")
            container.seek(0)
            if next(container.decode(stream), None) is None:
                raise ValueError("nothing in it can be decoded")
    except av.FFmpegError as error:
        raise ValueError(f"no recording that can be read: {error.strerror or error}") from None


def main(arguments: list[str]) -> int:
    """The process: exit code 0, or 1 with the reason on standard output."""
    field, path, text = arguments
    limits = MediaLimits(**json.loads(text))
    resource.setrlimit(resource.RLIMIT_AS, (limits.check_bytes, limits.check_bytes))
    seconds = int(limits.check_seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    try:
        look(field, Path(path), limits)
    except ValueError as error:
        sys.stdout.write(str(error))
        return 1
    except MemoryError:
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
