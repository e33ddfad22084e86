"""``python -m bench.hour [--minutes 60] [--json]``: one long job through the command line, watched.

Real processes, tiny pictures, no window time: it shows that length costs no exactness and no memory.  The
result is decoded to its end and counted; the resident memory of the driver, of each renderer and of each
engine is read from ``/proc`` all the while.  Not a speed of anything.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import wave
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.frames import check_video
from pipeline.sound import measure
from pipeline.timeline import FPS, SPEECH_RATE

ROOT = Path(__file__).resolve().parent.parent
TICK_SECONDS = 1.0
MEMORY = ("VmRSS", "RssAnon")
"""All that is resident, and without the pages shared with others (Ray's object store, libraries)."""


@dataclass
class Watched:
    """A process and what it held, tick by tick."""

    kind: str
    ticks: list[tuple[float, dict[str, int]]] = field(default_factory=list)

    def between(self, start: float, stop: float, name: str) -> list[int]:
        """Kilobytes of one measure from ``start`` to ``stop``, in seconds after the first tick of the job."""
        return [values[name] for at, values in self.ticks if start <= at < stop]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--size", type=int, default=64, help="width and height in pixels")
    parser.add_argument("--renderers", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    frames = round(options.minutes * 60 * FPS)
    with tempfile.TemporaryDirectory(prefix="bench-hour-") as name:
        folder = Path(name)
        _speech(folder / "speech.wav", frames)
        result, watched = _watched_job(folder, options.size, options.renderers)
        began = time.monotonic()
        check_video(folder / "talk.mp4", frames)  # raises where one frame is missing, late or damaged
        sound = measure(folder / "talk.mp4")
        checked = time.monotonic() - began
    timings = result["timings"]
    report = {
        "frames": frames,
        "frames_decoded": frames,
        "sound_seconds": round(sound.seconds, 4),
        "segments": result["segments_processed"],
        "size": options.size,
        "renderers": options.renderers,
        "timings": timings,
        "check_seconds": round(checked, 1),
        "memory_mb": _memory(watched, timings),
    }
    if options.json:
        print(json.dumps(report))
    else:
        print(f"{frames} frames decoded, each at its time; sound {sound.seconds:.3f} s; {timings}")
        print("process      measure   first quarter   last quarter    peak rendering   peak joining   (MB)")
        for row in report["memory_mb"]:
            numbers = (row["first_quarter"], row["last_quarter"], row["peak_rendering"], row["peak_joining"])
            cells = "".join("               -" if value is None else f"{value:>16.1f}" for value in numbers)
            print(f"{row['process']:<12} {row['measure']:<7}{cells}")


def _speech(path: Path, frames: int) -> None:
    """Syllables and pauses, exactly so many frames, written a minute at a time."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SPEECH_RATE)
        step = 60 * FPS
        for first in range(0, frames, step):
            count = min(step, frames - first) * SPEECH_RATE // FPS
            times = np.arange(count) / SPEECH_RATE
            syllables = np.maximum(0, np.sin(2 * np.pi * 3 * times)) * (times % 2 < 1.4)
            sound = syllables * np.sin(2 * np.pi * 180 * times) * 12_000
            file.writeframes(sound.astype("<i2").tobytes())


def _watched_job(folder: Path, size: int, renderers: int) -> tuple[dict[str, Any], dict[int, Watched]]:
    (scratch := folder / "scratch").mkdir()
    options = ["--width", str(size), "--height", str(size), "--gpus", str(renderers), "--json", "--quiet"]
    inputs = ["--image", str(ROOT / "examples" / "portrait.png"), "--audio", str(folder / "speech.wav")]
    settings = {"INFINITETALK_ENGINE": "draft", "INFINITETALK_SCRATCH_DIR": str(scratch)}
    command = [sys.executable, "-m", "infinitetalk", "render", *inputs, "-o", str(folder / "talk.mp4")]
    environment = {**os.environ, **settings}
    with subprocess.Popen([*command, *options], cwd=ROOT, env=environment, stdout=subprocess.PIPE) as job:
        watched: dict[int, Watched] = {}
        ended = threading.Event()
        watcher = threading.Thread(target=_watch, args=(job.pid, str(scratch), watched, ended))
        watcher.start()
        try:
            answer, _ = job.communicate()
        finally:
            ended.set()
            watcher.join()
    result: dict[str, Any] = json.loads(answer)
    if not result["success"]:
        raise SystemExit(result["message"])
    return result, watched


def _watch(driver: int, scratch: str, watched: dict[int, Watched], ended: threading.Event) -> None:
    began = time.monotonic()
    while not ended.wait(TICK_SECONDS):
        for pid, kind in _processes(driver, scratch):
            if values := _held(pid):
                watched.setdefault(pid, Watched(kind)).ticks.append((time.monotonic() - began, values))


def _processes(driver: int, scratch: str) -> Iterator[tuple[int, str]]:
    """Pid and kind of the job's driver, renderers and engines."""
    yield driver, "driver"
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            ours = scratch.encode() in (entry / "environ").read_bytes() or any(scratch in w for w in words)
        except OSError:
            continue
        if ours and words[0].startswith("ray::Renderer"):
            yield int(entry.name), "renderer"
        elif ours and words[1:3] == ["-m", "pipeline.draft"]:
            yield int(entry.name), "engine"


def _held(pid: int) -> dict[str, int]:
    """Kilobytes of a process; empty when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    found = {line.split(":")[0]: line.split()[1] for line in lines if ":" in line and line.split()[1:]}
    return {name: int(found[name]) for name in MEMORY if name in found}


def _memory(watched: dict[int, Watched], timings: dict[str, float]) -> list[dict[str, Any]]:
    """A row for each process and measure: medians of the first and the last quarter of the rendering."""
    ends = max(at for process in watched.values() for at, _ in process.ticks)
    joining = ends - timings["join_seconds"]
    start = joining - timings["render_seconds"]
    quarter = timings["render_seconds"] / 4
    rows = []
    numbers: dict[str, int] = {}
    for process in watched.values():
        numbers[process.kind] = number = numbers.get(process.kind, 0) + 1
        for name in MEMORY:
            first = process.between(start + 0.1 * quarter, start + quarter, name)
            last = process.between(joining - quarter, joining, name)
            if not first or not last:
                continue
            after = process.between(joining, ends + 1, name) if process.kind == "driver" else []
            rows.append(
                {
                    "process": f"{process.kind} {number}" if process.kind != "driver" else "driver",
                    "measure": name,
                    "first_quarter": round(statistics.median(first) / 1024, 1),
                    "last_quarter": round(statistics.median(last) / 1024, 1),
                    "peak_rendering": round(max(process.between(start, joining, name)) / 1024, 1),
                    "peak_joining": round(max(after) / 1024, 1) if after else None,
                }
            )
    return rows


if __name__ == "__main__":
    main()
