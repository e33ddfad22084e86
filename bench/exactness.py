"""``python -m bench.exactness [--minutes 60] [--json]``: picture and sound of a long result, to the sample.

A short part with two flashes is joined over and over by copy, as segments are, under a track with a click at
each flash: encoded (wav), copied (m4a, mp3).  Every frame of the result is decoded and its time checked; at
every flash the click is looked for in the decoded sound.  The encoder runs far faster than time passes.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
import time
import wave
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from pipeline import ffmpeg
from pipeline.frame_writer import FrameWriter
from pipeline.frames import check_video
from pipeline.sound import make_track
from pipeline.timeline import FPS

SIDE, PART, RATE = 64, 250, 48_000
FLASHES = (3, 245)
CODECS = {"wav": "pcm_s16le", "m4a": "aac", "mp3": "libmp3lame"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--formats", nargs="+", choices=CODECS, default=list(CODECS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    parts = max(round(options.minutes * 60 * FPS / PART), 1)
    with tempfile.TemporaryDirectory(prefix="bench-exactness-") as name:
        folder = Path(name)
        _part(folder / "part.mp4")
        _clicks(folder / "s.wav", parts)
        rows = [_row(folder, suffix, parts) for suffix in options.formats]
    if options.json:
        print(json.dumps({"minutes": options.minutes, "rows": rows}))
        return
    print("sound   in the mp4   frames   flashes   first offset   last offset   largest offset   sound takes")
    for row in rows:
        print(
            f"{row['format']:<7} {row['track']:<10} {row['frames']:>8}  {row['flashes']:>8}"
            f"   {row['first_ms']:>9.3f} ms   {row['last_ms']:>8.3f} ms   {row['largest_ms']:>11.3f} ms"
            f"   {row['sound_seconds']:>9.1f} s"
        )


def _part(path: Path) -> None:
    with FrameWriter(path, SIDE, SIDE, ffmpeg.FINAL) as writer:
        for t in range(PART):
            level = 255 if t in FLASHES else 60 + t % 50
            writer.write(np.full((SIDE, SIDE, 3), level, np.uint8))


def _clicks(path: Path, parts: int) -> None:
    """2 ms of 3 kHz at the start of each flash."""
    sound = np.zeros(PART * RATE // FPS)
    click = 0.8 * _click(RATE)
    for flash in FLASHES:
        start = flash * RATE // FPS
        sound[start : start + len(click)] = click
    levels = np.rint(sound * 32_000).astype("<i2").tobytes()
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        for _ in range(parts):
            file.writeframesraw(levels)


def _click(rate: int) -> npt.NDArray[np.float64]:
    return np.sin(np.arange(rate // 500) * 2 * math.pi * 3000 / rate)


def _row(folder: Path, suffix: str, parts: int) -> dict[str, Any]:
    sound, target, total = folder / f"s.{suffix}", folder / "talk.mp4", parts * PART
    if suffix != "wav":
        command = [ffmpeg.binary(), "-v", "error", "-y", "-i", str(folder / "s.wav")]
        subprocess.run([*command, "-c:a", CODECS[suffix], str(sound)], check=True)
    began = time.monotonic()
    track = make_track(sound, total, folder / "track.mp4")
    seconds = time.monotonic() - began
    ffmpeg.join([(folder / "part.mp4", PART)] * parts, track, target, folder)
    check_video(target, total)
    flashes = _flashes(target)
    if flashes != [part * PART + flash for part in range(parts) for flash in FLASHES]:
        raise SystemExit("a picture is not where it should be")
    late = _offsets(target, flashes)
    return {
        "format": suffix,
        "track": "copied" if track[0] == sound else "encoded",
        "frames": total,
        "flashes": len(flashes),
        "first_ms": round(late[0], 4),
        "last_ms": round(late[-1], 4),
        "largest_ms": round(max(map(abs, late)), 4),
        "sound_seconds": round(seconds, 1),
    }


def _flashes(path: Path) -> list[int]:
    """Frames that are white."""
    with av.open(str(path)) as container:
        frames = enumerate(container.decode(video=0))
        return [t for t, frame in frames if np.asarray(frame.planes[0])[SIDE // 2] > 200]


def _offsets(path: Path, flashes: list[int]) -> list[float]:
    """Milliseconds by which each click is heard after its frame is shown."""
    late: list[float] = []
    with av.open(str(path)) as container:
        position, kept = 0, np.zeros(0)
        for frame in container.decode(audio=0):
            assert isinstance(frame, av.AudioFrame)
            if not position and frame.pts != 0:
                raise SystemExit(f"the sound starts at {frame.time} s")
            rate, margin = frame.sample_rate, frame.sample_rate // 20
            position += frame.samples
            kept = np.concatenate([kept, frame.to_ndarray()[0]])[-8 * margin :]
            while len(late) < len(flashes) and position > flashes[len(late)] * rate // FPS + 2 * margin:
                start = flashes[len(late)] * rate // FPS - (position - len(kept))
                near = kept[max(start - margin, 0) : start + margin]
                found = max(start - margin, 0) + int(np.argmax(np.correlate(near, _click(rate), "valid")))
                late.append((found - start) / rate * 1000)
    if len(late) != len(flashes):
        raise SystemExit("the sound ends before the picture")
    return late


if __name__ == "__main__":
    main()
